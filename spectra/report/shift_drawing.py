"""The ink of the pictures of a covariance shift: arrays onto matplotlib Axes, in the styles of `drawing`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.report.drawing import (
    BLACK,
    BLUE,
    GREY,
    SKY,
    VERMILION,
    Array,
    is_wide,
    legend_below,
    letters,
    running_mean,
)
from spectra.report.wording import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CELLS = 256  # a side of the map
OWN: dict[str, Any] = {"color": BLUE, "linestyle": "-", "marker": "o"}
INHERITED: dict[str, Any] = {"color": VERMILION, "linestyle": "--", "marker": "s"}


def shift_profile(ax: Axes, total: Array, own: Array, inherited: Array | None) -> None:
    """Points for the total, running means for its parts; `inherited` None: all of it is the layer's own."""
    index = np.arange(len(total))
    few = len(total) < 30
    ax.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    ax.plot(index, total, linestyle="none", marker=".", markersize=3.5, color="0.55", label="each direction")
    lines = [(own, OWN, "own")] if inherited is None else [(own, OWN, "own"), (inherited, INHERITED, "inherited")]
    for values, style, word in lines:
        marked = {**style, "marker": style["marker"] if few else ""}
        ax.plot(index, running_mean(values), linewidth=1.5, markersize=4, label=f"{word}, smoothed", **marked)
    size = np.abs(total[np.isfinite(total)])
    if is_wide(size) and np.median(size) > 0:
        ax.set_yscale("symlog", linthresh=float(np.median(size)))
        ax.yaxis.minorticks_off()
        _few_ticks(ax)
    legend_below(ax, 2)


def _few_ticks(ax: Axes) -> None:
    """Of a symlog axis with many decades every second or third one, and zero always."""
    low, high = ax.get_ylim()
    ticks = [tick for tick in ax.get_yticks() if low <= tick <= high]
    room = 7
    if len(ticks) > room:
        every = -(-len(ticks) // room)
        negative = sorted(tick for tick in ticks if tick < 0)[::every]
        positive = sorted((tick for tick in ticks if tick > 0), reverse=True)[::every]
        ax.set_yticks([*negative, 0, *reversed(positive)])


def shift_map(ax: Axes, delta: Array, borders: Sequence[int], legend_text: str) -> None:
    """|entries| off the diagonal in logarithmic colours; a line at each border between slices."""
    from matplotlib.colors import LogNorm

    size = np.abs(delta)
    np.fill_diagonal(size, np.nan)
    grid = block_rms(size, MOST_CELLS)
    finite = grid[np.isfinite(grid) & (grid > 0)]
    low, high = (float(edge) for edge in np.percentile(finite, [2, 99.8])) if len(finite) else (0.1, 1.0)
    if high <= low:
        low, high = low / 1.1, high * 1.1
    k = len(delta)
    image = ax.imshow(
        grid, cmap="cividis", norm=LogNorm(low, high), interpolation="nearest", extent=(-0.5, k - 0.5, k - 0.5, -0.5)
    )
    for border in borders:
        ax.axhline(border - 0.5, color="white", linewidth=0.5)
        ax.axvline(border - 0.5, color="white", linewidth=0.5)
    figure = ax.get_figure(root=True)
    if figure is not None:
        bar = figure.colorbar(image, ax=ax, extend="both", pad=0.02)
        bar.set_label(legend_text, fontsize=letters(ax))
        bar.ax.tick_params(labelsize=letters(ax) - 1)
        if high < 10 * low:  # no power of ten lies inside
            bar.set_ticks(
                [low, (low * high) ** 0.5, high], labels=[f"{t:.1e}" for t in (low, (low * high) ** 0.5, high)]
            )
            bar.ax.minorticks_off()


def block_rms(values: Array, most: int) -> Array:
    """Root mean squares over blocks of a square array, at most `most` a side; NaN counts for nothing.

    >>> block_rms(np.array([[np.nan, 3.0], [4.0, np.nan]]), 1).round(3).tolist()
    [[3.536]]
    """
    size = len(values)
    if size <= most:
        return values
    edges = np.arange(0, size, -(-size // most))
    known = np.isfinite(values)
    sums, counts = (
        np.add.reduceat(np.add.reduceat(each, edges, axis=0), edges, axis=1)
        for each in (np.where(known, values, 0.0) ** 2, known.astype(np.float64))
    )
    means: Array = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return np.sqrt(means)


def depth_bands(ax: Axes, lines: Sequence[tuple[str, Array, Array, Array, Array]]) -> None:
    """For each (legend, blocks, lower quartile, median, upper quartile) a line of medians in a band of quartiles.

    The line whose legend begins with "own" has the style of own shifts, any other that of inherited ones.
    Zeros cannot be shown on a logarithmic axis; bands that reach them end at its foot.
    """
    from matplotlib.ticker import MaxNLocator

    positive = np.concatenate([each[each > 0] for line in lines for each in (line[3], line[4])])
    wide = is_wide(positive)
    foot = float(positive.min()) / 2 if wide else 0.0
    for name, where, low, middle, high in lines:
        is_own = name.startswith("own")
        style = OWN if is_own else INHERITED
        low, middle, high = (np.where(each > 0, each, foot if wide else 0.0) for each in (low, middle, high))
        ax.plot(where, middle, linewidth=1.6, markersize=4, label=name, **style)
        hatch = {"facecolor": SKY, "alpha": 0.35} if is_own else {"facecolor": "none", "hatch": "//"}
        edge = "none" if is_own else style["color"]
        ax.fill_between(where, low, high, edgecolor=edge, linewidth=0.0, label="middle half of it", zorder=1, **hatch)
    if wide:
        ax.set_yscale("log")
    ax.set_ylim(bottom=foot)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(ax, 2)


def histogram(ax: Axes, values: Array, mean: float, median: float) -> None:
    """How many samples have which value, logarithmic where positive values span decades; mean and median as lines."""
    from matplotlib.ticker import MaxNLocator

    wide = bool(np.all(values > 0)) and is_wide(values)
    count = int(np.clip(np.sqrt(len(values)) * 2, 5, 40))
    if values.min() == values.max():
        edges = np.array([values[0] - 0.5, values[0] + 0.5])
    elif wide:
        edges = np.geomspace(values.min(), values.max(), count + 1)
    else:
        edges = np.linspace(values.min(), values.max(), count + 1)
    ax.hist(values, bins=list(edges), color=SKY, edgecolor="white", linewidth=0.4)
    if wide:
        ax.set_xscale("log")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.axvline(mean, color=VERMILION, linestyle="--", linewidth=1.6, label=f"mean {number(mean)}")
    ax.axvline(median, color=BLACK, linestyle=":", linewidth=1.6, label=f"median {number(median)}")
    legend_below(ax, 2)
