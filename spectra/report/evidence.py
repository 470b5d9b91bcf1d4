"""What a sentence of diagnosis rests on, and what it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.report import summary

if TYPE_CHECKING:
    import pandas as pd

    from spectra.comparison import Comparison

NOTABLE = 1.25  # a ratio below this is not worth calling a difference
NAME_WIDTH = 80

Numbers = dict[str, float | int | str]


@dataclass(frozen=True)
class Finding:
    """One sentence of diagnosis (two where the second says what the first means).

    Attributes:
        text: the sentence. Untrusted names in it are made printable; it is plain text, to be escaped for HTML.
        numbers: what led to it, by name: every one of them is written in `text`.
        tuned: the tuned model that it is about; the labels joined by ", " where it is about several.
        matrices: names (as in `layers`) of the matrices that it points at; empty where it is about all.
    """

    text: str
    numbers: Numbers
    tuned: str
    matrices: list[str]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Evidence:
    """The rows that speak about one tuned model."""

    tuned: str
    layers: pd.DataFrame  # every row
    typical: pd.DataFrame  # compared, without outliers
    outliers: pd.DataFrame
    components: pd.DataFrame  # of the typical matrices
    slices: pd.DataFrame  # of the typical matrices
    top: int = 10  # leading directions held against the base
    epsilon: float = 0.5  # |cos| under which one of them is an intruder

    @property
    def compared(self) -> pd.DataFrame:
        """Every row that carries measures, outliers too."""
        return summary.compared(self.layers)


def gather(result: Comparison, tuned: str) -> Evidence:
    """The evidence of a comparison about one tuned model."""
    layers = summary.rows_of(result, tuned)
    moved = summary.compared(layers)
    apart = moved[summary.is_outlier(layers)[moved.index]]
    typical = moved.drop(apart.index)
    components, slices = (
        table[(table["tuned"] == tuned) & table["name"].isin(typical["name"])]
        for table in (result.components, result.slices)
    )
    return Evidence(tuned, layers, typical, apart, components, slices, *summary.leading(result))
