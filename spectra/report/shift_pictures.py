"""The standard set of pictures of a covariance shift, drawn without a screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spectra.report.pictures import Picture, plain_letters
from spectra.report.shift_plots import MEASURES, close_ups
from spectra.report.wording import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from spectra.shift import CovarianceShift


def shift_set(result: CovarianceShift) -> list[Picture]:
    """Own and inherited shift over depth, the functional check, and close-ups of the most shifted matrices."""
    plot, names = result.plot, close_ups(result)
    if not names:
        return []
    caption = "How far the features' covariance shifted along depth, by a layer's own weights and by what it inherited."
    pictures = [Picture("depth.png", caption, "", (6.4, 4.4), lambda figure: plot.depth(ax=figure.add_subplot()))]
    checked = (
        [name for name in MEASURES if np.isfinite(result.functional[name]).any()] if len(result.functional) else []
    )
    if checked:
        caption = "What fine-tuning did to the model's answers, sample by sample."
        pictures.append(
            Picture("functional.png", caption, "", (6.4, 3.8), lambda figure: plot.functional(ax=figure.add_subplot()))
        )
    return [*pictures, *(_close_up(result, name, f"matrix-{at}-") for at, name in enumerate(names, start=1))]


def _close_up(result: CovarianceShift, name: str, start: str) -> Picture:
    has_map = result.matrices is not None and name in result.matrices.files

    def draw(figure: Figure) -> None:
        if not has_map:
            result.plot.profile(name, ax=figure.add_subplot())
            return
        left, right = figure.subplots(1, 2)
        result.plot.profile(name, ax=left)
        result.plot.heatmap(name, ax=right)

    what = "which directions' variance changed, and which became correlated" if has_map else "whose variance changed"
    size = (10.0, 4.2) if has_map else (6.4, 4.4)
    return Picture(f"{start}{plain_letters(name)}.png", f"{printable(name)}: {what} (Eq. 11).", "", size, draw)
