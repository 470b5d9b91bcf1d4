"""The README's picture: stability and plasticity as in "Least but not Last" (arXiv 2602.03493), on real weights.

For every component of the 72 matrices of the blocks of a BERT of reaction SMILES (package rxnfp, k = 256 each) and its
two full fine-tunings: how well it kept its place (stability), and how much of the update it carries (plasticity, times
k). Lines are medians over the matrices, bands hold the middle half of them.

    python figures/stability_profile.py          draws profile.pdf and profile.png from profile.csv
    python figures/stability_profile.py --run    makes profile.csv first (needs `pip install --no-deps rxnfp==0.1.0`)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import spectra
from spectra.demo import real_pair

HERE = Path(__file__).resolve().parent
TABLE = HERE / "profile.csv"
QUARTILES = {"lower": 0.25, "median": 0.5, "upper": 0.75}
STYLES = {"10k": ("#0072B2", "-", "bert_ft_10k_25s"), "ft": ("#D55E00", "--", "bert_ft")}


def run() -> pd.DataFrame:
    """Compare the real pair; quartiles over the blocks' matrices, a row per (tuned, component)."""
    base, tuned = real_pair()
    result = spectra.compare(base, tuned)
    blocks = result.layers[result.layers["layer"].notna()][["tuned", "name", "rows", "columns"]]
    rows = result.components.merge(blocks, on=["tuned", "name"])
    rows["plasticity"] *= rows[["rows", "columns"]].min(axis=1)
    columns: dict[str, pd.Series[float]] = {}
    for quantity in ("stability", "plasticity"):
        values = rows.groupby(["tuned", "component"])[quantity]
        columns |= {f"{quantity}_{name}": values.quantile(quartile) for name, quartile in QUARTILES.items()}
    return pd.DataFrame(columns).reset_index()


def draw(table: pd.DataFrame) -> Figure:
    """Two panels: stability and plasticity against component index, a line and a band per tuned model."""
    figure = Figure(figsize=(7.2, 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    panel(left, table, "stability", "Trailing components lose their place", "stability (1 = unmoved)")
    panel(right, table, "plasticity", "Leading components carry the change", r"plasticity $\times\,k$ (1 = even share)")
    left.set_ylim(top=1.02)
    right.set_yscale("log")
    right.set_yticks([0.3, 0.5, 1, 2, 4], ["0.3", "0.5", "1", "2", "4"])
    right.minorticks_off()
    right.axhline(1, color="0.4", linestyle=":", linewidth=1, zorder=1)
    left.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def panel(ax: Axes, table: pd.DataFrame, quantity: str, title: str, label: str) -> None:
    """One quantity of both tuned models."""
    for tuned, rows in table.groupby("tuned"):
        color, line, name = STYLES[str(tuned)]
        component = rows["component"].to_numpy()
        lower, middle, upper = (rows[f"{quantity}_{quartile}"].to_numpy() for quartile in QUARTILES)
        ax.fill_between(component, lower, upper, color=color, alpha=0.2, linewidth=0)
        ax.plot(component, middle, color=color, linestyle=line, linewidth=1.4, label=name)
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_xlabel(r"component $i$, by falling $s_i$ of the base", fontsize=8)
    ax.set_ylabel(label, fontsize=8)
    ax.tick_params(labelsize=8)


def main() -> None:
    """Read or make the table, then write the picture in both formats."""
    parser = argparse.ArgumentParser(description="Draw the stability-plasticity picture of a real pair.")
    parser.add_argument("--run", action="store_true", help="make profile.csv first")
    if parser.parse_args().run:
        run().to_csv(TABLE, index=False, float_format="%.5g")
    figure = draw(pd.read_csv(TABLE))
    figure.savefig(HERE / "profile.pdf", metadata={"CreationDate": None})
    figure.savefig(HERE / "profile.png", dpi=200, metadata={"Software": None})


if __name__ == "__main__":
    main()
