"""Overlaps between updates: known ones are found, and adapters, dense models and the base are held alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spectra.errors import SpectraError
from spectra.overlapping import Overlap, overlap
from tests.reference import subspaces as reference
from tests.reference.singular import svd
from tests.strategies import orthonormal

M, N = 40, 28


def state(W: np.ndarray) -> dict[str, Tensor]:
    return {"h.0.mlp.c_fc.weight": torch.from_numpy(W), "norm.weight": torch.ones(3)}


class Family:
    """A base; `a` and `b` that write into the same outputs from different inputs; `c`, which undoes half of `a`."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.W = generator.normal(size=(M, N))
        U, V = orthonormal(generator, M, 12), orthonormal(generator, N, 12)
        s = np.linspace(2, 1, 4)
        self.D = {"a": (U[:, :4] * s) @ V[:, :4].T, "b": (U[:, :4] * s) @ V[:, 4:8].T}
        self.D["c"] = -0.5 * self.D["a"]
        self.tuned = {label: state(self.W + D) for label, D in self.D.items()}


@pytest.fixture(scope="module")
def family() -> Family:
    return Family()


@pytest.fixture(scope="module")
def result(family: Family) -> Overlap:
    return overlap(state(family.W), family.tuned, i=4)


def row(result: Overlap, first: str, second: str) -> dict[str, Any]:
    table = result.matrices
    found: dict[str, Any] = table[(table["first"] == first) & (table["second"] == second)].iloc[0].to_dict()
    return found


def test_known_relations_are_found(result: Overlap) -> None:
    ab, ac = row(result, "a", "b"), row(result, "a", "c")
    assert ab["left_overlap"] == pytest.approx(1) and ab["left_largest_angle"] < 1e-6
    assert ab["right_overlap"] == pytest.approx(0, abs=1e-12) and ab["right_smallest_angle"] == pytest.approx(np.pi / 2)
    assert ab["update_cosine"] == pytest.approx(0, abs=1e-12)
    assert ac["left_overlap"] == pytest.approx(1) and ac["right_overlap"] == pytest.approx(1)
    assert ac["update_cosine"] == pytest.approx(-1) and ac["sign_agreement"] == 0
    assert ab["left_overlap_null"] == 4 / M and ab["right_overlap_null"] == 4 / N


@pytest.mark.parametrize(("first", "second"), [("base", "a"), ("base", "b"), ("a", "b")])
def test_numbers_equal_the_reference(result: Overlap, family: Family, first: str, second: str) -> None:
    one, other = (svd(family.W if label == "base" else family.D[label]) for label in (first, second))
    X, Y = (family.W if label == "base" else family.D[label] for label in (first, second))
    found = row(result, first, second)
    for side, A, B in (("left", one.U, other.U), ("right", one.V, other.V)):
        assert found[f"{side}_overlap"] == pytest.approx(reference.phi(A, B, 4, 4), abs=1e-9)
        expected = reference.angles(A[:, :4], B[:, :4])
        assert [found[f"{side}_{end}_angle"] for end in ("smallest", "largest")] == pytest.approx(
            [expected[0], expected[-1]], abs=1e-6
        )
        grid = result.grids.query("first == @first and second == @second and side == @side")
        for _, cell in grid.iterrows():
            phi = reference.phi(A, B, cell["i"], cell["j"])
            assert cell["overlap"] == pytest.approx(phi, abs=1e-6)
            assert cell["overlap_null"] == max(cell["i"], cell["j"]) / (M if side == "left" else N)
    assert found["update_cosine"] == pytest.approx((X * Y).sum() / np.linalg.norm(X) / np.linalg.norm(Y), abs=1e-9)
    assert found["sign_agreement"] == pytest.approx((np.sign(X) == np.sign(Y)).mean(), abs=1e-9)


def test_independent_updates_show_the_nulls() -> None:
    generator = np.random.default_rng(1)
    W = {f"h.{at}.mlp.c_fc.weight": torch.from_numpy(generator.normal(size=(60, 50))) for at in range(12)}
    tuned = {label: {n: w + torch.from_numpy(generator.normal(size=(60, 50))) for n, w in W.items()} for label in "pq"}
    pair = overlap(W, tuned, i=6).pairs().iloc[-1]
    for side in ("left", "right"):
        assert pair[f"{side}_overlap"] == pytest.approx(pair[f"{side}_overlap_null"], rel=0.25)
    assert abs(pair["update_cosine"]) < 4 * pair["update_cosine_null"]
    assert pair["sign_agreement"] == pytest.approx(0.5, abs=0.02)


def test_the_matrix_of_pairs_is_symmetric_and_saved(result: Overlap, tmp_path: Path) -> None:
    table = result.table("update_cosine")
    assert list(table.index) == list(table.columns) == ["a", "b", "c"]
    np.testing.assert_allclose(table, [[1, 0, -1], [0, 1, 0], [-1, 0, 1]], atol=1e-12)
    again = Overlap.load(result.save(tmp_path))
    assert again.matrices.equals(result.matrices) and again.grids.equals(result.grids)
    assert again.table().equals(result.table()) and again.labels == ["a", "b", "c"]
    assert json.loads((tmp_path / "overlap.json").read_text())["options"]["i"] == 4


def test_adapters_are_held_like_their_merged_weights(tmp_path: Path, family: Family) -> None:
    peft = pytest.importorskip("peft")
    layer = torch.nn.Sequential(torch.nn.Linear(N, M, bias=False)).double()
    layer[0].weight.data = torch.from_numpy(family.W.copy())
    model = peft.get_peft_model(layer, peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)).double()
    model.save_pretrained(tmp_path / "adapter")
    base = {"0.weight": torch.from_numpy(family.W)}
    other = {"0.weight": torch.from_numpy(family.W + family.D["a"])}
    merged = {"0.weight": model.merge_and_unload()[0].weight.detach()}
    results = [overlap(base, {"x": source, "a": other}, i=5) for source in (tmp_path / "adapter", merged)]
    rows = [row(each, "x", "a") for each in results]
    assert rows[0]["first_rank"] == rows[1]["first_rank"] == 3 and rows[0]["second_rank"] == 4
    for name, value in rows[0].items():
        if isinstance(value, float):
            assert value == pytest.approx(rows[1][name], abs=1e-6), name


def test_an_unchanged_matrix_has_no_directions(family: Family) -> None:
    result = overlap(state(family.W), {"a": family.tuned["a"], "same": state(family.W.copy())})
    assert row(result, "base", "same")["status"] == "unchanged"
    assert result.pairs()[["first", "second"]].values.tolist() == [["base", "a"]]
    assert np.isnan(result.table().loc["a", "same"])


def test_pictures(result: Overlap) -> None:
    ax = result.plot.heatmap("update_cosine")
    assert [float(text.get_text()) for text in ax.texts] == pytest.approx([1, 0, -1, 0, 1, 0, -1, 0, 1], abs=1e-9)
    assert ax.get_title(loc="left")
    grid = result.plot.grid("c_fc", "a", "b")
    assert grid.images[0].get_array().shape == (4, 4)
    with pytest.raises(SpectraError, match="no pair"):
        result.plot.grid("c_fc", "b", "a")


@pytest.mark.parametrize(
    ("options", "words"), [({"i": 0}, "at least 1"), ({"j": -1}, "at least 1"), ({"workers": 0}, "workers")]
)
def test_mistakes_are_one_sentence(family: Family, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpectraError, match=words):
        overlap(state(family.W), family.tuned, **options)


def test_no_model_may_be_called_base(family: Family, result: Overlap) -> None:
    with pytest.raises(SpectraError, match="another label"):
        overlap(state(family.W), {"base": family.tuned["a"]})
    with pytest.raises(SpectraError, match="no column"):
        result.table("left")
