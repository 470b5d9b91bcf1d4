"""How the files of a figure are written."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure


def write(figures: dict[str, Figure], folder: Path) -> None:
    """Each figure as PDF and as PNG, the same bytes for the same numbers."""
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
        figure.savefig(folder / f"{name}.png", dpi=200, metadata={"Software": None})
