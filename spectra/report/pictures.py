"""The standard set of pictures of a comparison, drawn without a screen."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.report import summary
from spectra.report.sequence_table import is_sequence
from spectra.report.wording import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from spectra.comparison import Comparison

DOTS_PER_INCH = 150
CLOSE_UPS = 2  # of the most changed matrices


@dataclass(frozen=True)
class Picture:
    """A picture of the standard set, not yet drawn.

    Attributes:
        file: its file name, of plain letters whatever the names of tensors and models are.
        caption: what it shows, in a sentence; plain text.
        tuned: the tuned model that it is about.
        size: width and height in inches.
        draw: puts it onto a figure.
    """

    file: str
    caption: str
    tuned: str
    size: tuple[float, float]
    draw: Callable[[Figure], object]

    def png(self) -> bytes:
        """Draw it. The bytes depend on the comparison and on matplotlib alone: no dates are in the file."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=self.size, layout="constrained")
        FigureCanvasAgg(figure)
        self.draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
        return buffer.getvalue()


def standard_set(result: Comparison) -> list[Picture]:
    """Per tuned model: heat maps, depth, the energy split by role and layer, close-ups of the most changed matrices.

    Models of which no matrix was compared have no pictures; outliers get no close-up. Of models in sequence
    there is one picture of how each measure went, then those of the last model.
    """
    labels = summary.tuned_labels(result)
    ordered = is_sequence(result)
    pictures = [_of_sequence(result, labels)] if ordered else []
    for number, tuned in enumerate(labels, start=1):
        if ordered and number < len(labels):
            continue
        layers = summary.rows_of(result, tuned)
        moved = summary.compared(layers)
        if moved.empty:
            continue
        start = f"{number:02d}-{plain_letters(tuned)}-" if len(labels) > 1 else ""
        typical = moved[~summary.is_outlier(layers)[moved.index]]
        names = list(typical.sort_values("relative_update", ascending=False, kind="stable")["name"])[:CLOSE_UPS]
        pictures += _of_model(result, tuned, start, len(moved))
        pictures += [_close_up(result, tuned, name, f"{start}matrix-{at}-") for at, name in enumerate(names, start=1)]
    return pictures


def _of_sequence(result: Comparison, labels: list[str]) -> Picture:
    from spectra.report.sequence_plots import draw_overview

    caption = f"From {printable(labels[0])} to {printable(labels[-1])}: how the measures of the update went."
    return Picture(
        "00-sequence.png", caption, ", ".join(labels), (11.0, 6.6), lambda figure: draw_overview(result, figure)
    )


def plain_letters(name: str) -> str:
    """`name` as part of a file name on any system: ASCII letters, digits, dots and dashes, at most 60 of them.

    >>> plain_letters("../h.0/q:weight")
    'h.0_q_weight'
    """
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("._-")[:60] or "x"


def _of_model(result: Comparison, tuned: str, start: str, matrices: int) -> list[Picture]:
    plot, who = result.plot, printable(tuned)
    groups = len(set(summary.depth_group(summary.rows_of(result, tuned))))
    roles = len(set(summary.rows_of(result, tuned)["role"]))
    map_height = min(9.0, 3.4 + 0.03 * matrices)
    return [
        Picture(
            f"{start}heatmap-plasticity.png",
            f"{who}: which components carry the update, from the model's input (top) to its output.",
            tuned,
            (6.4, map_height),
            lambda figure: plot.heatmap("plasticity", tuned=tuned, ax=figure.add_subplot()),
        ),
        Picture(
            f"{start}heatmap-stability.png",
            f"{who}: which components kept their place, from the model's input (top) to its output.",
            tuned,
            (6.4, map_height),
            lambda figure: plot.heatmap("stability", tuned=tuned, ax=figure.add_subplot()),
        ),
        Picture(
            f"{start}depth.png",
            f"{who}: the relative update of each kind of matrix against depth.",
            tuned,
            (6.4, 4.4),
            lambda figure: plot.depth(tuned=tuned, ax=figure.add_subplot()),
        ),
        Picture(
            f"{start}energy-by-role.png",
            f"{who}: how the energy of the update divides, by role.",
            tuned,
            (6.4, min(9.0, 2.2 + 0.24 * roles)),
            lambda figure: plot.energy("role", tuned=tuned, ax=figure.add_subplot()),
        ),
        Picture(
            f"{start}energy-by-layer.png",
            f"{who}: how the energy of the update divides, by layer.",
            tuned,
            (6.4, min(9.0, 2.2 + 0.24 * groups)),
            lambda figure: plot.energy("layer", tuned=tuned, ax=figure.add_subplot()),
        ),
    ]


def _close_up(result: Comparison, tuned: str, name: str, start: str) -> Picture:
    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        result.plot.profile(name, tuned=tuned, ax=left)
        result.plot.spectrum(name, tuned=tuned, ax=right)

    caption = f"{printable(tuned)}: stability, plasticity and singular values of {printable(name)}."
    return Picture(f"{start}{plain_letters(name)}.png", caption, tuned, (10.0, 3.8), draw)
