"""Every edit equals its formula in float64, dense and as factors; every identity gives the update itself back."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectra.editing import Mitigation, Rewinding, Scaling, Truncation
from spectra.editing.heads import head_entries, shared_heads
from spectra.editing.operations import (
    change_norm,
    components,
    components_for,
    nearest_components,
    norm,
    rewound_components,
    rewound_entries,
    scaled,
    scaled_triplets,
    truncated,
)
from spectra.errors import SpectraError
from spectra.linalg.lowrank import LowRank
from spectra.linalg.svd import svd
from spectra.linalg.triplets import leading_triplets
from spectra.matrices import Matrix
from tests.reference import edits as reference
from tests.reference.singular import svd as reference_svd
from tests.strategies import seeds

sides = st.integers(4, 16)


def made(seed: int, m: int, n: int, is_low_rank: bool) -> tuple[torch.Tensor, Any, np.ndarray]:
    """W, an update of it in one of the two forms, and the update as an array."""
    generator = np.random.default_rng(seed)
    W = torch.from_numpy(generator.normal(size=(m, n)))
    if not is_low_rank:
        D = torch.from_numpy(generator.normal(size=(m, n)))
        return W, D, D.numpy()
    c = float(generator.choice([0.25, 1.0, -2.0]))
    factors = LowRank(
        torch.from_numpy(generator.normal(size=(m, 3))), torch.from_numpy(generator.normal(size=(3, n))), c
    )
    return W, factors, factors.dense().numpy()


def dense(D: Any) -> np.ndarray:
    return D.dense().numpy() if isinstance(D, LowRank) else D.numpy()


@given(seed=seeds, m=sides, n=sides, low=st.booleans(), factor=st.sampled_from([0.0, 0.3, 1.7, -1.0]))
def test_scaled_triplets_are_the_formula(seed: int, m: int, n: int, low: bool, factor: float) -> None:
    W, D, exact = made(seed, m, n, low)
    triplets = leading_triplets(W + torch.from_numpy(exact), 3)
    which = [0, 2]
    edited = scaled_triplets(D, triplets.Y[:, which], triplets.S[which], triplets.Z[:, which], factor)
    expected = reference.mitigated(W.numpy(), W.numpy() + exact, factor, which)
    np.testing.assert_allclose(W.numpy() + dense(edited), expected, atol=1e-9)
    if isinstance(edited, LowRank):
        assert edited.rank == D.rank + 2 and edited.c == D.c
        assert torch.equal(edited.A[:3], D.A) and torch.equal(edited.B[:, :3], D.B)
    assert scaled_triplets(D, triplets.Y[:, which], triplets.S[which], triplets.Z[:, which], 1.0) is D
    assert scaled_triplets(D, triplets.Y[:, :0], triplets.S[:0], triplets.Z[:, :0], factor) is D


@given(seed=seeds, m=sides, n=sides, low=st.booleans(), keep=st.sampled_from(["top", "bottom", "random"]))
def test_truncations_keep_the_components_that_they_name(
    seed: int, m: int, n: int, low: bool, keep: Literal["top", "bottom", "random"]
) -> None:
    _, D, exact = made(seed, m, n, low)
    count = 3 if low else min(m, n)
    found = dense(truncated(D, rank=2, keep=keep, seed=seed))
    choices = {"top": [[0, 1]], "bottom": [[count - 2, count - 1]],
               "random": [[i, j] for j in range(count) for i in range(j)]}  # fmt: skip
    distances = [np.abs(found - reference.truncated(exact, kept)).max() for kept in choices[keep]]
    assert min(distances) < 1e-9
    again = truncated(D, rank=2, keep=keep, seed=seed)
    assert np.array_equal(dense(again), found)
    assert truncated(D, rank=count, keep=keep) is D and truncated(D, energy=1.0, keep=keep) is D


@given(seed=seeds, m=sides, n=sides, low=st.booleans(), energy=st.sampled_from([0.2, 0.5, 0.9, 0.99]))
def test_an_energy_share_is_reached_by_the_fewest_components(
    seed: int, m: int, n: int, low: bool, energy: float
) -> None:
    _, D, exact = made(seed, m, n, low)
    s = reference_svd(exact).s
    count = components_for(components(D)[1], energy)
    assert (s[:count] ** 2).sum() >= energy * (s**2).sum() * (1 - 1e-9)
    assert (s[: count - 1] ** 2).sum() < energy * (s**2).sum()
    kept = truncated(D, energy=energy)
    assert norm(kept) ** 2 == pytest.approx((s[:count] ** 2).sum(), rel=1e-9)
    assert norm(truncated(D, energy=energy, keep="bottom")) <= norm(kept) * (1 + 1e-9)


@given(seed=seeds, m=sides, n=sides, low=st.booleans(), data=st.data())
def test_rewound_components_are_the_base_again(seed: int, m: int, n: int, low: bool, data: st.DataObject) -> None:
    W, D, exact = made(seed, m, n, low)
    start = data.draw(st.integers(0, min(m, n)))
    stop = data.draw(st.integers(start, min(m, n)))
    base = svd(W)
    edited = rewound_components(D, base, start, stop)
    tuned = W.numpy() + dense(edited)
    np.testing.assert_allclose(tuned, reference.rewound(W.numpy(), W.numpy() + exact, start, stop), atol=1e-9)
    U, V = base.U[:, start:stop].numpy(), base.V[:, start:stop].numpy()
    np.testing.assert_allclose(tuned @ V, W.numpy() @ V, atol=1e-9)  # W' v_i = s_i u_i
    np.testing.assert_allclose(tuned.T @ U, W.numpy().T @ U, atol=1e-9)
    assert (edited is D) == (start == stop)
    if isinstance(edited, LowRank):
        assert edited.rank == D.rank
    with pytest.raises(ValueError, match="do not lie"):
        rewound_components(D, base, 0, min(m, n) + 1)


@given(seed=seeds, m=sides, n=sides, low=st.booleans(), factor=st.sampled_from([0.0, 0.5, 2.0]))
def test_scaling_and_entries_and_norms(seed: int, m: int, n: int, low: bool, factor: float) -> None:
    _, D, exact = made(seed, m, n, low)
    np.testing.assert_allclose(dense(scaled(D, factor)), factor * exact, atol=1e-12)
    assert scaled(D, 1.0) is D
    rows, columns = np.zeros(m, bool), np.zeros(n, bool)
    assert rewound_entries(D, rows, columns) is D
    rows[1], columns[2:] = True, True
    expected = exact.copy()
    expected[1], expected[:, 2:] = 0, 0
    edited = rewound_entries(D, rows, columns)
    np.testing.assert_allclose(dense(edited), expected, atol=1e-12)
    assert norm(D) == pytest.approx(np.linalg.norm(exact))
    assert change_norm(D, edited) == pytest.approx(np.linalg.norm(exact - expected), abs=1e-9)
    assert change_norm(D, D) == 0


def test_the_control_takes_other_components_of_like_strength() -> None:
    base = svd(torch.diag(torch.tensor([9.0, 5.0, 4.0, 1.0])))
    assert nearest_components(base, torch.tensor([4.9, 4.8, 20.0])) == [1, 2, 0]
    assert nearest_components(base, torch.full((6,), 4.0)) == [2, 1, 3, 0]  # there are no more


CONFIG = {"hidden_size": 12, "num_attention_heads": 6, "num_key_value_heads": 2}


def matrix(role: str, rows: int = 12, columns: int = 12) -> Matrix:
    return Matrix("a.weight", "a.weight", "", role, 0, rows, columns)


def test_heads_are_rows_of_q_k_v_and_columns_of_the_output() -> None:
    rows, columns = head_entries(matrix("query"), CONFIG, [1, 4])  # type: ignore[misc]
    assert np.flatnonzero(rows).tolist() == [2, 3, 8, 9] and not columns.any()
    rows, columns = head_entries(matrix("attention_output"), CONFIG, [0])  # type: ignore[misc]
    assert np.flatnonzero(columns).tolist() == [0, 1] and not rows.any()
    rows, _ = head_entries(matrix("key", rows=4), CONFIG, [0, 1])  # type: ignore[misc]
    assert not rows.any()  # the key head is shared with query head 2
    rows, _ = head_entries(matrix("key", rows=4), CONFIG, [3, 4, 5])  # type: ignore[misc]
    assert np.flatnonzero(rows).tolist() == [2, 3]
    assert shared_heads(matrix("key", rows=4), CONFIG, [0, 1, 3, 4, 5]) == [0, 1]
    assert shared_heads(matrix("query"), CONFIG, [0, 1]) == [] == shared_heads(matrix("key", rows=4), CONFIG, range(6))
    assert head_entries(matrix("mlp_up"), CONFIG, [0]) == "has no heads"
    assert "not known" in str(head_entries(matrix("qkv"), CONFIG, [0]))


def test_heads_that_are_not_there_or_not_known_are_refused() -> None:
    with pytest.raises(SpectraError, match="heads 0 to 5"):
        head_entries(matrix("query"), CONFIG, [6])
    with pytest.raises(SpectraError, match="give the size"):
        head_entries(matrix("query"), {}, [0])
    with pytest.raises(SpectraError, match="do not fill"):
        head_entries(matrix("query"), {}, [0], size=5)
    rows, _ = head_entries(matrix("query"), {}, [2], size=4)  # type: ignore[misc]
    assert np.flatnonzero(rows).tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mitigation(factor=float("nan")),
        lambda: Mitigation(factor="0.5"),  # type: ignore[arg-type]
        lambda: Mitigation(k=0),
        lambda: Mitigation(equal_change=True),
        lambda: Mitigation(k=2.5),  # type: ignore[arg-type]
        lambda: Mitigation(epsilon="half"),  # type: ignore[arg-type]
        lambda: Scaling(float("inf")),
        lambda: Scaling("0.5"),  # type: ignore[arg-type]
        lambda: Scaling(True),
        lambda: Rewinding(heads=()),
        lambda: Rewinding(heads=range(3, 2)),
        lambda: Rewinding(heads="03"),  # type: ignore[arg-type]
        lambda: Rewinding(heads=3),  # type: ignore[arg-type]
        lambda: Rewinding(heads=[0.5]),  # type: ignore[list-item]
        lambda: Rewinding(heads=[-1]),
        lambda: Rewinding(head_size=4),
        lambda: Rewinding(components=(0, 2.5)),  # type: ignore[arg-type]
        lambda: Rewinding(components=(4,)),  # type: ignore[arg-type]
        lambda: Rewinding(components=(0, 4), heads=[1]),
        lambda: Truncation(rank=2.5),  # type: ignore[arg-type]
        lambda: Truncation(energy="0.9"),  # type: ignore[arg-type]
        lambda: Truncation(rank=1, seed=1.5),  # type: ignore[arg-type]
        lambda: Mitigation(side="up"),  # type: ignore[arg-type]
        lambda: Truncation(),
        lambda: Truncation(rank=1, energy=0.5),
        lambda: Truncation(energy=1.5),
        lambda: Truncation(rank=0),
    ],
)
def test_edits_that_make_no_sense_are_refused(make: Any) -> None:
    with pytest.raises(SpectraError):
        make()


def test_numbers_of_any_library_are_taken_as_python_s_own() -> None:
    assert Rewinding(heads=np.arange(2)).heads == (0, 1)  # type: ignore[arg-type]
    assert type(Scaling(np.float32(0.5)).factor) is float and type(Truncation(rank=np.int64(2)).rank) is int  # type: ignore[arg-type]


def test_random_choices_differ_between_matrices_and_not_between_runs() -> None:
    from spectra.editing.edits import _seed_for

    assert _seed_for("a", 0) == _seed_for("a", 0)
    assert len({_seed_for(name, seed) for name in "abc" for seed in range(3)}) == 9
