"""The pictures of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spectra.report import drawing
from spectra.report.wording import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from spectra.training.run import Run


class RunPlots:
    """The pictures of `run`. Methods return matplotlib Axes; `ax=None` makes a figure."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def curves(self, ax: Axes | None = None) -> Axes:
        """Scores over the steps: the new task's, and of every retained task, as far as they were evaluated.

        Accuracies stand on the left axis, log-likelihoods (nats) on the right one where a run has both.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            _, ax = plt.subplots(figsize=(6.0, 3.6), layout="constrained")
        summary, metrics = self.run.summary, self.run.metrics
        retained: dict[str, Any] = summary["retained"]
        of = {"test": summary["metric"], **{name: scores["metric"] for name, scores in retained.items()}}
        other = ax.twinx() if len(set(of.values())) > 1 else None
        drawn = []
        for (split, metric), style in zip(of.items(), _styles(len(of)), strict=True):
            rows = metrics[metrics.split == split]
            axes = other if other is not None and metric != summary["metric"] else ax
            name = (
                "new task"
                if split == "test"
                else drawing.plain(f"retained: {split}" if split != "retain" else "retained")
            )
            drawn += axes.plot(rows.step, rows.score, label=name, markersize=3, **style)
        lost = summary["forgetting"]
        message = f"new task {number(summary['score_before'])} to {number(summary['score'])}"
        if lost is not None:
            message += f", forgotten {number(lost)}"
        drawing.label(ax, message, summary["method"], "step", _LABELS[summary["metric"]])
        if other is not None:
            (metric,) = set(of.values()) - {summary["metric"]}
            other.set_ylabel(_LABELS[metric], fontsize=drawing.letters(ax))
            other.tick_params(labelsize=drawing.letters(ax) - 1)
        if len(drawn) > 1:
            drawing.legend_below(ax, len(drawn), handles=drawn)
        return ax


_LABELS = {"accuracy": "accuracy", "log_likelihood": "log-likelihood (nats a token)"}


def _styles(count: int) -> list[dict[str, Any]]:
    return [drawing.LINES[index % len(drawing.LINES)] for index in range(count)]
