"""The pictures of a sequence of tasks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from spectra.report.choosing import known
from spectra.report.drawing import LINES, label, legend_below, letters, plain
from spectra.report.plots import QUANTITIES
from spectra.report.wording import number
from spectra.training.continual_result import RETAINED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from spectra.training.continual_result import Continual


# Of the base against itself these are 0; shares and ranks of no update are not.
FROM_ZERO = ("relative_update", "intruders")


class ContinualPlots:
    """The pictures of `result`. Methods return matplotlib Axes; `ax=None` makes a figure."""

    def __init__(self, result: Continual) -> None:
        self.result = result

    def scores(self, *, ax: Axes | None = None) -> Axes:
        """The score of every task from the stage at which it was learnt on; the base's own tasks from stage 0 on."""
        ax = _axes(ax)
        table = self.result.evaluations
        for index, (task, rows) in enumerate(table.groupby("task", sort=False)):
            style = LINES[index % len(LINES)]
            is_own = bool((rows["kind"] == RETAINED).all())
            name = f"{task} (the base's own)" if is_own else str(task)
            ax.plot(rows["stage"], rows["score"], **style, markersize=4, linewidth=1.6, label=plain(name))
        self._stages(ax, table["stage"])
        last = self.result.summary.iloc[-1]
        message = f"after {int(last['stage'])} tasks: average {number(float(last['average_score']))}"
        if last["average_forgetting"] == last["average_forgetting"]:
            message += f", forgotten {number(float(last['average_forgetting']))}"
        metrics = list(dict.fromkeys(table["metric"]))
        words = metrics[0].replace("_", "-") if len(metrics) == 1 else "score"
        label(ax, message, "each on the merged body of the last", "stage", words)
        legend_below(ax, 2, gap=5.0)
        return ax

    def drift(self, quantity: str = "relative_update", *, ax: Axes | None = None) -> Axes:
        """How far the weights of each stage are from the base's: a column of `drift`.

        The line starts at the base, with 0, where the column is one of how much there is of something.
        """
        ax = _axes(ax)
        table = self.result.drift
        known(quantity, [name for name in table.columns if name not in ("stage", "learnt")], "a quantity of drift")
        start = [0] if quantity in FROM_ZERO else []
        ax.plot([*start, *table["stage"]], [*start, *table[quantity]], **LINES[0], markersize=4, linewidth=1.6)
        self._stages(ax, [*start, *table["stage"]])
        words = f"{quantity.replace('_', ' ')}: {number(table[quantity].iloc[0])} to {number(table[quantity].iloc[-1])}"
        label(ax, words, "each stage against the base", "stage", QUANTITIES.get(quantity, quantity.replace("_", " ")))
        return ax

    def _stages(self, ax: Axes, stages: Iterable[int]) -> None:
        """A tick for each of these stages, with what it learnt."""
        learnt = dict(zip(self.result.drift["stage"], self.result.drift["learnt"], strict=True))
        names = {stage: f"{stage}: {plain(str(learnt[stage]))}" if stage else "base" for stage in stages}
        ax.set_xticks(list(names), list(names.values()), fontsize=letters(ax) - 1)


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=(4.8, 3.6), layout="constrained").subplots()
