"""The pictures of a sweep: what is drawn is what the table says, and its title says how the rates came about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from scipy import stats

from spectra.errors import SpectraError
from spectra.report.tradeoff_plots import BEYOND, SweepPlots
from spectra.training import Sweep, load_sweep
from spectra.training.sweep_result import table_of

POSITIONS, RATES, SEEDS = (0.0, 0.5, 1.0), (1e-3, 1e-2), (0, 1, 2)


def row(method: str, position: float | None, rate: float, seed: int, **values: Any) -> dict[str, Any]:
    """A run whose numbers differ with all that it is of."""
    where = 1.0 if position is None else position
    score = 0.5 + 0.2 * where * (1 if rate == 1e-2 else -1) + 0.01 * seed + 0.03 * len(method) + rate
    return {
        "run": f"{method}-{position}-{rate}-{seed}", "method": method, "position": position, "learning_rate": rate,
        "seed": seed, "status": "finished", "metric": "accuracy", "score": score, "forgetting": score**2, **values,
    }  # fmt: skip


def rows(**values: Any) -> list[dict[str, Any]]:
    points: list[tuple[str, float | None]] = [("slice", p) for p in POSITIONS] + [("lora", None), ("full", None)]
    return [row(method, p, rate, seed, **values) for method, p in points for rate in RATES for seed in SEEDS]


def curve(ax: Axes) -> dict[float, float]:
    """What is drawn as the line of slices."""
    (line,) = [container[0] for container in ax.containers if container.get_label() == "slices"]
    return dict(zip(line.get_xdata(), line.get_ydata(), strict=True))


def reference(ax: Axes, method: str) -> float:
    """What is drawn of a method beside slices."""
    (line,) = [container[0] for container in ax.containers if container.get_label() == method]
    (value,) = line.get_ydata()
    return float(value)


def legend(ax: Axes) -> list[str]:
    found = ax.get_legend()
    assert found is not None
    return [text.get_text() for text in found.get_texts()]


def title(ax: Axes) -> str:
    return " ".join(ax.get_title(loc="left").split())


def test_means_and_intervals_are_those_of_the_rows() -> None:
    table = table_of(rows())
    for ax, column in zip(SweepPlots(table).tradeoff("fixed", rate=1e-2), ("score", "forgetting"), strict=True):
        here = table[(table["learning_rate"] == 1e-2) & (table["method"] == "slice")]
        drawn = curve(ax)
        for position in POSITIONS:
            values = here[here["position"] == position][column].to_numpy()
            assert drawn[position] == pytest.approx(values.mean())
        # The bar of the first dot against scipy's own interval.
        values = here[here["position"] == 0][column].to_numpy()
        low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
        (bars,) = ax.containers[0][2]
        assert bars.get_segments()[0][:, 1] == pytest.approx([low, high])
        lora = table[(table["learning_rate"] == 1e-2) & (table["method"] == "lora")][column].mean()
        assert reference(ax, "lora") == pytest.approx(lora)
        assert any(list(line.get_ydata()) == pytest.approx([lora, lora]) for line in ax.lines)


def test_titles_say_how_the_rates_came_about() -> None:
    plots = SweepPlots(table_of(rows()))
    assert "One learning rate, 0.001" in title(plots.tradeoff("fixed", rate=1e-3)[0])
    assert "Best learning rates, by the test itself" in title(plots.tradeoff("best")[0])
    held = SweepPlots(table_of([{**each, "validation_score": -each["score"]} for each in rows()]))
    assert "Best learning rates, by validation" in title(held.tradeoff("best")[1])
    assert "All learning rates" in title(plots.pareto())
    assert "3 seeds" in title(plots.pareto())


def test_best_is_best_by_the_validation_part_where_there_is_one() -> None:
    table = table_of(rows())
    by_test = curve(SweepPlots(table).tradeoff("best")[0])
    assert by_test[1.0] == pytest.approx(
        table[(table["position"] == 1) & (table["learning_rate"] == 1e-2)]["score"].mean()
    )
    table["validation_score"] = -table["score"]
    by_validation = curve(SweepPlots(table).tradeoff("best")[0])
    assert by_validation[1.0] == pytest.approx(
        table[(table["position"] == 1) & (table["learning_rate"] == 1e-3)]["score"].mean()
    )


def test_a_rate_at_which_a_seed_diverged_is_not_the_best() -> None:
    table = table_of(rows())
    diverged = (table["position"] == 1) & (table["learning_rate"] == 1e-2) & (table["seed"] == 2)
    table.loc[diverged, ["score", "forgetting"]] = np.nan
    table.loc[diverged, "status"] = "failed"
    ax = SweepPlots(table).tradeoff("best")[0]
    expected = table[(table["position"] == 1) & (table["learning_rate"] == 1e-3)]["score"].mean()
    assert curve(ax)[1.0] == pytest.approx(expected)
    assert "1 failed" in title(ax)


def test_matched_and_plain_slices_are_never_mixed() -> None:
    plain = rows()
    matched = [row("slice", p, 1e-3, seed, matched_position=0.5) for p in POSITIONS for seed in SEEDS]
    for each in matched:
        each["score"] += 0.07
    plots = SweepPlots(table_of([*plain, *matched]))
    one, other = curve(plots.tradeoff("fixed", rate=1e-3)[0]), curve(plots.tradeoff("matched")[0])
    assert {p: other[p] - one[p] for p in POSITIONS} == pytest.approx(dict.fromkeys(POSITIONS, 0.07))
    assert "Step sizes of position 0.5 at 0.001" in title(plots.tradeoff("matched")[0])
    # Methods that have no size to match stand beside matched slices, at the same plain rate.
    table = table_of(plain)
    expected = table[(table["method"] == "lora") & (table["learning_rate"] == 1e-3)]["score"].mean()
    assert reference(plots.tradeoff("matched")[0], "lora") == pytest.approx(expected)
    assert "Step sizes" in title(SweepPlots(table_of(matched)).tradeoff()[0])  # the default where the sweep is


def test_how_far_the_weights_moved_is_drawn_beside_the_scores() -> None:
    table = table_of(rows())
    table["relative_update"] = 0.1 + table["position"].fillna(0)
    score, update = SweepPlots(table).tradeoff("fixed", rate=1e-2, quantities=["score", "relative_update"])
    assert curve(update) == pytest.approx({0.0: 0.1, 0.5: 0.6, 1.0: 1.1}) and curve(score) != curve(update)
    assert (update.get_yscale(), score.get_yscale()) == ("log", "linear")  # it spans a decade
    near = table.assign(relative_update=1 + table["relative_update"])
    assert SweepPlots(near).tradeoff(quantities=["relative_update"])[0].get_yscale() == "linear"
    # What moves no weight has no place on a logarithmic axis, and is named.
    still = table.assign(relative_update=table["relative_update"].where(table["method"] != "lora", 0.0))
    (ax,) = SweepPlots(still).tradeoff("fixed", quantities=["relative_update"])
    assert "lora: moves no weight" in legend(ax) and "full" in legend(ax)


def test_methods_without_runs_are_named() -> None:
    table = table_of(rows())
    absent = (table["method"] == "full") & (table["learning_rate"] == 1e-2)
    ax, _ = SweepPlots(table[~absent]).tradeoff("fixed", rate=1e-2)
    assert legend(ax) == ["slices", "lora", "full: not run at this rate"]
    failed = table.assign(status=table["status"].where(~absent, "failed"))
    assert "full: failed at this rate" in legend(SweepPlots(failed).tradeoff("fixed", rate=1e-2)[0])
    failed = table.assign(status=table["status"].where(table["method"] != "full", "failed"))
    assert "full: failed" in legend(SweepPlots(failed).tradeoff("best")[0])


def test_an_interval_that_leaves_the_axes_ends_in_a_triangle() -> None:
    """Two seeds that lie far apart, at one position; the others agree."""
    table = table_of([row("slice", p, 1e-2, seed) for p in POSITIONS for seed in (0, 1)])
    table["score"] = table["position"]
    low, high = SweepPlots(table).tradeoff(quantities=["score"])[0].get_ylim()
    assert low < 0 and high > 1
    table.loc[table["position"] == 0.5, "score"] = [0.2, 0.8]  # +- 3.8
    (ax,) = SweepPlots(table).tradeoff(quantities=["score"])
    marks = [line for line in ax.lines if line.get_gid() == BEYOND]
    assert [(line.get_marker(), list(line.get_xdata()), list(line.get_ydata())) for line in marks] == [
        ("v", [0.5], [0]),
        ("^", [0.5], [1]),
    ]
    low, high = ax.get_ylim()
    assert -1.5 < low < -1 and 2 < high < 2.5  # the means still show well
    table.loc[table["position"] == 0.5, "score"] = [0.45, 0.55]  # +- 0.64, which the axes take in
    (ax,) = SweepPlots(table).tradeoff(quantities=["score"])
    assert not [line for line in ax.lines if line.get_gid() == BEYOND]
    assert ax.get_ylim()[0] < 0.5 - 0.64 and ax.get_ylim()[1] > 0.5 + 0.64


def test_a_method_looks_the_same_in_all_pictures() -> None:
    """Also where the rows come in another order, or a picture shows some of the methods only."""
    names = ("peft:olora", "pissa", "peft:pissa", "lora_ga", "milora", "lora")
    table = table_of(
        [row("slice", p, 1e-2, 0) for p in POSITIONS] + [row(name, None, 1e-2, 0) for name in names]
    ).astype({"score": "float64"})
    table["score"] += np.arange(len(table)) / 10

    def looks(ax: Axes) -> dict[str, tuple[str, str]]:
        lines = [line for line in ax.lines if line.get_label() in names]
        lines += [each[0] for each in ax.containers if each.get_label() in names]
        labels = [line.get_label() for line in ax.lines if line.get_label() in names]
        labels += [each.get_label() for each in ax.containers if each.get_label() in names]
        return {name: (line.get_color(), line.get_marker()) for name, line in zip(labels, lines, strict=True)}

    one = looks(SweepPlots(table).tradeoff()[0])
    assert len(set(one.values())) == len(names) == len(one)
    assert looks(SweepPlots(table).pareto()) == one
    assert looks(SweepPlots(table.iloc[::-1]).pareto()) == one


def test_of_several_grids_in_one_table_the_first_is_drawn() -> None:
    """Slices by position and by start have no axis in common, nor have runs matched to two slices."""
    by_start = [{**row("slice", None, 1e-3, 0), "start": start} for start in (0, 8)]
    by_position = [row("slice", p, 1e-3, 0) for p in POSITIONS]
    assert list(curve(SweepPlots(table_of(by_start + by_position)).tradeoff()[0])) == [0, 8]
    assert list(curve(SweepPlots(table_of(by_position + by_start)).tradeoff()[0])) == list(POSITIONS)
    matched = [row("slice", p, 1e-3, 0, matched_position=m) for m in (1.0, 0.0) for p in POSITIONS]
    for at, each in enumerate(matched):
        each["score"] = at
    ax, _ = SweepPlots(table_of(matched)).tradeoff()
    assert list(curve(ax).values()) == [0, 1, 2] and "position 1 at" in title(ax)


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    points = {
        "a": (0.5, 0.1),
        "b": (0.6, 0.2),
        "c": (0.55, 0.3),
        "d": (0.7, 0.4),
    }  # c: less score, more forgotten than b
    table = table_of(
        [{**row(name, None, 1e-3, 0), "score": score, "forgetting": lost} for name, (score, lost) in points.items()]
    )
    ax = SweepPlots(table).pareto()
    (front,) = [line for line in ax.lines if line.get_label() == "not beaten in both"]
    assert list(zip(front.get_ydata(), front.get_xdata(), strict=True)) == [points[name] for name in "abd"]


def test_slices_named_by_their_start_are_drawn_by_it() -> None:
    table = table_of([{**row("slice", None, 1e-3, 0), "start": start} for start in (0, 8, 120)])
    ax = SweepPlots(table).tradeoff()[0]
    assert list(curve(ax)) == [0, 8, 120]
    assert "first component" in ax.get_xlabel()


def test_pictures_are_drawn_from_a_saved_table_alone(tmp_path: Path) -> None:
    saved = load_sweep(Sweep(table_of(rows()), {}).save(tmp_path))
    assert curve(saved.plot.tradeoff("best")[0]) == curve(SweepPlots(table_of(rows())).tradeoff("best")[0])
    figure = saved.plot.pareto().figure
    figure.savefig(tmp_path / "pareto.png")


def test_what_cannot_be_drawn_is_said() -> None:
    table = table_of(rows())
    with pytest.raises(SpectraError, match="give fixed, matched or best"):
        SweepPlots(table).tradeoff("worst")  # type: ignore[arg-type]
    with pytest.raises(SpectraError, match=r"those of the sweep are 0.001, 0.01"):
        SweepPlots(table).tradeoff(rate=0.5)
    with pytest.raises(SpectraError, match="no slices whose learning rates are matched"):
        SweepPlots(table).tradeoff("matched")
    with pytest.raises(SpectraError, match="nothing to draw"):
        SweepPlots(table.assign(status="failed")).tradeoff()
    with pytest.raises(SpectraError, match="retain"):
        SweepPlots(table.assign(forgetting=np.nan)).tradeoff()
    with pytest.raises(SpectraError, match="no relative_update; run it with compare"):
        SweepPlots(table).tradeoff(quantities=["relative_update"])
    with pytest.raises(SpectraError, match="'forgetting'"):
        SweepPlots(table).tradeoff(quantities=["forgeting"])
    with pytest.raises(SpectraError, match="of a slice"):
        SweepPlots(table[table["method"] == "lora"]).tradeoff()
    with pytest.raises(SpectraError, match="on 2 axes, and 1 were"):
        SweepPlots(table).tradeoff(ax=[SweepPlots(table).pareto()])
