"""What is drawn, printed and said of a covariance shift is what its tables hold."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from spectra.errors import SpectraError
from spectra.features.shifting import covariance_shift
from spectra.report.shift_drawing import block_rms
from spectra.report.shift_plots import save_shift_pictures
from spectra.report.shift_sentences import describe
from spectra.report.shift_summary import functional_summary
from spectra.report.shift_tables import print_shift, shift_to_json
from spectra.report.wording import percent
from spectra.shift import CovarianceShift
from tests.report.shifting_models import Net, labelled_batches, tuned_of

NAME = "layers.2.up_proj.weight"


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    backend = mpl.get_backend(auto_select=False)
    mpl.use("agg")
    yield
    pyplot.close("all")
    if backend:
        mpl.use(backend)


@pytest.fixture(scope="module")
def both() -> CovarianceShift:
    """End to end, with a functional check."""
    return covariance_shift(Net(), tuned_of(Net()), labelled_batches(), mode="end_to_end")


@pytest.fixture(scope="module")
def alone() -> CovarianceShift:
    """The same inputs, in the basis of the features."""
    return covariance_shift(Net(), tuned_of(Net()), labelled_batches(), basis="feature", functional=False)


@pytest.fixture(scope="module")
def white() -> CovarianceShift:
    """Without data."""
    return covariance_shift(Net(), tuned_of(Net()))


@pytest.fixture(scope="module")
def still() -> CovarianceShift:
    """Nothing moved."""
    return covariance_shift(Net(), Net(), labelled_batches(), mode="end_to_end")


EVERY_PLOT: tuple[Callable[..., Axes], ...] = (
    lambda plot, ax: plot.profile(NAME, ax=ax),
    lambda plot, ax: plot.heatmap(NAME, ax=ax),
    lambda plot, ax: plot.heatmap(NAME, "inherited", ax=ax),
    lambda plot, ax: plot.depth(ax=ax),
    lambda plot, ax: plot.functional(ax=ax),
    lambda plot, ax: plot.functional("loss_change", ax=ax),
)


@pytest.mark.parametrize("draw", EVERY_PLOT)
def test_every_plot_has_labels_and_a_title_on_axes_new_or_given(
    both: CovarianceShift, draw: Callable[..., Axes]
) -> None:
    given = Figure(figsize=(3.4, 2.6), layout="constrained").add_subplot()
    assert draw(both.plot, given) is given
    assert not pyplot.get_fignums()
    for ax in (given, draw(both.plot, None)):
        assert ax.get_xlabel()
        assert ax.get_ylabel()
        assert 1 <= ax.get_title(loc="left").count("\n") <= 2


def test_profile_draws_the_diagonal_and_its_parts(both: CovarianceShift, alone: CovarianceShift) -> None:
    rows = both.components[both.components["name"] == NAME].sort_values("component")
    ax = both.plot.profile("2.up_proj")
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    np.testing.assert_array_equal(lines["each direction"], rows["normalised_diagonal"])
    own, inherited = (np.asarray(lines[f"{part}, smoothed"]) for part in ("own", "inherited"))
    assert own.sum() != 0
    assert inherited.sum() != 0
    diagonal = rows["normalised_diagonal"].to_numpy()
    gained, lost = (percent(sign * diagonal[sign * diagonal > 0].sum()) for sign in (1, -1))
    assert f"gained {gained}, lost {lost}" in ax.get_title(loc="left")
    assert not any("inherited" in str(line.get_label()) for line in alone.plot.profile(NAME).lines)
    assert "principal direction" in alone.plot.profile(NAME).get_xlabel()


def test_map_shows_delta_off_the_diagonal_over_the_trace(both: CovarianceShift) -> None:
    ax = both.plot.heatmap(NAME)
    grid = np.ma.filled(ax.images[0].get_array(), np.nan)
    expected = both.matrix(NAME).abs().numpy() / float(both.layers.set_index("name").loc[NAME, "variance_base"])
    np.fill_diagonal(expected, np.nan)
    np.testing.assert_allclose(grid, expected, rtol=1e-12)
    stops = sorted(both.slices["stop"][both.slices["name"] == NAME])
    drawn = [line.get_ydata()[0] for line in ax.lines if line.get_ydata()[0] == line.get_ydata()[1]]
    assert drawn == [stop - 0.5 for stop in stops[:-1]]
    off = 1 - float(both.matrix(NAME).diagonal().square().sum() / both.matrix(NAME).square().sum())
    assert f"{100 * off:.3g}%" in ax.get_title(loc="left")


def test_large_maps_are_drawn_in_blocks_that_keep_the_energy() -> None:
    values = np.random.default_rng(0).normal(size=(600, 600))
    blocks = block_rms(values, 256)
    assert blocks.shape == (200, 200)
    assert (blocks**2).mean() == pytest.approx((values**2).mean())
    assert blocks[3, 7] == pytest.approx(np.sqrt((values[9:12, 21:24] ** 2).mean()))


def test_depth_draws_medians_of_the_blocks(both: CovarianceShift) -> None:
    ax = both.plot.depth()
    for column, line in zip(("relative_own", "relative_inherited"), ax.lines, strict=False):
        expected = both.layers[both.layers["layer"].notna()].groupby("layer")[column].median().to_numpy(dtype=float)
        shown = np.asarray(line.get_ydata())
        np.testing.assert_allclose(shown[expected > 0], expected[expected > 0])
    above = (
        both.layers.groupby("layer")["relative_inherited"].median()
        > both.layers.groupby("layer")["relative_own"].median()
    )
    assert f"exceeds own in {int(above.sum())} of 4 layers" in ax.get_title(loc="left")


def test_the_histogram_counts_every_sample(both: CovarianceShift) -> None:
    ax = both.plot.functional()
    assert sum(patch.get_height() for patch in ax.patches) == 128
    mean = both.functional["kl"].mean()
    assert any(line.get_xdata()[0] == pytest.approx(mean) for line in ax.lines)
    assert "KL" in ax.get_xlabel()


def test_what_is_not_there_is_refused(both: CovarianceShift, alone: CovarianceShift) -> None:
    with pytest.raises(SpectraError, match=r"layers\.2\.up_proj"):
        both.plot.profile("layers.2.up_pro")
    with pytest.raises(SpectraError, match="end of 4 names"):
        both.plot.profile("up_proj")
    with pytest.raises(SpectraError, match="'inherited'"):
        both.plot.heatmap(NAME, "inherit")  # type: ignore[arg-type]
    with pytest.raises(SpectraError, match="no functional check"):
        alone.plot.functional()
    with pytest.raises(SpectraError, match="'kl'"):
        both.plot.functional("klx")


def test_summary_of_the_samples(both: CovarianceShift) -> None:
    summary = functional_summary(both.functional)
    kl = both.functional["kl"].to_numpy()
    row = summary.loc["kl"]
    assert row["mean"] == pytest.approx(kl.mean())
    assert row["standard_error"] == pytest.approx(np.sqrt(((kl - kl.mean()) ** 2).sum() / 127 / 128))
    assert (row["p05"], row["median"], row["p95"]) == pytest.approx(tuple(np.percentile(kl, [5, 50, 95])))
    assert "output_change" not in summary.index
    assert np.isnan(functional_summary(both.functional.head(1)).loc["kl", "standard_error"])
    assert functional_summary(both.functional.iloc[:0]).empty


def test_sentences_hold_their_numbers(both: CovarianceShift) -> None:
    findings = describe(both)
    layers = both.layers
    size, parts = findings[0], findings[1]
    assert size.numbers["median"] == pytest.approx(layers["relative_shift"].median())
    assert size.matrices[0] == layers.set_index("name")["relative_shift"].idxmax()
    assert parts.numbers["own"] == pytest.approx(layers["relative_own"].median())
    larger = layers["relative_inherited"] > layers["relative_own"]
    assert sorted(parts.matrices) == sorted(layers["name"][larger])
    assert f"in {int(larger.sum())} of 13 matrices" in parts.text
    texts = " ".join(finding.text for finding in findings)
    assert "KL" in texts
    assert "2509.04259" in texts
    change = both.functional["loss_change"]
    assert f"rose on {int((change > 0).sum())} of 128 samples" in texts
    slices = next(finding for finding in findings if "slices of directions" in finding.text)
    medians = both.slices.groupby("slice")["shift_share"].median()
    assert slices.numbers["slice"] == medians.idxmax()
    assert slices.numbers["shift_share"] == pytest.approx(medians.max())


def test_a_frozen_model_inherits_and_owns_nothing() -> None:
    """Only the first block moved: what later blocks show is inherited, all of it."""
    result = covariance_shift(Net(), tuned_of(Net(), only="layers.0."), labelled_batches(), mode="end_to_end")
    parts = describe(result)[1]
    later = [name for name in result.layers["name"] if "layers.0." not in name]
    assert set(later) <= set(parts.matrices)


def printed(result: CovarianceShift, width: int = 110, top: int = 5, out: Path | None = None) -> str:
    file = io.StringIO()
    print_shift(result, Console(file=file, width=width), top=top, out=out)
    return file.getvalue()


def test_the_table_lists_the_strongest_first_and_fits(both: CovarianceShift) -> None:
    text = printed(both)
    assert max(map(len, text.splitlines())) <= 110
    strongest = list(both.layers.sort_values("relative_shift", ascending=False)["name"][:5])
    places = [text.index(f"   {name}") for name in strongest]
    assert places == sorted(places)
    assert "own" in text
    assert "--top 13 shows all" in text
    assert max(map(len, printed(both, width=50).splitlines())) <= 50


def test_columns_that_would_say_nothing_are_left_out(alone: CovarianceShift, white: CovarianceShift) -> None:
    for result, words in ((alone, "nothing is inherited"), (white, "Sigma_X = I")):
        text = printed(result)
        assert "inher " not in text
        assert words in text.replace("\n   ", " ")


def test_names_are_text(both: CovarianceShift) -> None:
    hostile = "[red]x\x1b[31m"
    layers = both.layers.assign(name=both.layers["name"].where(both.layers["name"] != NAME, hostile))
    text = printed(dataclasses.replace(both, layers=layers), top=20)
    assert "\x1b" not in text
    assert "[red]x" in text


@pytest.mark.parametrize("which", ["both", "alone", "white", "still"])
def test_json_is_plain(which: str, request: pytest.FixtureRequest) -> None:
    result: CovarianceShift = request.getfixturevalue(which)
    plain = shift_to_json(result, 3)
    text = json.dumps(plain, allow_nan=False)
    assert len(plain["strongest"]) == 3
    assert plain["matrices"] == len(result.layers)
    assert json.loads(text)["findings"]
    assert plain["functional"].keys() == set(functional_summary(result.functional).index)


@pytest.mark.parametrize("which", ["both", "white"])
def test_a_saved_shift_shows_the_same_without_the_models(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    result: CovarianceShift = request.getfixturevalue(which)
    again = CovarianceShift.load(result.save(tmp_path / "a", "*"))
    assert printed(again) == printed(result)
    one, other = (save_shift_pictures(each, tmp_path / name) for each, name in ((result, "p"), (again, "q")))
    assert [path.name for path in one] == [path.name for path in other]
    assert len(one) >= 3
    for first, second in zip(one, other, strict=True):
        assert first.read_bytes() == second.read_bytes()
        assert first.stat().st_size > 5000


def test_nothing_moved_can_be_drawn_and_said(still: CovarianceShift) -> None:
    still.plot.depth()
    still.plot.profile(NAME)
    still.plot.heatmap(NAME)
    still.plot.functional()
    assert describe(still)[0].text.startswith("Nothing shifted: ")


def test_pictures_do_without_matrices_that_were_not_kept(both: CovarianceShift, tmp_path: Path) -> None:
    again = CovarianceShift.load(both.save(tmp_path))
    assert len(save_shift_pictures(again, tmp_path / "p")) == 4
    with pytest.raises(SpectraError, match="not kept"):
        again.plot.heatmap(NAME)


def test_a_shift_of_nothing_says_so(both: CovarianceShift) -> None:
    empty = dataclasses.replace(both, layers=both.layers.iloc[:0], components=both.components.iloc[:0])
    assert "Nothing was measured" in describe(empty)[0].text
    assert "0 matrices" in printed(empty)
    with pytest.raises(SpectraError, match="nothing to draw"):
        empty.plot.depth()


def test_no_randomness_is_left_over(both: CovarianceShift) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    both.plot.profile(NAME)
    assert torch.equal(torch.rand(1), expected)


def test_depth_names_and_styles_own_and_inherited_whichever_are_drawn(both: CovarianceShift) -> None:
    def lines(result: CovarianceShift) -> dict[str, tuple[str, str]]:
        found = [line for line in result.plot.depth().lines if "median" in str(line.get_label())]
        return {str(line.get_label()): (str(line.get_color()), str(line.get_linestyle())) for line in found}

    own, inherited = lines(both).values()
    assert list(lines(both)) == ["own, median", "inherited, median"]
    few, none = (
        covariance_shift(Net(), tuned_of(Net(), only=only), labelled_batches(), mode="end_to_end", functional=False)
        for only in ("q_proj.weight", "no such name")
    )
    assert lines(few) == {"own, median of the matrices that moved": own, "inherited, median of all": inherited}
    assert lines(none) == {"inherited, median of all": inherited}


def test_one_position_has_no_covariance_to_draw() -> None:
    shift = covariance_shift(Net(), tuned_of(Net()), [labelled_batches()[0][0][:1]], functional=False)
    assert len(shift.layers)
    with pytest.raises(SpectraError, match="no matrix vary over the positions seen") as caught:
        shift.plot.depth()
    assert "unmatched" not in str(caught.value)
