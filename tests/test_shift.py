"""Saving a covariance shift, and joining it to a comparison: neither ever mixes the numbers of two shifts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from spectra_cli.output import finish_shift
from torch import Tensor, nn

import spectra
from spectra.errors import SpectraError
from spectra.shift import MATRICES, CovarianceShift

NAME = "fc.weight"


def weights(seed: int, rows: int = 8, columns: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {NAME: torch.randn(rows, columns, generator=generator)}


def moved(base: dict[str, Tensor], seed: int, size: float = 0.05) -> dict[str, Tensor]:
    return {name: W + size * weights(seed, *W.shape)[NAME] for name, W in base.items()}


def module(of: dict[str, Tensor]) -> nn.Module:
    linear = nn.Linear(of[NAME].shape[1], of[NAME].shape[0])
    with torch.no_grad():
        linear.weight.copy_(of[NAME])
        linear.bias.zero_()
    return nn.ModuleDict({"fc": linear})


def on_data(base: dict[str, Tensor], tuned: dict[str, Tensor], **options: bool) -> CovarianceShift:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(20, base[NAME].shape[1], generator=generator)
    return spectra.covariance_shift(
        module(base), module(tuned), [x], forward=lambda model, batch: model["fc"](batch), functional=False, **options
    )


def test_a_shift_of_matrices_of_another_size_is_refused() -> None:
    base, small = weights(1), weights(1, 3, 3)
    comparison = spectra.compare(base, moved(base, 2))
    for shift in (spectra.covariance_shift(small, moved(small, 2)), on_data(small, moved(small, 2))):
        with pytest.raises(SpectraError, match="8 x 6 in the comparison and 3 x 3 in the shift"):
            comparison.join(shift)


def test_a_shift_of_another_base_is_refused() -> None:
    base, other = weights(1), weights(3)
    other[NAME] *= base[NAME].norm() / other[NAME].norm()
    update = 0.01 * weights(2)[NAME]
    comparison = spectra.compare(base, {NAME: base[NAME] + update})
    with pytest.raises(SpectraError, match="other singular values in the base"):
        comparison.join(spectra.covariance_shift(other, {NAME: other[NAME] + update}))


@pytest.mark.parametrize("size", [1e-4, 0.05, 2.0])
@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (40, 40)])
def test_a_shift_of_another_tuned_model_is_refused(size: float, shape: tuple[int, int]) -> None:
    base = weights(1, *shape)
    one, two = moved(base, 2, size), moved(base, 3, size)
    comparison = spectra.compare(base, {"one": one, "two": two})
    shift = spectra.covariance_shift(base, two)
    with pytest.raises(SpectraError, match=r"comparison of 'one'.*moved otherwise"):
        comparison.join(shift, "one")
    assert comparison.join(shift, "two").components["shift_diagonal"].notna().any()


def test_data_do_not_hide_other_weights_of_the_same_sizes() -> None:
    base, other = weights(1), weights(5)
    comparison = spectra.compare(base, moved(base, 2, 0.3))
    with pytest.raises(SpectraError, match="has the base_norm"):
        comparison.join(on_data(other, moved(other, 2, 0.3)))
    with pytest.raises(SpectraError, match="has the update_norm"):
        comparison.join(on_data(base, moved(base, 2, 0.5)))
    joined = comparison.join(on_data(base, moved(base, 2, 0.3)))
    assert joined.layers["base_norm"].equals(comparison.layers["base_norm"])


def test_a_weight_that_the_comparison_says_is_unchanged_cannot_have_moved() -> None:
    base = weights(1)
    comparison = spectra.compare(base, {"same": base, "moved": moved(base, 2)})
    with pytest.raises(SpectraError, match="unchanged in the comparison and moved in the shift"):
        comparison.join(on_data(base, moved(base, 2)), "same")
    comparison.join(on_data(base, moved(base, 2)), "moved")
    comparison.join(on_data(base, base), "same")


def test_the_same_models_join_whatever_their_storage_and_degeneracy() -> None:
    base = weights(1, 30, 30)
    half = {NAME: base[NAME].bfloat16()}
    cases = [
        ((base, moved(base, 2)), (half, {NAME: moved(base, 2)[NAME].bfloat16()})),
        (({NAME: torch.eye(6)}, {NAME: torch.diag(torch.arange(6.0))}),) * 2,
        (({NAME: torch.zeros(4, 4)}, {NAME: torch.ones(4, 4)}),) * 2,
    ]
    for compared, shifted in cases:
        joined = spectra.compare(*compared).join(spectra.covariance_shift(*shifted))
        assert joined.layers["shift_norm"].notna().all()


def test_what_is_no_shift_and_whose_it_is_are_asked_for_in_words() -> None:
    base = weights(1)
    comparison = spectra.compare(base, {"one": moved(base, 2), "two": moved(base, 3)})
    with pytest.raises(SpectraError, match="join takes the result of covariance_shift, not int"):
        comparison.join(5, "one")  # type: ignore[arg-type]
    with pytest.raises(SpectraError, match="--join-label"):
        comparison.join(spectra.covariance_shift(base, moved(base, 2)))


def test_a_loaded_shift_never_reads_the_matrices_of_another(tmp_path: Path) -> None:
    base = weights(1)
    first, second = (spectra.covariance_shift(base, moved(base, seed)) for seed in (2, 3))
    loaded = CovarianceShift.load(first.save(tmp_path, matrices="*"))
    assert torch.equal(loaded.matrix(NAME), first.matrix(NAME))
    second.save(tmp_path, matrices="*")
    with pytest.raises(SpectraError, match="cannot be read"):
        loaded.matrix(NAME)
    assert torch.equal(CovarianceShift.load(tmp_path).matrix(NAME), second.matrix(NAME))


def test_saving_a_loaded_shift_over_itself_forgets_nothing(tmp_path: Path) -> None:
    base = weights(1)
    shift = spectra.covariance_shift(base, moved(base, 2))
    loaded = CovarianceShift.load(shift.save(tmp_path, matrices="*"))
    loaded.save(tmp_path)
    for one in (loaded, CovarianceShift.load(tmp_path)):
        assert torch.equal(one.matrix(NAME), shift.matrix(NAME))


def test_saving_leaves_no_matrices_of_an_earlier_shift(tmp_path: Path) -> None:
    base = weights(1)
    first, second = (spectra.covariance_shift(base, moved(base, seed)) for seed in (2, 3))
    first.save(tmp_path, matrices="*")
    assert len(list((tmp_path / MATRICES).iterdir())) == 1
    second.save(tmp_path)
    assert not list((tmp_path / MATRICES).iterdir())


def test_pictures_of_an_earlier_shift_do_not_stay_beside_new_tables(tmp_path: Path) -> None:
    base = weights(1)
    first, second = (spectra.covariance_shift(base, moved(base, seed)) for seed in (2, 3))

    def finish(result: CovarianceShift, pictures: bool) -> list[str]:
        finish_shift(result, out=tmp_path, pictures=pictures, as_json=False, quiet=True, top=5, matrices=("*",))
        return sorted(path.name for path in (tmp_path / "shift_pictures").glob("*.png"))

    drawn = finish(first, pictures=True)
    assert drawn
    assert finish(CovarianceShift.load(tmp_path), pictures=False) == drawn  # the same shift, shown again
    assert finish(second, pictures=False) == []
