"""The pictures of a sweep: what is drawn is what the table says, and its title says how the rates came about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from scipy import stats

from spectra.errors import SpectraError
from spectra.report.tradeoff_plots import SweepPlots
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
    with pytest.raises(SpectraError, match="of a slice"):
        SweepPlots(table[table["method"] == "lora"]).tradeoff()
    with pytest.raises(SpectraError, match="two axes"):
        SweepPlots(table).tradeoff(ax=[SweepPlots(table).pareto()])
