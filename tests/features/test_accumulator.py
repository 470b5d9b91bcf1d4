"""Moments of a stream: one pass, any partition, any order, half precision, masks, and going on from a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from spectra.errors import SpectraError
from spectra.features.accumulator import CovarianceAccumulator, CrossAccumulator
from tests.reference import covariance as brute

seeds = st.integers(0, 2**32 - 1)


def rows(seed: int, count: int, size: int, offset: float = 3.0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(offset * generator.normal(size=size) + generator.normal(size=(count, size)))


def seen(*parts: torch.Tensor, **options: object) -> CovarianceAccumulator:
    found = CovarianceAccumulator(parts[0].shape[-1], **options)  # type: ignore[arg-type]
    for part in parts:
        found.update(part)
    return found


@given(seeds, st.integers(1, 6), st.lists(st.integers(0, 7), min_size=1, max_size=6), st.randoms())
def test_any_partition_in_any_order_is_one_pass(seed: int, size: int, counts: list[int], random: object) -> None:
    x = rows(seed, sum(counts) + 1, size)
    parts = list(torch.split(x, [*counts, 1]))
    random.shuffle(parts)  # type: ignore[attr-defined]
    expected = brute.covariance(x.numpy())
    one_by_one = seen(*parts)
    merged = CovarianceAccumulator(size)
    for part in parts:
        merged.merge(seen(part))
    tree = seen(*parts[: len(parts) // 2] or parts[:1]).merge(seen(*parts[len(parts) // 2 or 1 :] or [x[:0]]))
    for found in (one_by_one, merged, tree):
        assert found.count == len(x)
        np.testing.assert_allclose(found.mean.numpy(), x.numpy().mean(0), atol=1e-12)
        np.testing.assert_allclose(found.covariance().numpy(), expected, atol=1e-10 * max(1.0, np.trace(expected)))
        np.testing.assert_allclose(
            found.covariance(centred=False).numpy(), brute.covariance(x.numpy(), centred=False), atol=1e-10
        )


def test_merging_leaves_the_other_as_it_was() -> None:
    one, other = seen(rows(0, 5, 3)), seen(rows(1, 4, 3))
    before = other.covariance()
    copied = one.copy()
    one.merge(other).merge(other)
    assert torch.equal(other.covariance(), before)
    assert (other.count, copied.count, one.count) == (4, 5, 13)
    empty = CovarianceAccumulator(3).merge(other)
    empty.update(rows(2, 6, 3))
    assert torch.equal(other.covariance(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float32_products_are_good_to_1e_6(dtype: torch.dtype) -> None:
    """Also far from the origin, where the second moment would lose the covariance."""
    x = (rows(0, 3000, 40, offset=100.0) * torch.logspace(0, -2, 40)).to(dtype)
    expected = torch.from_numpy(np.cov(x.double().numpy().T, bias=True))
    error = torch.linalg.norm(seen(*x.split(700), dtype=torch.float32).covariance() - expected)
    assert error < 1e-6 * torch.linalg.norm(expected)
    exact = seen(*x.split(700)).covariance()
    assert torch.linalg.norm(exact - expected) < 1e-13 * torch.linalg.norm(expected)


def test_float64_vectors_are_squared_in_float64_whatever_was_asked() -> None:
    x = rows(0, 500, 5)
    np.testing.assert_allclose(
        seen(x, dtype=torch.float32).covariance().numpy(), brute.covariance(x.numpy()), atol=1e-13
    )


def test_padding_does_not_count_and_leading_shapes_do_not_matter() -> None:
    x = rows(0, 24, 4).reshape(2, 3, 4, 4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).repeat(2, 1, 1)
    found = CovarianceAccumulator(4)
    found.update(x, mask)
    kept = x[mask.bool()].numpy()
    assert found.count == len(kept) == 14
    np.testing.assert_allclose(found.covariance().numpy(), brute.covariance(kept), atol=1e-13)


def test_bad_input_is_refused_with_the_name_of_the_layer() -> None:
    found = CovarianceAccumulator(3, name="h.0.mlp")
    bad = torch.ones(4, 3)
    bad[1, 2], bad[2, 0] = torch.nan, torch.inf
    with pytest.raises(SpectraError, match=r"h\.0\.mlp: the input holds 1 NaN and 1 infinite among its 12 entries"):
        found.update(bad)
    with pytest.raises(SpectraError, match=r"h\.0\.mlp: vectors of 3 entries are expected"):
        found.update(torch.ones(4, 2))
    with pytest.raises(SpectraError, match="the mask is"):
        found.update(torch.ones(4, 3), torch.ones(3))
    with pytest.raises(SpectraError, match="cannot be merged"):
        found.merge(CovarianceAccumulator(2))
    with pytest.raises(SpectraError, match="at least one entry"):
        CovarianceAccumulator(0)
    assert found.count == 0
    assert torch.isnan(found.covariance()).all()


def test_a_saved_stream_goes_on(tmp_path: Path) -> None:
    x = rows(0, 30, 4)
    path = seen(x[:11], name="fc").save(tmp_path / "moments.safetensors")
    again = CovarianceAccumulator.load(path)
    again.update(x[11:])
    assert (again.name, again.count) == ("fc", 30)
    np.testing.assert_allclose(again.covariance().numpy(), brute.covariance(x.numpy()), atol=1e-12)
    assert [file.name for file in tmp_path.iterdir()] == ["moments.safetensors"]


def test_what_is_no_saved_stream_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"no safetensors")
    for path in (tmp_path / "broken", tmp_path / "absent"):
        with pytest.raises(SpectraError, match="holds no saved moments"):
            CovarianceAccumulator.load(path)
    with pytest.raises(SpectraError, match="cannot write the moments"):
        CovarianceAccumulator(2).save(tmp_path / "missing" / "moments.safetensors")


@given(seeds, st.lists(st.integers(0, 7), min_size=1, max_size=5))
def test_cross_moments_of_any_partition(seed: int, counts: list[int]) -> None:
    x, y = rows(seed, sum(counts) + 2, 3), rows(seed + 1, sum(counts) + 2, 5)
    expected = (x - x.mean(0)).T @ (y - y.mean(0)) / len(x)
    found, merged = CrossAccumulator(), CrossAccumulator()
    for a, b in zip(x.split([*counts, 2]), y.split([*counts, 2]), strict=True):
        found.update(a, b)
        part = CrossAccumulator()
        part.update(a, b)
        merged.merge(part)
    for each in (found, merged):
        np.testing.assert_allclose(each.covariance().numpy(), expected.numpy(), atol=1e-10)
    with pytest.raises(ValueError, match="paired"):
        found.update(x[:1], y[:2])


@pytest.mark.parametrize("scale", [1e25, 3e38, 1e-25])
def test_what_float32_cannot_square_is_squared_in_float64(scale: float) -> None:
    x = torch.rand(100, 3, generator=torch.Generator().manual_seed(0)).sub(0.5).mul(2).mul(scale)
    expected = np.cov(x.double().numpy().T, bias=True)
    found = seen(x, dtype=torch.float32).covariance().numpy()
    np.testing.assert_allclose(found / scale**2, expected / scale**2, rtol=1e-6)
    cross = CrossAccumulator(torch.float32)
    cross.update(x, x[:, :2])
    np.testing.assert_allclose(cross.covariance().numpy() / scale**2, expected[:, :2] / scale**2, rtol=1e-6)
    with pytest.raises(SpectraError, match=r"as large as 1\.0e\+200, whose squares are beyond float64"):
        seen(torch.tensor([[1e200], [-1e200]], dtype=torch.float64))


def test_a_refused_batch_leaves_nothing_behind() -> None:
    x = rows(0, 5000, 2)
    x[4500, 1] = torch.nan
    found = CovarianceAccumulator(2)
    with pytest.raises(SpectraError, match="1 NaN"):
        found.update(x)
    assert found.count == 0


def test_what_is_no_tensor_is_refused_in_a_sentence() -> None:
    found = CovarianceAccumulator(3, name="fc")
    with pytest.raises(SpectraError, match="fc: the batch is a ndarray"):
        found.update(np.ones((2, 3)))  # type: ignore[arg-type]
    with pytest.raises(SpectraError, match="fc: the mask is a list"):
        found.update(torch.ones(2, 3), [1, 0])  # type: ignore[arg-type]
    with pytest.raises(SpectraError, match="fc: a int cannot be merged"):
        found.merge(5)  # type: ignore[arg-type]
    with pytest.raises(SpectraError, match=r"the size given is 2\.5"):
        CovarianceAccumulator(2.5)  # type: ignore[arg-type]


def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    tensors = {"mean": torch.zeros(2).double(), "moment": torch.zeros(2, 2).double()}
    described = {"count": 3, "size": 5, "name": "", "dtype": "torch.float64"}
    for metadata in ([1, 2], described, described | {"size": "2"}, described | {"size": 2, "count": 0}):
        save_file(tensors, tmp_path / "moments", metadata={"accumulator": json.dumps(metadata)})
        with pytest.raises(SpectraError, match="holds no saved moments"):
            CovarianceAccumulator.load(tmp_path / "moments")
