"""Golden facts about a real base and its two real fine-tunings: BERT on reaction SMILES, of the package rxnfp 0.1.0.

Recorded with the float64 reference of this folder (LAPACK gesvd through scipy 1.17.1, numpy 2.4.6, torch 2.13.0).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from spectra.linalg.svd import Spectrum, svd
from spectra.linalg.triplets import leading_triplets
from spectra.measures.decomposition import decompose
from spectra.measures.intruders import intruders
from spectra.measures.matrix import measure
from tests.reference import decomposition
from tests.reference import intruders as reference

BASE, SMALL, FULL = "bert_pretrained", "bert_ft_10k_25s", "bert_ft"

# Over all 199 matched tensors, 6 674 432 parameters: ||D|| / ||W|| and cos(W, W').
WHOLE_MODEL = {
    SMALL: (0.09240503611208101, 0.9957717960726263),
    FULL: (0.2162804100784868, 0.9764639383916539),
}

# Intruders (left, k = 10, epsilon = 0.5) per matrix of the 76 whose sides both exceed 1; no best cosine is nearer to
# epsilon than 4e-4, so that the counts do not hang on rounding.
INTRUDERS = {
    SMALL: {
        "encoder.layer.11.attention.self.query.weight": 1,
        "encoder.layer.11.attention.output.dense.weight": 2,
        "pooler.dense.weight": 9,
    },
    FULL: {
        "embeddings.word_embeddings.weight": 2,
        "encoder.layer.1.attention.output.dense.weight": 1,
        "encoder.layer.2.attention.output.dense.weight": 2,
        "encoder.layer.3.attention.output.dense.weight": 3,
        "encoder.layer.4.attention.output.dense.weight": 4,
        "encoder.layer.6.attention.self.value.weight": 1,
        "encoder.layer.6.attention.output.dense.weight": 3,
        "encoder.layer.7.attention.self.value.weight": 1,
        "encoder.layer.7.attention.output.dense.weight": 3,
        "encoder.layer.8.attention.output.dense.weight": 4,
        "encoder.layer.9.attention.self.query.weight": 2,
        "encoder.layer.9.attention.self.value.weight": 2,
        "encoder.layer.9.attention.output.dense.weight": 4,
        "encoder.layer.10.attention.output.dense.weight": 4,
        "encoder.layer.11.attention.self.query.weight": 4,
        "encoder.layer.11.attention.self.key.weight": 2,
        "encoder.layer.11.attention.self.value.weight": 2,
        "encoder.layer.11.attention.output.dense.weight": 6,
        "encoder.layer.11.intermediate.dense.weight": 4,
        "pooler.dense.weight": 9,
    },
}

# A square, a tall and a wide matrix of the full fine-tuning.
COLUMNS = (
    "relative_update",
    "cosine",
    "diagonal_share",
    "off_diagonal_share",
    "outside_share",
    "stable_rank",
    "effective_rank",
    "energy_rank_90",
    "spectral_shift",
    "spectral_norm_update",
    "left_overlap",
    "left_angle",
)
MATRICES = {
    "encoder.layer.11.attention.self.query.weight": (
        0.26431642679359163,
        0.9644531597461521,
        0.06483466427629177,
        0.9351653357237077,
        0.0,
        11.300007953711086,
        141.93144215585824,
        59,
        0.03192302023949358,
        1.068341579202847,
        0.6931871840488337,
        1.5308595693987936,
    ),
    "encoder.layer.5.intermediate.dense.weight": (
        0.19380811590521185,
        0.9810685504773734,
        0.05572579849749434,
        0.49397376376965435,
        0.45030043773285183,
        29.76633866097329,
        187.43798953222876,
        95,
        0.027780412578357817,
        0.6638285918370662,
        0.8852928336855266,
        1.1231814520620989,
    ),
    "encoder.layer.5.output.dense.weight": (
        0.20229476156552095,
        0.9793372694648802,
        0.05427928127970801,
        0.5162886584014093,
        0.4294320603188832,
        28.073502373077975,
        208.81508347609292,
        125,
        0.026941370701408292,
        0.7055930321040998,
        0.9560564704037354,
        0.3804605877168262,
    ),
}


def weights_of(model: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(model / "pytorch_model.bin", map_location="cpu", weights_only=True)
    return {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def base(rxnfp: Path) -> dict[str, Tensor]:
    return weights_of(rxnfp / BASE)


@pytest.fixture(scope="module")
def full(rxnfp: Path) -> dict[str, Tensor]:
    return weights_of(rxnfp / FULL)


@pytest.fixture(scope="module")
def spectra_of_base(base: dict[str, Tensor]) -> dict[str, Spectrum]:
    return {name: svd(W) for name, W in base.items() if W.ndim == 2 and min(W.shape) > 1}


@pytest.fixture(scope="module", params=[SMALL, FULL])
def tuned(request: pytest.FixtureRequest, rxnfp: Path) -> tuple[str, dict[str, Tensor]]:
    return request.param, weights_of(rxnfp / request.param)


def test_size_and_direction_of_the_whole_change(base: dict[str, Tensor], tuned: tuple[str, dict[str, Tensor]]) -> None:
    model, after = tuned
    matched = [name for name in base if name in after and base[name].shape == after[name].shape]
    W, W_tuned = (torch.cat([side[name].double().flatten() for name in matched]) for side in (base, after))
    relative_update, cosine = WHOLE_MODEL[model]
    assert (len(matched), len(W)) == (199, 6_674_432)
    assert float((W_tuned - W).norm() / W.norm()) == pytest.approx(relative_update, rel=1e-9)
    assert float(W @ W_tuned / W.norm() / W_tuned.norm()) == pytest.approx(cosine, rel=1e-9)


def test_intruders_of_every_matrix(
    base: dict[str, Tensor], spectra_of_base: dict[str, Spectrum], tuned: tuple[str, dict[str, Tensor]]
) -> None:
    model, after = tuned
    matched = [name for name in spectra_of_base if name in after and base[name].shape == after[name].shape]
    counts = {name: intruders(spectra_of_base[name], leading_triplets(after[name], 10)).count for name in matched}
    assert len(matched) == 76
    assert {name: count for name, count in counts.items() if count} == INTRUDERS[model]


@pytest.mark.parametrize(
    "name",
    ["pooler.dense.weight", "encoder.layer.11.intermediate.dense.weight", "encoder.layer.11.output.dense.weight"],
)
def test_best_cosines_equal_the_reference(
    base: dict[str, Tensor],
    spectra_of_base: dict[str, Spectrum],
    tuned: tuple[str, dict[str, Tensor]],
    name: str,
) -> None:
    after = tuned[1][name]
    expected = reference.best_matches(base[name].double().numpy(), after.double().numpy())
    found = intruders(spectra_of_base[name], leading_triplets(after, 10))
    np.testing.assert_allclose(found.best_cosine, [match.best_cosine for match in expected], atol=1e-6)
    assert found.partner.tolist() == [match.partner for match in expected]


@pytest.mark.parametrize("name", list(MATRICES))
def test_measures_of_three_matrices(
    base: dict[str, Tensor], full: dict[str, Tensor], spectra_of_base: dict[str, Spectrum], name: str
) -> None:
    after = full[name]
    stored = torch.float32
    layer = measure(base[name], spectra_of_base[name], after, base_dtype=stored, tuned_dtype=stored).layer
    for column, value in zip(COLUMNS, MATRICES[name], strict=True):
        assert layer[column] == pytest.approx(value, rel=1e-6, abs=1e-6), column
    assert layer["intruders"] == INTRUDERS[FULL].get(name, 0)
    assert not layer["below_rounding_floor"]


@pytest.mark.parametrize("name", list(MATRICES))
def test_every_component_of_three_matrices_equals_the_reference(
    base: dict[str, Tensor], full: dict[str, Tensor], spectra_of_base: dict[str, Spectrum], name: str
) -> None:
    """Real singular values crowd; those of these matrices are far enough apart for every single component."""
    W, D = base[name], full[name] - base[name]
    got = decompose(spectra_of_base[name], D)
    expected = decomposition.decompose(W.double().numpy(), D.double().numpy())
    energy = expected.update_energy
    np.testing.assert_allclose(got.diagonal, expected.diagonal, rtol=0, atol=1e-6 * energy**0.5)
    for column in ("row_energy", "column_energy", "outside_energy"):
        np.testing.assert_allclose(
            getattr(got, column), getattr(expected, column), rtol=0, atol=1e-6 * energy, err_msg=column
        )
    for column in ("plasticity", "left_stability", "right_stability", "stability"):
        np.testing.assert_allclose(getattr(got, column), getattr(expected, column), rtol=0, atol=2e-6, err_msg=column)
