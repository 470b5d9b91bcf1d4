"""The ink of every picture: arrays onto matplotlib Axes, in styles that survive grey print and colour blindness."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spectra.report.wording import number, printable, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]

BLUE, SKY, GREEN, YELLOW = "#0072B2", "#56B4E9", "#009E73", "#F0E442"
ORANGE, VERMILION, PINK, BLACK, GREY = "#E69F00", "#D55E00", "#CC79A7", "#000000", "#767676"
COLUMN_WIDTH = 3.4  # inches: axes on a figure this narrow get smaller letters
LINES: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "linestyle": "-", "marker": "o"},
    {"color": VERMILION, "linestyle": "--", "marker": "s"},
    {"color": GREEN, "linestyle": "-.", "marker": "^"},
    {"color": PINK, "linestyle": ":", "marker": "D"},
    {"color": BLACK, "linestyle": "-", "marker": "x"},
    {"color": SKY, "linestyle": "--", "marker": "v"},
    {"color": ORANGE, "linestyle": "-.", "marker": "P"},
    {"color": GREY, "linestyle": ":", "marker": "*"},
)
SHARES: tuple[dict[str, Any], ...] = (
    {"color": BLACK, "label": "singular values"},
    {"color": SKY, "label": "directions", "hatch": "//"},
    {"color": YELLOW, "label": "outside", "hatch": ".."},
)


def plain(name: str) -> str:
    """An untrusted name as matplotlib text: no mathematics, no control characters, only letters that the font has."""
    return "".join(
        letter if ord(letter) < 0x250 else letter.encode("unicode_escape").decode("ascii") for letter in printable(name)
    ).replace("$", r"\$")


def inches(ax: Axes) -> tuple[float, float]:
    """Width and height of the axes as they stand before any layout."""
    figure, box = ax.get_figure(root=True), ax.get_position()
    if figure is None:
        return COLUMN_WIDTH, COLUMN_WIDTH
    return box.width * figure.get_figwidth(), box.height * figure.get_figheight()


def letters(ax: Axes) -> float:
    """Font size for axes of this width, in points."""
    return float(np.clip(6.0 + 0.8 * inches(ax)[0], 7.0, 10.0))


def label(ax: Axes, message: str, subject: str, x: str, y: str) -> None:
    """Title (its one message, then what it is about, each within the width) and axis labels, in letters that fit.

    A message of two lines takes the subject onto its second one.
    """
    size = letters(ax)
    width = max(20, int(inches(ax)[0] * 72 / (size * 0.56)))
    lines = textwrap.wrap(message[:1].upper() + message[1:], width)
    room = width - len(lines[-1]) - len(" - ")
    if len(lines) > 1 and room >= min(10, len(subject)):
        lines[-1] += f" - {plain(shorten(subject, room))}"
    else:
        lines.append(plain(shorten(subject, width)))
    ax.set_title("\n".join(lines), fontsize=size, loc="left", y=1.0)
    ax.set_xlabel(x, fontsize=size)
    ax.set_ylabel(y, fontsize=size)
    ax.tick_params(labelsize=size - 1)


def legend_below(ax: Axes, columns: int, gap: float = 3.6, handles: Sequence[Any] | None = None) -> None:
    """A legend under the axis label, where it hides nothing; `gap` in letter heights makes room for tick labels."""
    from matplotlib.transforms import ScaledTranslation

    figure, size = ax.get_figure(root=True), letters(ax)
    if figure is None:
        return
    below = ax.transAxes + ScaledTranslation(0, -gap * size / 72, figure.dpi_scale_trans)
    ax.legend(
        handles=ax.get_legend_handles_labels()[0] if handles is None else handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=below,
        ncols=columns,
        frameon=False,
        fontsize=size - 1,
        borderaxespad=0,
        handlelength=2.4,
        columnspacing=1.2,
        labelspacing=0.3,
    )


def shade(ax: Axes, slices: Sequence[tuple[int, int]]) -> None:
    """Every other slice [start, stop) as a pale band, so that all borders show."""
    for start, stop in slices[::2] if len(slices) > 1 else slices:
        ax.axvspan(start - 0.5, stop - 0.5, color="0.93", zorder=0, linewidth=0)


def is_wide(values: Array) -> bool:
    """Whether positive values span enough decades for a logarithmic axis."""
    positive = values[np.isfinite(values) & (values > 0)]
    return len(positive) > 1 and bool(positive.max() > 50 * positive.min())


def profile(ax: Axes, stability: Array, plasticity: Array, slices: Sequence[tuple[int, int]]) -> None:
    """Stability (left axis, line) and plasticity (right axis, points, running mean) against component index."""
    k = len(stability)
    component = np.arange(k)
    dots = "o" if k < 30 else ""
    (stable,) = ax.plot(component, stability, color=BLUE, linewidth=1.6, marker=dots, markersize=4, label="stability")
    finite = stability[np.isfinite(stability)]
    low = float(finite.min()) if len(finite) else 0.0
    ax.set_ylim(low - 0.05 * max(1 - low, 1e-3), 1 + 0.03 * max(1 - low, 1e-3))
    right = ax.twinx()
    shade(right, slices)
    (single,) = right.plot(component, plasticity, linestyle="none", marker="s", markersize=2.2, color=VERMILION)
    single.set(alpha=0.45, label="plasticity, one component each")
    mean = running_mean(plasticity)
    (plastic,) = right.plot(component, mean, color=VERMILION, linestyle="--", linewidth=1.6, label="running mean of it")
    null = right.axhline(1 / k, color=GREY, linestyle=":", linewidth=1.2, label=f"even share 1/{k}")
    if is_wide(plasticity):
        right.set_yscale("log")
    else:
        right.set_ylim(bottom=0)
    size = letters(ax)
    right.set_ylabel(r"plasticity, share of $\|D\|_F^2$", fontsize=size)
    right.tick_params(labelsize=size - 1)
    ax.set_zorder(right.get_zorder() + 1)
    ax.patch.set_visible(False)
    legend_below(ax, 2, handles=[stable, null, single, plastic])


def running_mean(values: Array) -> Array:
    """Mean over a window of about a fortieth of the components, shrinking at both ends; NaN counts for nothing."""
    half = max(1, len(values) // 80) if len(values) > 20 else 0
    known = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    mean: Array = (total[high] - total[low]) / np.where(count[high] > count[low], count[high] - count[low], np.nan)
    return mean


def bin_means(values: Array, bins: int) -> Array:
    """Means over `bins` equal stretches; a value on a border counts for both by its share. NaN counts for nothing."""
    known = np.isfinite(values)
    edges, steps = np.arange(bins + 1) * len(values) / bins, np.arange(len(values) + 1)
    total, count = (
        np.diff(np.interp(edges, steps, np.concatenate([[0.0], np.cumsum(each)])))
        for each in (np.where(known, values, 0.0), known)
    )
    means: Array = np.divide(total, count, out=np.full(bins, np.nan), where=count > 1e-9)
    return means


def spectrum(ax: Axes, base: Array, tuned: Array, update: Array) -> None:
    """Singular values of W, W' and D in descending order, logarithmic; zeros cannot be shown and are left out."""
    marker = "o" if len(base) < 30 else ""
    styles: tuple[dict[str, Any], ...] = (
        {"color": "0.7", "linestyle": "-", "linewidth": 3, "label": r"base $s_i$"},
        {"color": BLUE, "linestyle": "--", "linewidth": 1.5, "label": r"tuned $s'_i$"},
        {"color": VERMILION, "linestyle": "-.", "linewidth": 1.5, "label": r"update $s_i(D)$"},
    )
    for values, style in zip((base, tuned, update), styles, strict=True):
        ax.plot(np.arange(len(values)), np.where(values > 0, values, np.nan), marker=marker, **style)
    if any(np.any(values > 0) for values in (base, tuned, update)):
        ax.set_yscale("log")
        ax.yaxis.minorticks_off()
    legend_below(ax, 3)


def stacked_shares(ax: Axes, groups: Sequence[str], shares: Sequence[Array], null: Array, enrichment: Array) -> None:
    """A lying bar per group: shares of the energy of the update, and how often the diagonal holds its random share."""
    size = letters(ax)
    place = np.arange(len(groups))
    left = np.zeros(len(groups))
    for values, style in zip(shares, SHARES, strict=True):
        ax.barh(place, values, left=left, height=0.8, edgecolor="white", linewidth=0.4, **style)
        left = left + np.nan_to_num(values)
    mark: dict[str, Any] = {"marker": "|", "markersize": size + 2, "markeredgewidth": 1.6, "color": VERMILION}
    ax.plot(null, place, linestyle="none", clip_on=False, zorder=5, label="singular values if random", **mark)
    for at, times in enumerate(enrichment):
        ax.text(1.015, at, f"{number(float(times), 2)} x random", va="center", fontsize=size - 1)
    thin_ticks(ax, list(place), groups)
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.set_xlim(0, 1)
    ax.set_xticks(np.linspace(0, 1, 6))
    legend_below(ax, 2, gap=5.0)


def slice_bars(
    ax: Axes, names: Sequence[str], block: Array, cross: Array, block_null: Array, cross_null: Array
) -> None:
    """For each slice the share of its block and of its cross, each with what a random update would put there."""
    place = np.arange(len(names))
    mark: dict[str, Any] = {"linestyle": "none", "marker": "_", "markersize": 9, "markeredgewidth": 2}
    for offset, values, null, color, hatch, name in (
        (-0.2, block, block_null, BLUE, "", "block"),
        (0.2, cross, cross_null, YELLOW, "//", "cross"),
    ):
        ax.bar(place + offset, values, 0.38, edgecolor=BLACK, linewidth=0.5, color=color, hatch=hatch, label=name)
        ax.plot(place + offset, null, color=VERMILION, label="if random" if name == "cross" else "", **mark)
    ax.set_xticks(place, names, rotation=45 if len(names) > 4 else 0)
    legend_below(ax, 3, gap=6.5 if len(names) > 4 else 3.6)


def thin_ticks(ax: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    """Names along the vertical axis, as many as there is height for."""
    every = max(1, math.ceil(len(names) * letters(ax) * 1.15 / (72 * inches(ax)[1])))
    ax.set_yticks(list(places)[::every], [plain(name) for name in names][::every])


def heatmap(ax: Axes, grid: Array, groups: Sequence[str], legend_text: str, spread: str) -> None:
    """A row per matrix, in order of depth, a column per stretch of components; a name and a line per group of rows.

    Args:
        grid: values (matrices, bins); NaN cells stay white.
        groups: the group of each row; equal neighbours are named once.
        spread: "ratio" (positive, logarithmic, outer percentiles clipped) or "linear".
    """
    from matplotlib.colors import LogNorm, Normalize

    finite = grid[np.isfinite(grid) & (grid > 0)] if spread == "ratio" else grid[np.isfinite(grid)]
    low, high = (float(edge) for edge in np.percentile(finite, [1, 99])) if len(finite) else (0.1, 1.0)
    if high <= low:
        low, high = (low / 1.1, high * 1.1) if spread == "ratio" else (low - 0.05, high + 0.05)
    norm = LogNorm(low, high) if spread == "ratio" else Normalize(low, high)
    image = ax.imshow(
        grid, aspect="auto", interpolation="nearest", cmap="cividis", norm=norm, extent=(0, 1, len(grid), 0)
    )
    starts = [at for at, group in enumerate(groups) if at == 0 or group != groups[at - 1]]
    for at in starts[1:]:
        ax.axhline(at, color="white", linewidth=min(0.5, 10 / len(starts)))
    thin_ticks(ax, np.mean([starts, [*starts[1:], len(groups)]], axis=0), [groups[at] for at in starts])
    figure = ax.get_figure(root=True)
    if figure is not None:
        bar = figure.colorbar(image, ax=ax, extend="both", pad=0.02)
        bar.set_label(legend_text, fontsize=letters(ax))
        bar.ax.tick_params(labelsize=letters(ax) - 1)
        if spread == "ratio":
            ticks = [tick for tick in (0.01, 0.03, 0.1, 0.3, 0.5, 1, 2, 3, 5, 10, 30, 100) if low <= tick <= high]
            bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
            bar.ax.minorticks_off()


def depth_lines(ax: Axes, lines: Sequence[tuple[str, Array, Array]], null: float | None) -> None:
    """A line with its own marker and dash per role: (name, layers, values); `null` is what a random update gives."""
    from matplotlib.ticker import MaxNLocator

    for (name, layers, values), style in zip(lines, LINES * (len(lines) // len(LINES) + 1), strict=False):
        ax.plot(layers, values, label=plain(name), linewidth=1.2, markersize=4, **style)
    if null is not None:
        ax.axhline(null, color=GREY, linestyle=(0, (1, 1)), linewidth=1, label=f"if random ({number(null, 2)})")
    values = np.concatenate([line[2] for line in lines])
    if is_wide(values):
        ax.set_yscale("log")
    elif np.nanmin(values) >= 0:
        ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(ax, 3)
