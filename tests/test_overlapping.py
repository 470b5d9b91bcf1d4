"""Overlaps between updates: known ones are found, and adapters, dense models and the base are held alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from spectra_cli.overlap import as_plain, show
from torch import Tensor

import spectra
from spectra.definitions import definitions
from spectra.errors import SpectraError
from spectra.overlapping import Overlap, overlap
from spectra.report.wording import number, percent
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
    assert [str(each) for each in result.diagnosis() if "Nothing moved in same" in str(each)]


def of_two(*changes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """A base of two matrices, and a model for each `changes`: the multiples of a fixed update for the two."""
    generator = torch.Generator().manual_seed(3)
    W = {name: torch.randn(M, N, generator=generator) for name in ("fc.weight", "fd.weight")}
    D = {name: torch.randn(M, N, generator=generator) / 10 for name in W}
    return [W, *({n: W[n] + t * D[n] for n, t in zip(W, times, strict=True)} for times in changes)]


def test_a_matrix_that_one_left_alone_counts_in_the_cosine_of_whole_updates() -> None:
    base, a, c = of_two((1, 1), (0, 1))
    result = overlap(base, {"a": a, "c": c}, i=3)
    pair = result.pairs().iloc[-1]
    whole = [torch.cat([(model[name] - base[name]).double().flatten() for name in base]) for model in (a, c)]
    expected = float(whole[0] @ whole[1] / whole[0].norm() / whole[1].norm())
    assert pair["update_cosine"] == pytest.approx(expected, abs=1e-6) and expected < 0.8
    assert pair[["matrices", "first_matrices", "second_matrices"]].tolist() == [1, 2, 1]
    against = result.pairs().iloc[1]
    weights, update = (torch.cat([each.flatten() for each in X.values()]).double() for X in (base, c))
    update = update - weights
    cosine = float(weights @ update / weights.norm() / update.norm())
    assert against["second"] == "c" and against["update_cosine"] == pytest.approx(cosine, abs=1e-6)


def test_updates_of_different_matrices_are_orthogonal() -> None:
    base, a, b = of_two((1, 0), (0, 1))
    result = overlap(base, {"a": a, "b": b}, i=3)
    pair = result.pairs().iloc[-1]
    assert pair[["first", "second", "matrices"]].tolist() == ["a", "b", 0]
    assert pair["update_cosine"] == 0 and np.isnan(pair["left_overlap"])
    assert result.table("update_cosine").loc["a", "b"] == 0
    assert "different matrices (1 and 1 of them)" in str(result.diagnosis()[-1])
    assert "no matrix was moved by two" in result.plot.heatmap("left_overlap").get_title(loc="left")


def test_a_vocabulary_cut_in_one_model_is_not_held_against_the_other() -> None:
    generator = torch.Generator().manual_seed(6)
    base = {"wte.weight": torch.randn(12, 6, generator=generator), "h.0.mlp.c_fc.weight": torch.randn(6, 9)}
    a, b = ({name: W + torch.randn(W.shape, generator=generator) for name, W in base.items()} for _ in range(2))
    b["wte.weight"] = b["wte.weight"][:10]
    pair = overlap(base, {"a": a, "b": b}, i=2).pairs().iloc[-1]
    fc = "h.0.mlp.c_fc.weight"
    assert pair[["matrices", "first_matrices", "second_matrices"]].tolist() == [1, 1, 1]
    assert pair["first_norm"] == pytest.approx(float((a[fc] - base[fc]).norm()))


def test_every_column_of_pairs_has_its_definition(result: Overlap) -> None:
    assert set(result.pairs()) <= set(definitions()) and set(result.matrices) <= set(definitions())


def test_diagnosis_tells_what_a_merge_would_be(result: Overlap) -> None:
    said = {each.tuned: each for each in result.diagnosis()}
    assert "share subspaces for different changes" in str(said["a, b"])
    assert "oppose each other" in str(said["a, c"]) and "cancels" in str(said["a, c"])
    # D_a - D_a / 2 is half as long as D_a, and orthogonal ones would give sqrt(5) / 2 of it.
    assert said["a, c"].numbers["longer"] == pytest.approx(1 / 5**0.5)
    for finding in result.diagnosis():
        for value in finding.numbers.values():
            words = (str(value), *(number(value, digits) for digits in (1, 2, 3)), percent(value))  # type: ignore[arg-type]
            assert any(word in finding.text for word in words), (value, finding.text)
    generator = torch.Generator().manual_seed(4)
    base = {"fc.weight": torch.randn(90, 80, generator=generator)}
    random = {label: {"fc.weight": base["fc.weight"] + torch.randn(90, 80, generator=generator)} for label in "pq"}
    assert "They barely touch" in str(overlap(base, random).diagnosis()[-1])
    agreeing = {"p": random["p"], "q": {"fc.weight": (random["p"]["fc.weight"] + base["fc.weight"]) / 2}}
    assert "share subspaces and agree" in str(overlap(base, agreeing).diagnosis()[-1])


def test_angles_stand_beside_their_nulls_in_the_tables(result: Overlap) -> None:
    pair = result.pairs().set_index(["first", "second"]).loc[("a", "b")]
    assert pair["left_largest_angle"] < 1e-6 < 0.5 < pair["left_largest_angle_null"]
    assert pair["right_smallest_angle"] == pytest.approx(np.pi / 2)
    table = result.table("left_largest_angle")
    assert np.diag(table).tolist() == [0, 0, 0] and table.loc["b", "a"] == pair["left_largest_angle"]
    assert result.plot.heatmap("left_largest_angle").images[0].get_clim() == (0, pytest.approx(np.pi / 2))


def with_a_new_pooler() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Four matrices that moved a little in unlike ways; the pooler was drawn anew, to the same weights in a and b, and
    stayed in c."""
    generator = torch.Generator().manual_seed(5)
    base = {f"h.{at}.weight": torch.randn(30, 30, generator=generator) for at in range(4)}
    pooler = {"pooler.weight": torch.randn(30, 30, generator=generator)}
    head = {"pooler.weight": 5 * torch.randn(30, 30, generator=generator)}
    tuned = {
        label: {name: W + 0.1 * torch.randn(30, 30, generator=generator) for name, W in base.items()} | last
        for label, last in (("a", head), ("b", head), ("c", pooler), ("d", pooler))
    }
    return base | pooler, tuned


def test_whole_updates_count_and_what_stands_apart_is_named_as_compare_does() -> None:
    base, tuned = with_a_new_pooler()
    result = overlap(base, {label: tuned[label] for label in "ab"}, i=3)
    pair, rest = result.pairs().iloc[-1], result.pairs(outliers=False).iloc[-1]
    whole = [torch.cat([(tuned[label][name] - base[name]).double().flatten() for name in base]) for label in "ab"]
    expected = float(whole[0] @ whole[1] / whole[0].norm() / whole[1].norm())
    assert pair["update_cosine"] == pytest.approx(expected, abs=1e-6) and expected > 0.9
    assert abs(rest["update_cosine"]) < 0.1
    assert pair[["matrices", "apart", "left_out"]].tolist() == [5, 1, 0]
    assert rest[["matrices", "apart", "left_out"]].tolist() == [4, 1, 1]
    assert result.table("update_cosine").loc["a", "b"] == pair["update_cosine"]
    assert result.table("update_cosine", outliers=False).loc["a", "b"] == rest["update_cosine"]
    said = result.diagnosis()
    named = [each for each in said if "newly initialised" in str(each)]
    assert [each.matrices for each in named] == [["pooler.weight"]] * 2
    assert "The two tell different things. Of the whole: They share subspaces and agree" in str(said[-1])
    assert "Without what stands apart: They barely touch" in str(said[-1])
    apart = spectra.compare(base, {label: tuned[label] for label in "ab"}).diagnosis()
    assert ["pooler.weight"] in [each.matrices for each in apart]
    for finding in said:
        for value in finding.numbers.values():
            words = (str(value), *(number(value, digits) for digits in (1, 2, 3)), percent(value))  # type: ignore[arg-type]
            assert any(word in finding.text for word in words), (value, finding.text)


def test_only_pairs_with_a_model_in_which_a_matrix_stands_apart_can_leave_it_out() -> None:
    base, tuned = with_a_new_pooler()
    result = overlap(base, {label: tuned[label] for label in "acd"}, i=3)
    without = result.pairs(outliers=False).set_index(["first", "second"])["left_out"]
    assert without.to_dict() == {
        ("base", "a"): 1, ("base", "c"): 0, ("base", "d"): 0, ("a", "c"): 1, ("a", "d"): 1, ("c", "d"): 0,
    }  # fmt: skip
    by_pair = {each.tuned: str(each) for each in result.diagnosis()}
    assert "Without 1 matrix that stands apart" in by_pair["a, c"]
    assert "stands apart" not in by_pair["c, d"] and "all pairs" not in " ".join(by_pair.values())


def opposed_in_what_moved_most(strength: float, rest: float) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(6)
    base = {name: torch.randn(40, 40, generator=generator) for name in ("a.weight", "b.weight")}
    D = torch.randn(40, 40, generator=generator)
    tuned = {
        label: {"a.weight": base["a.weight"] + rest * D, "b.weight": base["b.weight"] + sign * strength * D}
        for label, sign in (("x", 1), ("y", -1))
    }
    return base, tuned


def test_verdicts_of_the_whole_and_of_the_rest_stand_side_by_side(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They oppose each other in nearly all that moved, half of a matrix's norm, and agree in the rest."""
    result = overlap(*opposed_in_what_moved_most(0.5, 0.01), i=3)
    assert result.pairs().iloc[-1]["update_cosine"] < -0.99
    said = str(result.diagnosis()[-1])
    assert (
        "have cosine -1.0" in said
        and "Without 1 matrix that stands apart, with 100% of ||D||^2, the cosine is 1.0" in said
    )
    assert "Of the whole: They share subspaces and oppose each other" in said
    assert "Without what stands apart: They share subspaces and agree" in said
    assert not any("newly initialised" in str(each) for each in result.diagnosis())  # at half of its norm
    show(result)
    assert "without 1 that stands apart" in capsys.readouterr().out
    plain = json.loads(json.dumps(as_plain(result)))
    assert plain["pairs"][-1]["update_cosine"] < -0.99 < 0.99 < plain["pairs_without_outliers"][-1]["update_cosine"]
    # Where nothing stands apart, whole updates are judged; and so where both come to the same.
    assert "oppose each other" in str(overlap(*opposed_in_what_moved_most(0.5, 0.1), i=3).diagnosis()[-1])
    base, tuned = opposed_in_what_moved_most(0.5, -0.01)
    tuned["y"]["a.weight"] = 2 * base["a.weight"] - tuned["x"]["a.weight"]
    both = str(overlap(base, tuned, i=3).diagnosis()[-1])
    assert "stands apart" in both and "oppose each other" in both


def test_signs_are_shared_among_the_entries_that_both_moved() -> None:
    """Ten entries of a large matrix, alike; all of a small one, opposed: 10 of 2510 agree."""
    generator = torch.Generator().manual_seed(7)
    base = {
        "a.weight": torch.randn(200, 200, generator=generator),
        "b.weight": torch.randn(50, 50, generator=generator),
    }
    tuned = {label: {name: W.clone() for name, W in base.items()} for label in "xy"}
    for label, sign in (("x", 1), ("y", -1)):
        tuned[label]["a.weight"][0, :10] += 1
        tuned[label]["b.weight"] += 0.02 * sign
    result = overlap(base, tuned, i=1)
    pair = result.pairs().iloc[-1]
    assert pair["sign_agreement"] == pytest.approx(10 / 2510) and pair["shared_entries"] == 2510
    assert row(result, "x", "y")["shared_entries"] == 10
    assert "move the same way 0.40% of the 2510 entries that both moved" in str(result.diagnosis()[-1])
    aside = {"p": {"a.weight": base["a.weight"].clone()}, "q": {"a.weight": base["a.weight"].clone()}}
    aside["p"]["a.weight"][0] += 1
    aside["q"]["a.weight"][1] += 1
    none = overlap({"a.weight": base["a.weight"]}, aside, i=1)
    assert np.isnan(none.pairs().iloc[-1]["sign_agreement"]) and "moved no entry both" in str(none.diagnosis()[-1])


def test_a_base_of_zeros_has_no_directions_and_its_update_a_size() -> None:
    base = {"fc.weight": torch.zeros(6, 5), "fd.weight": torch.randn(6, 5)}
    tuned = {label: {name: W + torch.randn(6, 5) for name, W in base.items()} for label in "ab"}
    result = overlap(base, tuned, i=2)
    first = row(result, "base", "a")
    assert first["status"] == "compared" and "all zero" in first["note"] and np.isnan(first["left_overlap"])
    assert first["second_norm"] == pytest.approx(float(tuned["a"]["fc.weight"].norm()))
    assert result.pairs()["matrices"].tolist() == [2, 2, 2]
    assert result.pairs()["left_overlap"].notna().all()


def test_a_cosine_of_zero_is_drawn_white_and_beside_what_chance_does(result: Overlap) -> None:
    ax = result.plot.heatmap("update_cosine")
    (image,) = ax.images
    low, white, high = (image.cmap(image.norm(value))[:3] for value in (-1, 0, 1))
    assert min(white) > 0.95 and low[2] > low[0] and high[0] > high[2]
    null = result.pairs()["update_cosine_null"].iloc[-1]
    assert f"0 +- {number(null, 1)}" in ax.get_title(loc="left")
    assert [text.get_color() for text in ax.texts][:3] == ["white", "black", "white"]


def test_pictures(result: Overlap) -> None:
    ax = result.plot.heatmap("update_cosine")
    assert [float(text.get_text()) for text in ax.texts] == pytest.approx([1, 0, -1, 0, 1, 0, -1, 0, 1], abs=1e-9)
    assert ax.get_title(loc="left")
    grid = result.plot.grid("c_fc", "a", "b")
    assert grid.images[0].get_array().shape == (4, 4)
    with pytest.raises(SpectraError, match="no pair"):
        result.plot.grid("c_fc", "b", "a")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"i": 0}, "at least 1"), ({"j": -1}, "at least 1"), ({"i": 2.5}, "not 2.5"), ({"workers": 0}, "workers")],
)
def test_mistakes_are_one_sentence(family: Family, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpectraError, match=words):
        overlap(state(family.W), family.tuned, **options)


def test_no_model_may_be_called_base(family: Family, result: Overlap) -> None:
    with pytest.raises(SpectraError, match="another label"):
        overlap(state(family.W), {"base": family.tuned["a"]})
    with pytest.raises(SpectraError, match="no column"):
        result.table("left")


def test_a_folder_called_base_gets_another_label(family: Family, tmp_path: Path) -> None:
    paths = [tmp_path / name / "base" / "model.safetensors" for name in ("before", "after")]
    for path, W in zip(paths, (state(family.W), family.tuned["a"]), strict=True):
        path.parent.mkdir(parents=True)
        save_file(W, path)
    result = overlap(paths[0].parent, paths[1].parent, i=2)
    assert result.labels == ["base (2)"]
    assert result.pairs()[["first", "second"]].values.tolist() == [["base", "base (2)"]]


def test_the_command_says_that_nothing_moved(family: Family, capsys: pytest.CaptureFixture[str]) -> None:
    show(overlap(state(family.W), {"same": state(family.W)}))
    assert capsys.readouterr().out.startswith("Nothing moved in same")


def test_the_command_prints_angles_and_what_they_mean(result: Overlap, capsys: pytest.CaptureFixture[str]) -> None:
    show(result)
    printed = capsys.readouterr().out
    pair = result.pairs().set_index(["first", "second"]).loc[("base", "a")]
    assert f"{pair['left_smallest_angle']:.2f}-{pair['left_largest_angle']:.2f} (" in printed
    for finding in result.diagnosis():
        assert str(finding) in " ".join(printed.split())
