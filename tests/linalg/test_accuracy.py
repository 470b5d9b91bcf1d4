"""The promise of the README, on every kind of weight: singular values to 1e-9 s_0, energies and cosines to 1e-6.

Held against gesvd in float64, which shares no code with what is tested, through `spectra.compare` and `measure`, to the
last components. What is not defined is not compared: inside a cluster of equal singular values only sums over it,
and where singular values are zero only what does not depend on the choice of their directions (see `assert_energies`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import spectra
from spectra.linalg.lowrank import LowRank
from spectra.linalg.svd import svd
from spectra.linalg.triplets import leading_triplets
from spectra.measures.intruders import intruders
from spectra.measures.matrix import measure
from tests.reference import decomposition, singular
from tests.reference import intruders as reference
from tests.reference.singular import Array
from tests.strategies import orthonormal, with_spectrum

VALUES, ENERGIES = 1e-9, 1e-6  # of s_0, of ||D||_F^2
NULL = 1e-9  # of s_0: below, a float32 matrix says nothing of the direction
CLUSTER = 1e-8  # of s_0: closer neighbours are one cluster
SLICES = 8

Columns = Mapping[str, Array]


def llm(generator: np.random.Generator, m: int, n: int) -> Array:
    """A Marchenko-Pastur bulk with unequal rows and columns, and 5 % heavy-tailed spikes above it."""
    bulk = np.exp(0.3 * generator.normal(size=(m, 1))) * generator.normal(size=(m, n))
    bulk *= 0.02 * np.exp(0.3 * generator.normal(size=(1, n)))
    count = max(1, min(m, n) // 20)
    heights = 0.02 * (m**0.5 + n**0.5) * generator.uniform(1e-3, 1, count) ** -0.5
    spikes: Array = (orthonormal(generator, m, count) * heights) @ orthonormal(generator, n, count).T
    return bulk + spikes


def decaying(generator: np.random.Generator, m: int, n: int) -> Array:
    return with_spectrum(generator, m, n, np.logspace(0, -6, min(m, n)))


def rank_deficient(generator: np.random.Generator, m: int, n: int) -> Array:
    """Of exactly a third of the rank: small integers, whose products float32 holds exactly."""
    rank = min(m, n) // 3
    return (generator.integers(-2, 3, (m, rank)) @ generator.integers(-2, 3, (rank, n))).astype(np.float64)


def clustered(generator: np.random.Generator, m: int, n: int) -> Array:
    """Singular values 3, 2 and 1 many times each, exact in float32: signed permutations of a diagonal."""
    k = min(m, n)
    W = np.zeros((m, n))
    signs = generator.choice([-1.0, 1.0], k)
    W[generator.permutation(m)[:k], generator.permutation(n)[:k]] = signs * generator.choice([1.0, 2.0, 3.0], k)
    return W


def graded(generator: np.random.Generator, m: int, n: int) -> Array:
    return np.logspace(0, -8, m)[:, None] * generator.normal(size=(m, n))


KINDS: dict[str, tuple[Callable[[np.random.Generator, int, int], Array], int, int, float]] = {
    "llm": (llm, 96, 96, 1.0),
    "llm, wide": (llm, 64, 160, 1.0),
    "llm, tall": (llm, 160, 64, 1.0),
    "decay": (decaying, 96, 96, 1.0),
    "decay, wide": (decaying, 64, 160, 1.0),
    "decay, tall": (decaying, 160, 64, 1.0),
    "rank deficient": (rank_deficient, 60, 60, 1.0),
    "rank deficient, wide": (rank_deficient, 48, 90, 1.0),
    "rank deficient, tall": (rank_deficient, 90, 48, 1.0),
    "clustered": (clustered, 48, 48, 1.0),
    "clustered, wide": (clustered, 48, 64, 1.0),
    "graded": (graded, 64, 64, 1.0),
    "graded, wide": (graded, 64, 96, 1.0),
    "tall 64:1": (llm, 768, 12, 1.0),
    "wide 1:64": (llm, 12, 768, 1.0),
    "one row": (llm, 1, 60, 1.0),
    "one column": (llm, 60, 1, 1.0),
    "zero": (lambda generator, m, n: np.zeros((m, n)), 24, 40, 1.0),
    "denormal": (llm, 48, 64, 2.0**-132),
    "1e30": (llm, 48, 64, 1e30),
    "1e-30": (llm, 64, 48, 1e-30),
}
TRUE_VECTORS = [name for name in KINDS if not name.startswith(("rank", "clustered", "graded", "zero", "one"))]


@cache
def made(kind: str) -> tuple[Tensor, Tensor, LowRank]:
    """W, W' and a LoRA update of W. For "decay", W' moves what lies in the last slice most: there float32 is wrong."""
    build, m, n, scale = KINDS[kind]
    generator = np.random.default_rng(sorted(KINDS).index(kind))
    W = build(generator, m, n)
    size = float(np.abs(W).max()) or 1.0
    D = 0.02 * size * generator.normal(size=(m, n))
    if build is decaying:
        last = singular.svd(W)
        D = 0.3 * (last.U[:, -1:] + last.U[:, -2:-1]) @ last.V[:, -1:].T + 0.01 * D
    B, A = generator.normal(size=(m, 4)), 0.1 * size * generator.normal(size=(4, n))
    stored = [torch.from_numpy(scale * X).float() for X in (W, W + D)]
    return stored[0], stored[1], LowRank(torch.from_numpy(B).float(), torch.from_numpy(scale * A).float(), 0.5)


@pytest.fixture(scope="module")
def compared() -> spectra.Comparison:
    """All kinds in one run of the main job."""
    base, tuned = ({f"{kind}.weight": made(kind)[side] for kind in KINDS} for side in (0, 1))
    return spectra.compare(base, tuned, slices=SLICES, workers=1)


def columns_of(result: spectra.Comparison, name: str) -> tuple[dict[str, Array], dict[str, Array], dict[str, Any]]:
    """The components, slices and the row of one matrix."""
    components, slices, layers = (
        table[table["name"] == name] for table in (result.components, result.slices, result.layers)
    )
    (row,) = layers.to_dict("records")
    assert row["status"] == "compared", row["note"]
    return {c: components[c].to_numpy() for c in components}, {c: slices[c].to_numpy() for c in slices}, row


@pytest.mark.parametrize("kind", KINDS)
def test_compare(compared: spectra.Comparison, kind: str) -> None:
    W, tuned, _ = made(kind)
    assert_exact(*columns_of(compared, f"{kind}.weight"), W, tuned.double().numpy() - W.double().numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_measure(kind: str) -> None:
    W, tuned, _ = made(kind)
    found = measure(W, svd(W), tuned, base_dtype=torch.float32, tuned_dtype=torch.float32, slices=SLICES)
    assert_exact(found.components, found.slices, found.layer, W, tuned.double().numpy() - W.double().numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_adapter(kind: str) -> None:
    W, _, D = made(kind)
    wide = svd(W, torch.float64)
    found = measure(W.double(), wide, D, base_dtype=torch.float32, tuned_dtype=torch.float32, slices=SLICES)
    dense = D.c * D.B.double().numpy() @ D.A.double().numpy()
    assert_exact(found.components, found.slices, found.layer, W, dense)


@pytest.mark.parametrize("kind", TRUE_VECTORS)
def test_cosines_of_the_leading_directions(kind: str) -> None:
    W, tuned, _ = made(kind)
    found = intruders(svd(W), leading_triplets(tuned, 10))
    matches = reference.best_matches(W.double().numpy(), tuned.double().numpy())
    np.testing.assert_allclose(found.best_cosine, [match.best_cosine for match in matches], rtol=0, atol=1e-6)


@pytest.mark.parametrize("last", [-8, -24])
@pytest.mark.parametrize(("m", "n"), [(140, 200), (200, 140)])
def test_the_tail_of_an_update(m: int, n: int, last: int) -> None:
    """Rows of falling size give D singular values down to nothing: squaring alone, or a float32 D, would lose them.

    The tail is the smaller part of them in one case, and the larger in the other.
    """
    generator = np.random.default_rng(0)
    size = np.logspace(0, last, m)[:, None]
    W, tuned = (torch.from_numpy(size * generator.normal(size=(m, n))).float() for _ in range(2))
    D = tuned.double().numpy() - W.double().numpy()
    true = singular.svd(D).s
    found = measure(W, svd(W), tuned, base_dtype=torch.float32, tuned_dtype=torch.float32)
    np.testing.assert_allclose(found.components["update_singular_value"], true, rtol=0, atol=VALUES * true[0])
    assert not np.allclose(singular.svd((tuned - W).double().numpy()).s, true, rtol=0, atol=VALUES * true[0])


@pytest.mark.parametrize("shape", ["", ", wide", ", tall"])
def test_a_float32_svd_would_not_pass(shape: str) -> None:
    """The yardstick can fail: the usual float32 SVD is wrong by whole per cents in the last slice of "decay"."""
    W, tuned, _ = made(f"decay{shape}")
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    C = (U.T @ (tuned - W) @ Vh.T).double().numpy()
    D = tuned.double().numpy() - W.double().numpy()
    expected = decomposition.decompose(W.double().numpy(), D)
    last = slice(-len(C) // SLICES, None)
    rows = np.sum(C**2, axis=1)
    wrong = np.abs(rows - expected.row_energy - expected.diagonal**2)[last] / expected.update_energy
    assert wrong.max() > 1e-2


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layer.11.attention.self.query.weight",
        "encoder.layer.11.attention.output.dense.weight",
        "encoder.layer.5.intermediate.dense.weight",
    ],
)
def test_a_real_fine_tuning(rxnfp: Path, name: str) -> None:
    base, tuned = rxnfp / "bert_pretrained", rxnfp / "bert_ft"
    result = spectra.compare(base, tuned, include=[f"*{name}"], slices=SLICES, workers=1)
    (full,) = result.layers["name"]
    stored = [torch.load(side / "pytorch_model.bin", weights_only=True) for side in (base, tuned)]
    W, after = (next(tensor for key, tensor in side.items() if key.endswith(name)) for side in stored)
    assert_exact(*columns_of(result, full), W, after.double().numpy() - W.double().numpy())


@pytest.mark.parametrize("layer", ["C.nnf-l2", "H.nnf-l2", "N.nnf-l2", "O.nnf-l4"])
def test_a_real_transfer_to_better_data(weights_folder: Callable[[str], Path], layer: str) -> None:
    """ANI-1x and what transfer learning to coupled-cluster energies made of it (ANI-1ccx): raw float32, row by row."""
    folder = weights_folder("torchani") / "resources"
    ends = (f"{model}_8x/train0/networks/ANN-{layer}" for model in ("ani-1x", "ani-1ccx"))
    sides = []
    for end in ends:
        out = len(np.fromfile(folder / f"{end}.bparam", "<f4"))
        sides.append(torch.from_numpy(np.fromfile(folder / f"{end}.wparam", "<f4").reshape(out, -1)))
    W, tuned = sides
    result = spectra.compare({"weight": W}, {"weight": tuned}, slices=SLICES, workers=1)
    assert_exact(*columns_of(result, "weight"), W, tuned.double().numpy() - W.double().numpy())


def assert_exact(components: Columns, slices: Columns, row: Mapping[str, Any], weight: Tensor, D: Array) -> None:
    """All that the promise covers, of W as stored and D in float64."""
    W = weight.double().numpy()
    base, tuned, update = singular.svd(W), singular.svd(W + D), singular.svd(D)
    largest = max(base.s[0], tuned.s[0])
    for column, side, scale in (
        ("singular_value", base, largest),
        ("tuned_singular_value", tuned, largest),
        ("update_singular_value", update, update.s[0]),
    ):
        np.testing.assert_allclose(components[column], side.s, rtol=0, atol=VALUES * scale, err_msg=column)
    assert row["spectral_norm_update"] == pytest.approx(update.s[0], rel=VALUES)
    assert row["nuclear_norm_update"] == pytest.approx(update.s.sum(), rel=VALUES)
    expected = decomposition.decompose(W, D, base)
    total = expected.update_energy
    assert row["update_norm"] == pytest.approx(np.sqrt(total), rel=VALUES)
    clusters = singular.clusters(base.s, CLUSTER)
    alive = base.s > NULL * base.s[0]
    assert_energies(components, expected, W.shape, clusters, alive)
    if max(cluster.stop - cluster.start for cluster in clusters) == 1 and alive.all():
        np.testing.assert_allclose(components["plasticity"], expected.plasticity, rtol=0, atol=ENERGIES)
        # ||W' v_i||^2 and ||W'^T u_i||^2 are made of energies, and are as good as those relative to ||D||^2.
        for side, X, image in (("left", base.V, W + D), ("right", base.U, (W + D).T)):
            amplified = np.maximum(1, total / np.sum((image @ X) ** 2, axis=0))
            error = np.abs(components[f"{side}_stability"] - getattr(expected, f"{side}_stability"))
            np.testing.assert_array_less(error, ENERGIES * amplified, err_msg=side)
        C, _ = decomposition.coefficients(base, D)
        for index, (start, stop) in enumerate(zip(slices["start"].tolist(), slices["stop"].tolist(), strict=True)):
            energies = slices["block_energy"][index], slices["cross_energy"][index]
            np.testing.assert_allclose(
                energies, decomposition.slice_energies(C, start, stop), rtol=0, atol=ENERGIES * total
            )


def assert_energies(
    found: Columns,
    expected: decomposition.Columns,
    shape: tuple[int, int],
    clusters: list[slice],
    alive: np.ndarray[Any, Any],
) -> None:
    """Energies of every component, as sums over clusters: rows and columns with their diagonal, then outside alone.

    The long side's directions of zero singular values are any that are orthogonal to the others. So where there are
    such, rows and columns of C along that side are compared together with what lies outside (||D v_i||^2 for m > n).
    """
    m, n = shape
    diagonal, rows, columns, outside = (
        (np.asarray(found[name]), getattr(expected, name))
        for name in ("diagonal", "row_energy", "column_energy", "outside_energy")
    )
    compared = {}
    for which in (0, 1):
        squares = diagonal[which] ** 2
        whole = {"rows": rows[which] + squares, "columns": columns[which] + squares, "outside": outside[which]}
        if not alive.all():
            long = "columns" if m > n else "rows"
            whole[long] = whole[long] + whole.pop("outside")
            if m != n:
                whole["columns" if long == "rows" else "rows"][~alive] = 0
        compared[which] = whole
    for name in compared[0]:
        got, true = (np.array([compared[w][name][cluster].sum() for cluster in clusters]) for w in (0, 1))
        np.testing.assert_allclose(got, true, rtol=0, atol=ENERGIES * expected.update_energy, err_msg=name)
    single = [cluster.start for cluster in clusters if cluster.stop - cluster.start == 1 and alive[cluster.start]]
    np.testing.assert_allclose(
        diagonal[0][single] ** 2, diagonal[1][single] ** 2, rtol=0, atol=ENERGIES * expected.update_energy
    )
