"""The sentences: their numbers are those of the tables, outliers are named and kept out, none is made from nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import spectra
from spectra.comparison import Comparison
from spectra.report import summary
from spectra.report.diagnosis import Finding
from spectra.report.sections import left_out_sentences
from spectra.report.wording import number, percent
from tests.report.made_weights import changed, noise, weights

POOLER = "bert.pooler.dense.weight"


def about(result: Comparison, words: str, tuned: str | None = None) -> Finding:
    """The only finding that has `words` in its text."""
    found = [each for each in result.diagnosis() if words in each.text and tuned in (None, each.tuned)]
    assert len(found) == 1, [each.text for each in result.diagnosis()]
    return found[0]


def test_every_number_is_written_in_its_sentence(two: Comparison, failing: Comparison) -> None:
    for result in (two, failing):
        for finding in result.diagnosis():
            for key, value in finding.numbers.items():
                forms = {str(value)} if isinstance(value, str) else {number(value), percent(value), str(value)}
                assert any(form in finding.text for form in forms), (key, value, finding.text)


def test_an_outlier_is_named_and_left_out_of_the_sums(two: Comparison) -> None:
    layers = two.layers[two.layers["tuned"] == "a"]
    rest = layers[layers["name"] != POOLER]
    outlier = about(two, "times its own norm")
    assert outlier.matrices == [POOLER]
    assert outlier.numbers["relative_update"] == layers.set_index("name").loc[POOLER, "relative_update"]
    assert outlier.numbers["median_of_the_rest"] == rest["relative_update"].median()
    pooled = np.sqrt((rest["update_norm"] ** 2).sum() / (rest["base_norm"] ** 2).sum())
    assert about(two, "of the base in norm over", "a").numbers["relative_update"] == pytest.approx(pooled, rel=1e-12)


def test_a_model_that_moved_much_everywhere_has_no_outliers() -> None:
    base = weights()
    result = spectra.compare(base, {"new": weights(seed=5)})
    assert (result.layers["relative_update"] > 1).all()
    assert not summary.is_outlier(result.layers).any()
    assert "trained anew" in about(result, "of the base in norm over").text


def test_depth_says_where(two: Comparison) -> None:
    assert "strongest late" in about(two, "Over depth", "b").text
    rows = two.layers[(two.layers["tuned"] == "b") & (two.layers["layer"] == 3)]
    late = np.sqrt((rows["update_norm"] ** 2).sum() / (rows["base_norm"] ** 2).sum())
    assert about(two, "Over depth", "b").numbers["late"] == pytest.approx(late, rel=1e-12)


def test_a_rescaled_model_is_called_so() -> None:
    base = weights()
    result = spectra.compare(base, {"shrunk": changed(base, lambda _, weight: 0.9 * weight)})
    finding = about(result, "changes of the singular values")
    assert finding.numbers["diagonal_share"] == pytest.approx(1, abs=1e-5)
    assert "rescaling" in finding.text
    assert about(result, "mostly shrank").numbers["shrank_share"] == 1


def test_a_random_update_is_called_chance(two: Comparison) -> None:
    finding = about(two, "changes of the singular values", "a")
    assert finding.numbers["diagonal_enrichment"] == pytest.approx(1, abs=0.3)
    assert "close to chance" in finding.text


def test_the_leading_end_is_named_where_it_carries_the_update() -> None:
    def top(_: str, weight: torch.Tensor) -> torch.Tensor:
        U, S, V = torch.linalg.svd(weight, full_matrices=False)
        return weight + 0.2 * S[0] * (U[:, :2] @ torch.randn(2, 2) @ V[:2])

    base = weights()
    finding = about(spectra.compare(base, {"top": changed(base, top)}), "The leading")
    assert finding.numbers["leading_share"] == pytest.approx(1, abs=1e-4)
    assert "leading directions" in finding.text


def test_a_merged_adapter_is_recognised_by_its_rank() -> None:
    generator = torch.Generator().manual_seed(3)

    def merged(_: str, weight: torch.Tensor) -> torch.Tensor:
        rows, columns = weight.shape
        D = torch.randn(rows, 3, generator=generator).double() @ torch.randn(3, columns, generator=generator).double()
        return weight.double() + 0.05 * D

    base = weights()
    result = spectra.compare({name: weight.double() for name, weight in base.items()}, {"lora": changed(base, merged)})
    finding = about(result, "merged LoRA of rank 3")
    assert finding.numbers["adapter_rank"] == 3
    full = spectra.compare(base, {"full": changed(base, noise(0.05))})
    assert not any("LoRA of rank" in each.text for each in full.diagnosis())


def test_intruders_are_counted_over_all_matrices(two: Comparison) -> None:
    rows = two.layers[two.layers["tuned"] == "a"]
    finding = about(two, "intruder dimension", "a")
    assert finding.numbers["intruders"] == rows["intruders"].sum() > 0
    assert finding.numbers["matrices_with_intruders"] == (rows["intruders"] > 0).sum()
    assert set(finding.matrices) == set(rows["name"][rows["intruders"] > 0])
    assert finding.numbers["lowest_best_cosine"] == rows["lowest_best_cosine"].min()
    assert "2410.21228" in finding.text


def test_no_intruders_are_said_without_the_warning() -> None:
    base = weights()
    finding = about(spectra.compare(base, {"t": changed(base, noise(0.001))}), "intruder dimension")
    assert finding.numbers["intruders"] == 0
    assert "forgetting" not in finding.text


def test_options_of_the_comparison_stand_in_the_sentences() -> None:
    base = weights()
    result = spectra.compare(base, {"t": changed(base, noise(0.3))}, top=4, epsilon=0.7)
    assert "top-4" in about(result, "intruder dimension").text
    assert "0.7" in about(result, "intruder dimension").text


def test_rounding_is_warned_of() -> None:
    stored = {name: weight.bfloat16() for name, weight in changed(weights(), noise(0.002)).items()}
    result = spectra.compare({name: weight.bfloat16() for name, weight in weights().items()}, {"t": stored})
    finding = about(result, "rounding")
    assert finding.numbers["below_rounding_floor"] == result.layers["below_rounding_floor"].sum() > 0


def test_unchanged_and_failed_matrices_are_counted(failing: Comparison) -> None:
    assert about(failing, "bit-identical").matrices == ["bert.encoder.layer.0.attention.self.query.weight"]
    assert about(failing, "could not be measured").matrices == ["bert.encoder.layer.1.intermediate.dense.weight"]


def test_nothing_moved(unchanged: Comparison) -> None:
    assert [each.text.split(":")[0] for each in unchanged.diagnosis()] == ["Nothing moved"]


def test_two_models_are_held_against_each_other(two: Comparison) -> None:
    finding = about(two, "moved furthest")
    assert finding.tuned == "a, b"
    assert finding.text.index("b by") < finding.text.index("a by")
    swapped = dataclasses.replace(two, provenance={"tuned": {"b": {}, "a": {}}})
    assert finding.numbers == about(swapped, "moved furthest").numbers


def test_sparse_comparisons_have_sentences_or_none(odd: Comparison) -> None:
    for finding in odd.diagnosis():
        assert "\x1b" not in finding.text
        if "failed" not in finding.numbers:  # which gives the reason, a NaN
            assert "nan" not in finding.text.lower()


def rotated(size: float, side: int = 128) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two matrices before and after a rotation of their output space, which changes no singular value."""
    generator = torch.Generator().manual_seed(4)
    base = {f"l{i}.weight": torch.randn(side, side, generator=generator) for i in range(2)}
    K = torch.randn(side, side, generator=generator)
    Q = torch.linalg.matrix_exp(size * (K - K.T))
    return base, {name: Q @ weight for name, weight in base.items()}


@pytest.mark.parametrize("size", [0.001, 0.01, 0.03])
def test_a_rotation_does_not_change_singular_values(size: float) -> None:
    base, tuned = rotated(size)
    result = spectra.compare(base, {"rotated": tuned})
    assert result.layers["spectral_shift"].max() < 1e-6
    text = about(result, "singular values moved by").text
    assert "more than chance would have it" not in text
    assert "were kept" in text or "were held" in text
    assert not any("mostly shrank" in each.text or "weight decay" in each.text for each in result.diagnosis())


def test_weight_decay_is_recognised_beneath_a_rotation() -> None:
    base, tuned = rotated(0.01)
    result = spectra.compare(base, {"both": {name: 0.9 * weight for name, weight in tuned.items()}})
    finding = about(result, "mostly shrank")
    assert finding.numbers["shrank_share"] == finding.numbers["negative_diagonal_share"] == 1
    assert "weight decay" in finding.text


def test_the_sign_of_a_change_is_that_of_the_singular_values() -> None:
    """A rotation with a smaller growth: C_ii < 0 at second order, and yet every singular value grew."""
    base, tuned = rotated(0.03)
    result = spectra.compare(base, {"t": {name: 1.05 * weight for name, weight in tuned.items()}})
    assert (result.components["diagonal"] < 0).mean() > 0.9
    assert about(result, "mostly grew").numbers["grew_share"] == 1


def test_a_fast_comparison_speaks_of_what_it_knows() -> None:
    base, tuned = rotated(0.01, side=160)  # what is smaller is never iterated
    result = spectra.compare(base, {"t": {name: 0.9 * weight for name, weight in tuned.items()}}, fast=True)
    assert result.layers["spectral_shift"].isna().all()
    finding = about(result, "mostly shrank")
    assert finding.numbers["components"] == result.components["tuned_singular_value"].notna().sum() < 320
    assert "leading components" in finding.text


def test_what_is_all_zero_is_named_and_not_called_retrained() -> None:
    base = weights()
    tuned = changed(base, noise(0.05))
    born, dead = "bert.encoder.layer.0.attention.self.query.weight", POOLER
    base[born], tuned[dead] = torch.zeros(24, 24), torch.zeros(24, 24)
    result = spectra.compare(base, {"t": tuned})
    finding = about(result, "all zero")
    assert finding.matrices == [born, dead]
    others = [each for each in result.diagnosis() if each != finding]
    assert not any({born, dead} & set(each.matrices) for each in others)
    assert not any("retrained" in each.text or "trained anew" in each.text for each in others)
    assert about(result, "of the base in norm over").numbers["relative_update"] < 0.06
    assert about(result, "intruder dimension").numbers["matrices"] == len(base) - 2


def test_each_failure_has_its_own_reason(two: Comparison) -> None:
    layers = two.layers[two.layers["tuned"] == "a"].copy()
    notes = ["'x' holds NaN", "'y' holds NaN", "no solver converged", "", "out of memory"]
    layers.iloc[: len(notes), layers.columns.get_loc("status")] = "failed"
    layers.iloc[: len(notes), layers.columns.get_loc("note")] = notes
    result = dataclasses.replace(two, layers=layers, provenance={})
    names = list(layers["name"])
    finding = about(result, "could not be measured")
    assert f"{names[0]}, {names[1]} ('x' holds NaN)" in finding.text
    assert f"{names[2]} (no solver converged)" in finding.text
    assert "1 other reason" in finding.text
    assert [each.split(" - ")[0] for each in left_out_sentences(result, "a")] == ["failed: out of memory"]


def test_an_adapter_is_not_called_trained_anew() -> None:
    base = weights()
    result = spectra.compare(base, {"new": weights(seed=5)})
    adapter = dataclasses.replace(result, layers=result.layers.assign(update_form="low rank"))
    text = about(adapter, "of the base in norm over").text
    assert "more than the base itself" in text
    assert "trained anew" not in text


def test_a_finding_is_its_sentence(two: Comparison) -> None:
    finding = two.diagnosis()[0]
    assert str(finding) == finding.text


def test_measures_keep_their_digits_and_counts_have_none() -> None:
    assert [number(1.0), number(0.9999), number(5.0, 2), number(12), percent(0.05)] == [
        "1.00",
        "1.00",
        "5.0",
        "12",
        "5.0%",
    ]


def test_real_weights(real: Comparison) -> None:
    """Known of this pair: 12 intruders in 3 matrices and 63 in 20; the pooler moved by 2.6 and 4.8 times its norm."""
    for tuned, moved, intruders, hit in (("10k", 2.61, 12, 3), ("ft", 4.83, 63, 20)):
        assert about(real, "times its own norm", tuned).numbers["relative_update"] == pytest.approx(moved, abs=0.005)
        numbers = about(real, "intruder dimension", tuned).numbers
        assert (numbers["intruders"], numbers["matrices_with_intruders"]) == (intruders, hit)
    assert "weight decay" in about(real, "mostly shrank", "ft").text
