"""The pictures: what is drawn is what the tables hold, axes are labelled, and a wrong name gets its closest ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spectra.comparison import Comparison
from spectra.errors import SpectraError
from spectra.report.drawing import bin_means, running_mean
from spectra.report.pictures import standard_set
from spectra.report.plots import save_pictures

NAME = "bert.encoder.layer.3.intermediate.dense.weight"


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    backend = mpl.get_backend(auto_select=False)
    mpl.use("agg")
    yield
    pyplot.close("all")
    if backend:
        mpl.use(backend)


def rows(result: Comparison, tuned: str, name: str = NAME) -> dict[str, np.ndarray]:
    table = result.components
    table = table[(table["tuned"] == tuned) & (table["name"] == name)].sort_values("component")
    return {column: table[column].to_numpy() for column in table.select_dtypes("number").columns}


EVERY_PLOT: tuple[Callable[..., Axes], ...] = (
    lambda plot, ax: plot.profile(NAME, ax=ax),
    lambda plot, ax: plot.heatmap(ax=ax),
    lambda plot, ax: plot.heatmap("stability", ax=ax),
    lambda plot, ax: plot.spectrum(NAME, ax=ax),
    lambda plot, ax: plot.energy("layer", ax=ax),
    lambda plot, ax: plot.energy("role", ax=ax),
    lambda plot, ax: plot.depth(ax=ax),
    lambda plot, ax: plot.depth("intruders", ax=ax),
    lambda plot, ax: plot.slices(NAME, ax=ax),
)


@pytest.mark.parametrize("draw", EVERY_PLOT)
def test_every_plot_has_labels_and_a_title_on_axes_new_or_given(two: Comparison, draw: Callable[..., Axes]) -> None:
    given = Figure(figsize=(3.4, 2.6), layout="constrained").add_subplot()
    assert draw(two.plot, given) is given
    assert not pyplot.get_fignums()
    for ax in (given, draw(two.plot, None)):
        assert ax.get_xlabel()
        assert ax.get_ylabel()
        assert ax.get_title(loc="left")


def test_profile_draws_the_components(two: Comparison) -> None:
    for tuned in ("a", "b"):
        ax = two.plot.profile(NAME, tuned=tuned)
        expected = rows(two, tuned)
        np.testing.assert_array_equal(ax.lines[0].get_ydata(), expected["stability"])
        (right,) = (other for other in ax.figure.axes if other is not ax)
        np.testing.assert_array_equal(right.lines[0].get_ydata(), expected["plasticity"])
        assert set(right.lines[2].get_ydata()) == {1 / 24}  # the even share 1/k


def test_profile_marks_the_slices_it_is_given(two: Comparison) -> None:
    ax = two.plot.profile(NAME, slices=[(4, 10)])
    (right,) = (other for other in ax.figure.axes if other is not ax)
    (band,) = right.patches
    assert (band.get_x(), band.get_width()) == (3.5, 6)


def test_spectrum_draws_three_spectra(two: Comparison) -> None:
    ax = two.plot.spectrum(NAME, tuned="b")
    expected = rows(two, "b")
    for line, column in zip(ax.lines, ("singular_value", "tuned_singular_value", "update_singular_value"), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), expected[column])
    assert ax.get_yscale() == "log"


def test_heatmap_rows_are_binned_means_in_order_of_depth(two: Comparison) -> None:
    grid = np.asarray(two.plot.heatmap("plasticity", bins=6, tuned="a").images[0].get_array())
    assert grid.shape == (22, 6)
    np.testing.assert_allclose(grid.mean(axis=1), 1, rtol=1e-6)  # k x plasticity has mean 1
    embeddings = rows(two, "a", "bert.embeddings.word_embeddings.weight")["plasticity"]
    np.testing.assert_allclose(grid[0], 24 * embeddings.reshape(6, 4).mean(axis=1), rtol=1e-9)
    pooler = rows(two, "a", "bert.pooler.dense.weight")["plasticity"]
    np.testing.assert_allclose(grid[-1], 24 * pooler.reshape(6, 4).mean(axis=1), rtol=1e-9)


def test_energy_bars_are_pooled_shares(two: Comparison) -> None:
    ax = two.plot.energy("role", tuned="b")
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    table = two.layers[(two.layers["tuned"] == "b") & (two.layers["role"] == "mlp_up")]
    energy = table["update_norm"] ** 2
    widths = [container[names.index("mlp_up")].get_width() for container in ax.containers]
    for width, column in zip(widths, ("diagonal_share", "off_diagonal_share", "outside_share"), strict=True):
        assert width == pytest.approx((table[column] * energy).sum() / energy.sum())
    assert sum(widths) == pytest.approx(1, abs=1e-5)
    assert ax.lines[0].get_xdata()[names.index("mlp_up")] == pytest.approx(1 / 48)  # the null 1 / max(m, n)


def test_depth_draws_every_matrix_of_the_blocks(two: Comparison) -> None:
    ax = two.plot.depth(tuned="b")
    table = two.layers[(two.layers["tuned"] == "b") & (two.layers["role"] == "query")].sort_values("layer")
    (line,) = (line for line in ax.lines if line.get_label() == "query")
    np.testing.assert_array_equal(line.get_xdata(), table["layer"].to_numpy(dtype=float))
    np.testing.assert_array_equal(line.get_ydata(), table["relative_update"])


def test_slices_have_their_nulls(two: Comparison) -> None:
    ax = two.plot.slices(NAME, tuned="a")
    table = two.slices[(two.slices["tuned"] == "a") & (two.slices["name"] == NAME)].sort_values("slice")
    heights = [[bar.get_height() for bar in container] for container in ax.containers]
    np.testing.assert_array_equal(heights, [table["block_share"], table["cross_share"]])
    width = (table["stop"] - table["start"]).to_numpy()
    np.testing.assert_allclose(ax.lines[0].get_ydata(), width**2 / (24 * 48))
    np.testing.assert_allclose(ax.lines[1].get_ydata(), 2 * width * (24 - width) / (24 * 48))


def test_wrong_names_are_answered_with_close_ones(two: Comparison) -> None:
    with pytest.raises(SpectraError, match=r"layer\.3\.intermediate"):
        two.plot.profile(NAME.replace("intermediate", "intermediat"))
    with pytest.raises(SpectraError, match="plasticity"):
        two.plot.heatmap("plastcity")
    with pytest.raises(SpectraError, match="relative_update"):
        two.plot.depth("relative_updat")
    with pytest.raises(SpectraError, match="'a'"):
        two.plot.depth(tuned="A")
    with pytest.raises(SpectraError, match="layer"):
        two.plot.energy("block")


@pytest.mark.parametrize(
    "name", [NAME, NAME.removesuffix(".weight"), "layer.3.intermediate.dense", "3.intermediate.dense.weight"]
)
def test_an_end_of_a_name_is_enough(two: Comparison, name: str) -> None:
    ax = two.plot.profile(name)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), rows(two, "a")["stability"])
    assert len(two.plot.slices(name).containers[0]) == len(two.plot.slices(NAME).containers[0])


def test_an_end_that_several_names_have_is_refused_with_them(two: Comparison) -> None:
    with pytest.raises(SpectraError, match=r"end of 4 names \(.*layer\.0\.intermediate.*layer\.1\.intermediate"):
        two.plot.profile("intermediate.dense")
    with pytest.raises(SpectraError, match="closest"):  # an end begins after a dot
        two.plot.profile("ntermediate.dense.weight")


@pytest.mark.parametrize("draw", EVERY_PLOT)
def test_titles_have_two_lines(two: Comparison, draw: Callable[..., Axes]) -> None:
    assert draw(two.plot, None).get_title(loc="left").count("\n") <= 1
    narrow = Figure(figsize=(3.4, 2.6), layout="constrained").add_subplot()
    assert draw(two.plot, narrow).get_title(loc="left").count("\n") <= 2


def test_the_profile_says_what_its_marks_are(two: Comparison) -> None:
    ax = two.plot.profile(NAME)
    legend = ax.get_legend()
    said = {text.get_text(): line for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)}
    (squares,) = (line for text, line in said.items() if "one component" in text)
    (dashed,) = (line for text, line in said.items() if "running mean" in text)
    assert squares.get_marker() == "s"
    assert dashed.get_linestyle() == "--"


def test_labels_use_the_symbols_of_the_definitions(two: Comparison) -> None:
    for draw in EVERY_PLOT:
        ax = draw(two.plot, None)
        legend = ax.get_legend()
        texts = [
            ax.get_xlabel(),
            ax.get_ylabel(),
            *(text.get_text() for text in (legend.get_texts() if legend else ())),
        ]
        assert not any("sigma" in text for text in texts)


def test_the_energy_picture_says_first_order_and_random(two: Comparison) -> None:
    ax = two.plot.energy("role")
    assert "to first order" in ax.get_title(loc="left")
    assert ax.texts
    assert all(text.get_text().endswith("x random") for text in ax.texts)


def test_matrices_without_components_say_why(failing: Comparison) -> None:
    with pytest.raises(SpectraError, match="unchanged"):
        failing.plot.profile("bert.encoder.layer.0.attention.self.query.weight")
    with pytest.raises(SpectraError, match="failed"):
        failing.plot.spectrum("bert.encoder.layer.1.intermediate.dense.weight")


def test_one_component_is_a_picture(single: Comparison, tmp_path: Path) -> None:
    for ax in (
        single.plot.profile("fc.weight"),
        single.plot.spectrum("fc.weight"),
        single.plot.slices("fc.weight"),
        single.plot.heatmap(),
        single.plot.depth(),
        single.plot.energy(),
    ):
        ax.figure.savefig(tmp_path / "x.png")
    assert single.plot.profile("fc.weight").lines[0].get_marker() == "o"


def test_sparse_comparisons_draw_or_explain(odd: Comparison, tmp_path: Path) -> None:
    for method in ("heatmap", "energy", "depth"):
        try:
            getattr(odd.plot, method)()
        except SpectraError as error:
            assert str(error)
    save_pictures(odd, tmp_path)


def test_names_are_text_and_not_mathematics(failing: Comparison, two: Comparison, tmp_path: Path) -> None:
    names = list(failing.layers["name"][failing.layers["status"] == "compared"])
    odd = next(name for name in names if "script" in name)
    assert "\x1b" not in failing.plot.profile(odd).get_title(loc="left")
    renamed = {
        table: getattr(two, table).assign(name=getattr(two, table)["name"].str.replace("bert", r"$\frac{$_^世\n"))
        for table in ("layers", "components", "slices")
    }
    result = Comparison(**renamed, unmatched=two.unmatched)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that the font lacks is a warning
        ax = result.plot.spectrum(NAME.replace("bert", r"$\frac{$_^世\n"))
        ax.figure.savefig(tmp_path / "x.png")


def test_the_standard_set_is_complete_safe_and_deterministic(two: Comparison, tmp_path: Path) -> None:
    paths = save_pictures(two, tmp_path / "one")
    assert len(paths) == 14
    for path, picture in list(zip(paths, standard_set(two), strict=True))[::5]:
        assert path.read_bytes() == picture.png()
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(path.name for path in paths)
    assert not any("pooler" in path.name and "-a-" in path.name for path in paths)  # an outlier is not what is typical


def test_file_names_stay_in_the_folder(failing: Comparison, tmp_path: Path) -> None:
    names = failing.layers["name"].str.replace("bert", "../../etc\x00:")
    renamed = failing.layers.assign(name=names, tuned="../t")
    components = failing.components.assign(
        name=failing.components["name"].str.replace("bert", "../../etc\x00:"), tuned="../t"
    )
    slices = failing.slices.assign(name=failing.slices["name"].str.replace("bert", "../../etc\x00:"), tuned="../t")
    paths = save_pictures(Comparison(renamed, components, slices, failing.unmatched.iloc[:0]), tmp_path)
    assert paths
    assert all(path.resolve().parent == tmp_path.resolve() for path in paths)


def test_no_backend_is_chosen_for_the_user(single: Comparison, tmp_path: Path) -> None:
    mpl.use("svg")
    save_pictures(single, tmp_path)
    assert mpl.get_backend() == "svg"


def test_an_unwritable_folder_is_an_os_error(two: Comparison, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        save_pictures(two, tmp_path / "file")


def test_bin_means_keep_the_mean() -> None:
    values = np.random.default_rng(0).random(37)
    for bins in (1, 5, 32, 37, 100):
        assert bin_means(values, bins).mean() == pytest.approx(values.mean())
    assert np.isnan(bin_means(np.full(4, np.nan), 3)).all()
    np.testing.assert_allclose(bin_means(np.array([1.0, np.nan, 3.0, 3.0]), 2), [1, 3])


def test_running_mean_of_a_constant_is_the_constant() -> None:
    np.testing.assert_allclose(running_mean(np.full(300, 2.5)), 2.5)


def test_real_weights_have_their_standard_set(real: Comparison, tmp_path: Path) -> None:
    assert len(save_pictures(real, tmp_path)) == 14
