"""The figure of intruder dimensions: its tables are those of the real pair, and its claims hold in them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import spectra

FIGURES = Path(__file__).resolve().parents[1] / "figures"
needs_pair = pytest.mark.skipif(find_spec("rxnfp") is None, reason="the package rxnfp, with the weights, is missing")


def table(name: str) -> pd.DataFrame:
    path = FIGURES / f"intruders_{name}.csv"
    if not path.exists():
        pytest.skip(f"{path.name} was not made yet")
    return pd.read_csv(path)


@needs_pair
def test_counts_are_those_of_float64_decompositions() -> None:
    """Of every block matrix of one layer, by three full decompositions as the published script does it."""
    from spectra.demo import real_pair

    base, tuned = real_pair()
    W, T = spectra.open_checkpoint(base), spectra.open_checkpoint(tuned["ft"])
    cells = table("similarity")
    for name in cells["name"].unique():
        before, after = (torch.linalg.svd(X.double()).U for X in (W[name], T[name.removeprefix("bert.")]))
        cosines = (before.T @ after).abs()[:, :20].numpy()
        grid = cells[cells["name"] == name].pivot(index="i", columns="j", values="cosine").to_numpy()
        np.testing.assert_allclose(grid, cosines[:20], atol=1e-5)
        best = cells[cells["name"] == name].groupby("j")["best_cosine"].first()
        # Left vectors of a tall matrix beyond its short side belong to no singular value.
        short = min(W[name].shape)
        np.testing.assert_allclose(best, cosines[:short].max(0), atol=1e-5)


@needs_pair
def test_counts_at_the_published_threshold_are_those_of_the_diagnosis() -> None:
    from spectra.demo import real_pair

    base, tuned = real_pair()
    some = ("*layer.11.*", "*pooler*")
    counts = table("epsilon")
    at_half = counts[(counts["side"] == "left") & (counts["epsilon"] == 0.5)].set_index("tuned")
    layers = spectra.compare(base, tuned, include=some).layers
    for label, rows in layers.groupby("tuned"):
        assert at_half.loc[label, "intruders"] >= rows["intruders"].sum() > 0


def test_counts_rise_with_the_threshold_up_to_all_directions() -> None:
    counts = table("epsilon")
    for _, rows in counts.groupby(["tuned", "side"]):
        assert rows["intruders"].is_monotonic_increasing
        assert rows["intruders"].iloc[0] == 0
        assert rows["intruders"].iloc[-1] > 700


def test_ranks_are_of_every_block_matrix() -> None:
    ranks = table("rank")
    assert ranks.groupby("tuned").size().tolist() == [72, 72]
    assert ranks["effective_rank"].between(1, 256).all()


def test_triangles_mark_the_intruders_that_the_title_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FIGURES)
    intruders = import_module("intruders")
    figure = intruders.real({name: table(name) for name in intruders.REAL})
    figure.canvas.draw()
    counts = []
    for ax in figure.axes[2:4]:
        marked = [line.get_xdata() for line in ax.lines]
        title = ax.get_title(loc="left")
        assert title.endswith(f": {sum(map(len, marked))} of the top 10")
        assert all((np.asarray(at) < 10).all() for at in marked)
        counts.append(sum(map(len, marked)))
    assert counts[0] > 0 == counts[1]


def test_lambda_one_is_the_tuned_model_and_zero_takes_intruders_out() -> None:
    scores = table("lambda")
    for _, rows in scores.groupby(["method", "learning_rate", "seed"]):
        same = rows[rows["lambda"] == 1]
        assert same["score"].nunique() == same["old_score"].nunique() == 1
        assert (same["intruders_scaled"] == 0).all()
    scaled = scores[(scores["which"] == "all") & ~scores["control"] & (scores["lambda"] == 0)]
    assert (scaled["intruders_scaled"] > 0).any()


def test_the_second_control_moves_the_weights_as_far_as_the_intruders_do() -> None:
    scores = table("lambda").set_index(["method", "learning_rate", "seed", "which", "lambda"])
    of_intruders, same_lambda = (scores[scores["control"] == control] for control in (False, True))
    as_far = same_lambda[same_lambda["equal_change"]]["change_norm"]
    same_lambda = same_lambda[~same_lambda["equal_change"]]
    np.testing.assert_allclose(as_far, of_intruders["change_norm"].loc[as_far.index], rtol=1e-3, atol=1e-3)
    assert (same_lambda["change_norm"] <= of_intruders["change_norm"].loc[same_lambda.index] + 1e-3).all()


def test_every_run_of_the_training_is_there() -> None:
    runs = table("runs")
    assert set(runs["method"]) == {"lora", "full"}
    assert not runs.duplicated(["method", "rank", "learning_rate", "steps", "seed"]).any()
    assert runs[["score", "forgetting", "intruders", "effective_rank"]].notna().all(axis=None)
