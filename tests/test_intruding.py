"""Intruders: the planted ones are found and nothing else, as the published loop counts and as float64 SVDs say."""

from __future__ import annotations

import dataclasses
import json
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from spectra_cli.app import app
from spectra_cli.intruders import draw, show
from torch import Tensor
from typer.testing import CliRunner, Result

import spectra
from spectra.errors import SpectraError
from spectra.intruding import find_intruders
from spectra.intrusion import Intrusion
from tests.reference.intruder_loop import count_intruders
from tests.reference.intruders import best_matches
from tests.reference.singular import Array
from tests.reference.singular import svd as reference_svd
from tests.strategies import orthonormal, pairs, seeds

CLUSTER = slice(4, 12)  # eight strong components of nearly equal singular values


class Planted:
    """W with singular values 30 ... 27, a cluster of eight near 20, and a weak rest; W' with what is planted."""

    def __init__(self, seed: int, m: int, n: int) -> None:
        generator = np.random.default_rng(seed)
        k = min(m, n)
        self.U, self.V = orthonormal(generator, m, k), orthonormal(generator, n, k)
        cluster = 20 * (1 + 2e-4 * np.arange(8)[::-1])
        self.s = np.concatenate([np.arange(30.0, 26.0, -1.0), cluster, np.linspace(0.2, 0.1, k - 12)])
        self.W: Array = (self.U * self.s) @ self.V.T
        self.tuned = self.W.copy()

    def weak(self, side: Array, at: int) -> Array:
        """A unit vector, an even mixture of twelve weak base vectors: its best cosine is 0.29."""
        vector: Array = side[:, 12 + 12 * at : 24 + 12 * at].sum(axis=1) / np.sqrt(12)
        return vector

    def add(self, left: Array, right: Array, strength: float) -> None:
        self.tuned += strength * np.outer(left, right)

    def found(self, side: str = "both", **options: Any) -> Intrusion:
        base, tuned = ({"a.weight": torch.from_numpy(X).float()} for X in (self.W, self.tuned))
        return find_intruders(base, tuned, side=side, **options)  # type: ignore[arg-type]


def rows(result: Intrusion, side: str) -> list[int]:
    table = result.intruders
    return table[table["side"] == side]["index"].tolist()


SHAPES = [(72, 72), (72, 100), (100, 72)]


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_a_planted_direction_is_found_with_its_strength_and_nothing_else(m: int, n: int) -> None:
    planted = Planted(0, m, n)
    planted.add(planted.weak(planted.U, 0), planted.weak(planted.V, 0), 29.5)
    planted.add(planted.weak(planted.U, 1), planted.weak(planted.V, 1), 25.0)
    result = planted.found(k=14)
    assert rows(result, "left") == rows(result, "right") == [1, 5]
    table = result.intruders
    assert not table["spread"].any()
    np.testing.assert_allclose(table["tuned_singular_value"], [29.5, 25.0] * 2, atol=0.2)
    np.testing.assert_allclose(table["best_cosine"], 12**-0.5, atol=0.03)
    partners = table["partner"].to_numpy() - 12
    assert (partners // 12 == [0, 1, 0, 1]).all()  # of the mixture that it was made of


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_nothing_is_found_where_nothing_was_planted(m: int, n: int) -> None:
    planted = Planted(1, m, n)
    planted.tuned = planted.W + 1e-3 * np.outer(planted.U[:, 0], planted.V[:, 1])
    result = planted.found()
    assert len(result.intruders) == 0 and len(result.triplets) == 20
    assert planted.found("left").counts()["intruders"].tolist() == [0]


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_an_intruder_on_one_side_is_reported_on_that_side(m: int, n: int) -> None:
    planted = Planted(2, m, n)
    planted.add(planted.weak(planted.U, 0), planted.V[:, 30], 28.5)
    result = planted.found()
    assert rows(result, "left") == [2] and rows(result, "right") == []


@pytest.mark.parametrize("strength", [29.5, 5.0])
def test_only_the_top_k_count(strength: float) -> None:
    """A weak new direction stands at index 12, behind the twelve strong components of the base."""
    planted = Planted(3, 72, 80)
    planted.add(planted.weak(planted.U, 0), planted.weak(planted.V, 0), strength)
    at = 1 if strength > 20 else 12
    result = planted.found("left", k=13)
    assert rows(result, "left") == [at]
    counted = result.counts(ks=range(1, 14))["intruders"].tolist()
    assert counted == [int(k > at) for k in range(1, 14)]


def test_a_direction_that_only_spread_over_a_cluster_is_marked() -> None:
    planted = Planted(4, 72, 80)
    left, right = (side[:, CLUSTER].sum(axis=1) / np.sqrt(8) for side in (planted.U, planted.V))
    planted.add(left, right, 5.0)
    row = planted.found("left", k=5).intruders.iloc[0]
    assert row["best_cosine"] == pytest.approx(8**-0.5, abs=0.01)
    assert row["spread"] and row["cluster_members"] == 8
    assert row["cluster_cosine"] == pytest.approx(1, abs=1e-3)
    assert not planted.found("left", k=5, cluster_gap=1e-6).intruders["spread"].any()


@settings(max_examples=60)
@given(
    pair=pairs(kinds=("gaussian", "separated"), dtypes=(torch.float32, torch.float64)),
    side=st.sampled_from(["left", "right"]),
)
def test_cosines_equal_a_float64_svd_on_random_shapes(pair: tuple[Tensor, Tensor], side: Any) -> None:
    W, D = pair
    tuned = W + D.to(W.dtype)
    result = find_intruders({"a.weight": W}, {"a.weight": tuned}, side=side, include=(), workers=1)
    if torch.equal(W, tuned):
        assert result.matrices["status"].tolist() == ["unchanged"] and result.triplets.empty
        return
    exact = tuned.double().numpy()
    expected = best_matches(W.double().numpy(), exact, side=side)
    s = reference_svd(exact).s
    s_base = reference_svd(W.double().numpy()).s
    apart = np.abs(np.subtract.outer(s, s)) + np.diag(np.full(len(s), np.inf))
    # A vector is known up to (rounding) / (gap); what crowds has no direction to be compared.
    known = [j for j in range(len(result.triplets)) if apart[j].min() > 1e-3 * s[0] and s[j] > 1e-3 * s[0]]
    if np.abs(np.diff(s_base)).min(initial=np.inf) < 1e-3 * s_base[0] or s_base[-1] < 1e-3 * s_base[0]:
        known = []
    for j in known:
        assert result.triplets["best_cosine"][j] == pytest.approx(expected[j].best_cosine, abs=1e-4)
    decided = [j for j in known if abs(expected[j].best_cosine - 0.5) > 1e-4]
    found = set(result.intruders["index"])
    assert {j for j in decided if expected[j].best_cosine < 0.5} == found & set(decided)


@given(
    seed=seeds,
    r=st.integers(1, 4),
    c=st.sampled_from([0.5, 2.0]),
    shape=st.sampled_from([(30, 20), (20, 30), (24, 24)]),
)
def test_an_adapter_gives_what_its_merged_weight_gives(seed: int, r: int, c: float, shape: tuple[int, int]) -> None:
    from spectra.linalg.lowrank import LowRank
    from spectra.linalg.svd import svd
    from spectra.measures.familiarity import familiarity
    from spectra.measures.tuned import tuned_triplets

    generator = np.random.default_rng(seed)
    m, n = shape
    W = torch.from_numpy(generator.normal(size=shape))
    D = LowRank(torch.from_numpy(generator.normal(size=(m, r))), torch.from_numpy(generator.normal(size=(r, n))), c)
    base = svd(W)
    for fast in (False, True):
        found = tuned_triplets(W, base, D, 5, fast=fast)
        expected = best_matches(W.numpy(), (W + D.dense()).numpy(), k=5)
        cosines = familiarity(base, found, 5, "left").best_cosine
        gaps = np.abs(np.diff(np.linalg.svd((W + D.dense()).numpy(), compute_uv=False)))[:6]
        if gaps.min() > 1e-2:
            np.testing.assert_allclose(cosines, [match.best_cosine for match in expected], atol=1e-6)


@pytest.mark.parametrize(("tuned", "total", "matrices"), [("bert_ft_10k_25s", 12, 3), ("bert_ft", 63, 20)])
def test_a_real_pair_counts_as_the_published_loop(rxnfp: Path, tuned: str, total: int, matrices: int) -> None:
    """As published: left vectors, k = 10, epsilon = 0.5. The loop runs on those matrices where it may differ most."""
    result = find_intruders(rxnfp / "bert_pretrained", rxnfp / tuned, workers=2)
    compared = result.matrices[(result.matrices["rows"] > 1) & (result.matrices["columns"] > 1)]
    assert len(compared) == 76 and (compared["status"] == "compared").all()
    assert compared["left_intruders"].sum() == total and (compared["left_intruders"] > 0).sum() == matrices
    assert result.counts()[["intruders", "matrices_with_intruders"]].values.tolist() == [[total, matrices]]
    states = [torch.load(rxnfp / f / "pytorch_model.bin", map_location="cpu") for f in ("bert_pretrained", tuned)]
    base, after = ({name.removeprefix("bert."): W for name, W in state.items()} for state in states)
    of_output = [n for n in after if n.endswith("attention.output.dense.weight") or n == "pooler.dense.weight"]
    expected = count_intruders({n: base[n] for n in of_output}, after)
    counts = dict(zip(compared["name"].str.removeprefix("bert."), compared["left_intruders"], strict=True))
    assert {name: counts[name] for name in of_output} == expected


@pytest.fixture(scope="module")
def example() -> Intrusion:
    planted = Planted(5, 72, 80)
    planted.add(planted.weak(planted.U, 0), planted.weak(planted.V, 0), 29.5)
    return planted.found(k=6)


def test_saved_tables_say_the_same(example: Intrusion, tmp_path: Path) -> None:
    again = Intrusion.load(example.save(tmp_path / "here"))
    assert again.triplets.equals(example.triplets) and again.matrices.equals(example.matrices)
    thresholds = np.linspace(0, 1, 11)
    assert again.counts(thresholds, [2, 6]).equals(example.counts(thresholds, [2, 6]))
    assert repr(again) == repr(example) and "1 of tuned (left)" in repr(again)
    by_threshold = again.counts(thresholds)
    assert all(group["intruders"].is_monotonic_increasing for _, group in by_threshold.groupby("side"))
    assert json.loads((tmp_path / "here" / "intruders.json").read_text())["options"]["epsilon"] == 0.5


def test_pictures_show_the_counts(example: Intrusion) -> None:
    for ax in (example.plot.epsilon(side="right"), example.plot.k()):
        assert ax.get_xlabel() and ax.get_ylabel() and ax.get_title(loc="left")
    assert example.plot.k().lines[0].get_ydata().tolist() == [0, 1, 1, 1, 1, 1]
    assert example.plot.matrix("a").get_title(loc="left").startswith("1 intruder among 6")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"k": 0}, "k must be"), ({"k": 2.5}, "not 2.5"), ({"epsilon": 2}, "epsilon"), ({"epsilon": "a"}, "not 'a'"),
     ({"epsilon": float("nan")}, "epsilon"), ({"cluster_gap": None}, "cluster_gap"),
     ({"side": "up"}, "no side"), ({"workers": 0}, "workers"),
     ({"dtype": torch.float16}, "torch.float32")],
)  # fmt: skip
def test_mistakes_are_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpectraError, match=words):
        find_intruders({"a.weight": torch.eye(3)}, {"a.weight": torch.ones(3, 3)}, **options)


def test_counts_beyond_what_was_looked_at_are_refused(example: Intrusion, tmp_path: Path) -> None:
    with pytest.raises(SpectraError, match="between 1 and 6"):
        example.counts(ks=[7])
    with pytest.raises(SpectraError, match="between 0 and 1"):
        example.counts(epsilons=[-0.1])
    with pytest.raises(SpectraError, match="between 0 and 1"):
        example.counts(epsilons=["a"])  # type: ignore[list-item]
    with pytest.raises(SpectraError, match="holds no saved intruders"):
        Intrusion.load(tmp_path)


def test_a_matrix_that_is_not_finite_fails_alone() -> None:
    base = {"a.weight": torch.randn(6, 6), "b.weight": torch.randn(6, 6)}
    tuned = {"a.weight": torch.full((6, 6), torch.nan), "b.weight": torch.randn(6, 6)}
    result = find_intruders(base, tuned)
    assert result.matrices["status"].tolist() == ["failed", "compared"]
    assert "NaN" in result.matrices["note"][0] and result.triplets["name"].unique().tolist() == ["b.weight"]


def adapter(folder: Path, A: Tensor, B: Tensor) -> Path:
    """A PEFT adapter of the module `fc` with the factors B A."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": len(A), "lora_alpha": len(A), "target_modules": ["fc"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.fc.lora"
    save_file({f"{prefix}_A.weight": A, f"{prefix}_B.weight": B}, folder / "adapter_model.safetensors")
    return folder


def test_what_does_not_converge_is_solved_directly_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Squares of 1e160 leave the range of float64, so that no eigenvalue of W'^T W' can be had."""
    torch.manual_seed(0)
    W = torch.randn(8, 6, dtype=torch.float64) * 1e160
    A, B = torch.randn(2, 6, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64) * 1e160
    result = find_intruders({"fc.weight": W}, adapter(tmp_path / "adapter", A, B), k=3)
    (algorithm,) = result.matrices["tuned_algorithm"]
    assert algorithm.endswith("of all of W', for its leading triplets did not converge")
    expected = torch.linalg.svdvals((W + B @ A) / 1e160)[:3] * 1e160
    np.testing.assert_allclose(result.triplets["tuned_singular_value"], expected, rtol=1e-9)
    show(result, top=1)
    printed = " ".join(capsys.readouterr().out.split())
    assert "directions of 1 matrix are from a full SVD of W', since their own solver did not converge" in printed


@pytest.mark.parametrize("fast", [False, True])
def test_a_comparison_solves_an_adapter_that_does_not_converge_in_full_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    """No pair of finite energies is known where the reduction fails, so that it is made to fail here."""
    from spectra.linalg.lapack import LapackError

    torch.manual_seed(0)
    base = {"fc.weight": torch.randn(40, 30)}
    folder = adapter(tmp_path / "adapter", torch.randn(2, 30), torch.randn(40, 2))
    usual = spectra.compare(base, folder, top=4)

    def fail(*_: Any, **__: Any) -> None:
        raise LapackError("dsterf returned info = 19")

    monkeypatch.setattr("spectra.measures.tuned.perturbed_triplets", fail)
    result = spectra.compare(base, folder, top=4, fast=fast)
    (row,) = result.layers.to_dict("records")
    assert row["status"] == "compared"
    assert row["tuned_algorithm"].endswith("of all of W', for its leading triplets did not converge")
    for column in ("lowest_best_cosine", "left_overlap", "spectral_shift", "effective_rank_tuned"):
        assert row[column] == pytest.approx(usual.layers[column][0], rel=1e-6)
    said = "of 1 matrix (fc.weight) are from a full SVD of the tuned weight"
    assert any(said in str(each) for each in result.diagnosis())
    assert not any("full SVD" in str(each) for each in usual.diagnosis())


def test_an_adapter_beyond_float64_fails_in_a_comparison_with_the_reason(tmp_path: Path) -> None:
    torch.manual_seed(0)
    A, B = torch.randn(2, 30, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64) * 1e160
    base = {"fc.weight": torch.randn(40, 30, dtype=torch.float64)}
    (row,) = spectra.compare(base, adapter(tmp_path / "adapter", A, B)).layers.to_dict("records")
    assert row["status"] == "failed"
    assert row["note"] == "the squares of W or of W' - W leave the range of float64; scale both models down"


def test_what_squaring_would_spoil_is_solved_directly_and_says_so() -> None:
    """Of k = 5 directions the last ones are 1e-6 of the first: good in float32, gone in its squares."""
    generator = np.random.default_rng(6)
    U, V = orthonormal(generator, 300, 5), orthonormal(generator, 200, 5)
    W, tuned = ({"a.weight": torch.from_numpy((U * [1, 0.5, s, s / 2, s / 4]) @ V.T).float()} for s in (1e-2, 1e-5))
    result = find_intruders(W, tuned, k=5)
    (algorithm,) = result.matrices["tuned_algorithm"]
    assert algorithm == "gram64 of all of W', its tail solved again without squaring"
    twice = ({"a.weight": X["a.weight"], "b.weight": X["a.weight"].clone()} for X in (W, tuned))
    note = find_intruders(*twice, k=5).provenance["notes"][-1]
    assert note == "the leading directions of 2 matrices are from a full SVD of W', since squaring would spoil them"
    assert not any("full SVD" in note for note in find_intruders(W, tuned, k=2).provenance["notes"])


@pytest.mark.parametrize(("side", "zero"), [("base", (True, False)), ("tuned", (False, True))])
def test_a_weight_of_zeros_has_no_directions(side: str, zero: tuple[bool, bool]) -> None:
    states = [{"a.weight": torch.zeros(6, 5) if is_zero else torch.randn(6, 5)} for is_zero in zero]
    result = find_intruders(*states, side="both")
    (row,) = result.matrices.to_dict("records")
    assert row["status"] == "compared" and f"the {side} weight is all zero" in row["note"]
    assert pd.isna(row["left_intruders"]) and pd.isna(row["right_intruders"]) and result.triplets.empty
    assert spectra.compare(*states).layers["intruders"].isna().all()


def test_the_command_says_what_was_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    W = {"a.weight": torch.randn(8, 6), "b.weight": torch.randn(8, 4)}
    tuned = {"a.weight": W["a.weight"] + torch.randn(8, 6), "b.weight": torch.full((8, 4), torch.nan)}
    show(find_intruders(W, tuned, k=5000), top=1)
    printed = " ".join(capsys.readouterr().out.split())
    assert "among all left directions (at most 6 of a matrix)" in printed and "of 1 matrix (" in printed
    show(find_intruders(W, tuned, k=6), top=1)
    assert "among the top 6 left directions" in capsys.readouterr().out


def test_pictures_of_both_sides_show_both(example: Intrusion, tmp_path: Path) -> None:
    draw(example, tmp_path)
    one = find_intruders({"a.weight": torch.eye(6)}, {"a.weight": torch.randn(6, 6)}, k=3)
    draw(one, tmp_path / "one")
    for name in ("intruders_epsilon.png", "intruders_k.png"):
        both, single = (plt.imread(folder / name).shape[1] for folder in (tmp_path, tmp_path / "one"))
        assert both == 2 * single


def test_a_comparison_says_how_many_only_spread_and_what_was_solved_in_full() -> None:
    """The sentences read the columns, of which an older result has no `spread_intruders`."""
    planted = Planted(4, 272, 80)
    left, right = (side[:, CLUSTER].sum(axis=1) / np.sqrt(8) for side in (planted.U, planted.V))
    planted.add(left, right, 5.0)
    planted.add(planted.weak(planted.U, 0), planted.weak(planted.V, 0), 29.5)
    base, tuned = ({"a.weight": torch.from_numpy(X).float()} for X in (planted.W, planted.tuned))
    result = spectra.compare(base, {"1": tuned, "2": tuned}, top=6)
    assert result.layers["intruders"].tolist() == [2, 2]
    layers = result.layers.assign(
        spread_intruders=1, tuned_algorithm=["gram64", "gesdd64"], rows=[272, 1000], columns=[80, 80]
    )
    now = dataclasses.replace(result, layers=layers)
    said = [str(each) for each in now.diagnosis() if each.tuned == "2"]
    assert any("; 1 of them only spread over a cluster of base directions" in each for each in said)
    assert any("of 1 matrix (a.weight) are from a full SVD of the tuned weight" in each for each in said)
    assert not any("full SVD" in str(each) for each in now.diagnosis() if each.tuned == "1")
    course = now.in_sequence({})
    assert course.sequence()["spread_intruders"].tolist() == [1, 1]
    assert any("and 1 of them only spread over clusters" in str(each) for each in course.diagnosis())
    older = dataclasses.replace(result, layers=result.layers.drop(columns="spread_intruders", errors="ignore"))
    assert not any("spread" in str(each) for each in older.diagnosis())
    assert older.in_sequence({}).sequence()["spread_intruders"].isna().all()


@pytest.mark.parametrize("shape", [(72, 80), (900, 80)])  # solved in stacks, and alone
def test_a_comparison_counts_those_that_only_spread(shape: tuple[int, int]) -> None:
    planted = Planted(4, *shape)
    left, right = (side[:, CLUSTER].sum(axis=1) / np.sqrt(8) for side in (planted.U, planted.V))
    planted.add(left, right, 5.0)
    planted.add(planted.weak(planted.U, 0), planted.weak(planted.V, 0), 29.5)
    base, tuned = ({"a.weight": torch.from_numpy(X).float()} for X in (planted.W, planted.tuned))
    rows = spectra.compare(base, tuned).layers
    assert rows[["intruders", "spread_intruders"]].values.tolist() == [[2, 1]]
    assert planted.found("left").intruders["spread"].sum() == 1
    same = spectra.compare(base, {"a.weight": base["a.weight"].clone()}).layers
    assert same["spread_intruders"].tolist() == [0]


def steep(values: Array, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A base, and a tuned weight of these singular values and of unrelated vectors."""
    generator = np.random.default_rng(7)
    d = len(values)
    W, tuned = (
        (orthonormal(generator, d, d) * s) @ orthonormal(generator, d, d).T for s in (np.linspace(1, 0.1, d), values)
    )
    return {"a.weight": torch.from_numpy(W).to(dtype)}, {"a.weight": torch.from_numpy(tuned).to(dtype)}


def test_what_is_zero_to_rounding_follows_the_digits_of_the_weights() -> None:
    """Singular values 1, 0.1, ... 1e-9: all of them are known in float64, and the last three no more in float32."""
    values = 10.0 ** -np.minimum(np.arange(60.0), 9)
    base, tuned = steep(values)
    expected = best_matches(base["a.weight"].numpy(), tuned["a.weight"].numpy())
    wide = find_intruders(base, tuned)
    assert wide.triplets["index"].tolist() == list(range(10)) and not wide.provenance["notes"]
    np.testing.assert_allclose(
        wide.triplets["best_cosine"][:9], [match.best_cosine for match in expected][:9], atol=1e-5
    )
    assert len(wide.intruders) == sum(match.best_cosine < 0.5 for match in expected) == 10
    narrow = find_intruders(*steep(values, torch.float32))
    assert narrow.triplets["index"].tolist() == list(range(7))
    assert narrow.matrices["note"].tolist() == ["3 of 10 leading triplets are zero to rounding and have no direction"]
    assert narrow.provenance["notes"][-1] == (
        "3 leading triplets of 1 matrix are zero to rounding and have no direction"
    )


@pytest.mark.parametrize("size", [60, 300])  # solved in stacks, and alone
@pytest.mark.parametrize("dtypes", list(product((torch.float32, torch.float64), repeat=2)))
def test_a_comparison_knows_the_same_directions(size: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    pair = steep(10.0 ** -np.minimum(np.arange(float(size)), 9), torch.float64)
    base, tuned = ({k: X.to(dtype) for k, X in state.items()} for state, dtype in zip(pair, dtypes, strict=True))
    (count,) = find_intruders(base, tuned).matrices["left_intruders"]
    assert spectra.compare(base, tuned).layers["intruders"].tolist() == [count]


def test_reach_is_of_the_matrices_and_not_of_what_was_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """60 x 60, of which three of ten directions are rounding: not "at most 7 of a matrix"."""
    result = find_intruders(*steep(10.0 ** -np.minimum(np.arange(60.0), 9), torch.float32))
    assert result.reach == 10 and result.plot.k().lines[0].get_xdata().tolist() == list(range(1, 11))
    show(result, top=1)
    printed = " ".join(capsys.readouterr().out.split())
    assert "among the top 10 left directions" in printed and "at most" not in printed
    assert "3 leading triplets of 1 matrix are zero to rounding" in printed


def test_an_adapter_keeps_what_its_float64_solver_knows(tmp_path: Path) -> None:
    """A base of rank 2 and a new direction of 1e-9 s_0; what is exactly zero has no direction."""
    generator = np.random.default_rng(8)
    U, V = (torch.from_numpy(orthonormal(generator, d, 4)) for d in (40, 30))
    W = (U[:, :2] * torch.tensor([1.0, 0.5]).double()) @ V[:, :2].T
    folder = adapter(tmp_path / "adapter", V[:, 2:3].T.contiguous(), (1e-9 * U[:, 2:3]).contiguous())
    for fast, count in ((False, 3), (True, 2)):
        result = find_intruders({"fc.weight": W}, folder, k=5, fast=fast)
        assert len(result.triplets) == count, fast
        assert result.matrices["note"].str.contains(f"{5 - count} of 5 leading triplets").all()


def commanded(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["intruders", *(str(argument) for argument in arguments)])


def test_the_command_ends_with_what_failed(tmp_path: Path) -> None:
    sound = {name: torch.randn(6, 6) for name in ("a.weight", "b.weight")}
    broken = {name: torch.full((6, 6), torch.nan) for name in sound}
    states = {
        "base": sound,
        "tuned": {name: W + 1 for name, W in sound.items()},
        "some": sound | {"a.weight": broken["a.weight"]},
        "all": broken,
    }
    for name, state in states.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    base, tuned, some, every = (tmp_path / f"{name}.safetensors" for name in states)
    assert commanded(base, tuned).exit_code == 0
    part = commanded(base, some, "--out", tmp_path / "part", "--json")
    assert part.exit_code == 1 and "1 matrix could not be searched: 'a.weight'" in part.stderr
    assert json.loads(part.stdout)["matrices"][0]["status"] == "failed"
    assert len(Intrusion.load(tmp_path / "part").matrices) == 2
    with pytest.raises(SpectraError, match=r"no matrix could be searched.*NaN"):
        CliRunner().invoke(app, ["intruders", str(base), str(every)], catch_exceptions=False)
