"""Where the factors start, and what one step of gradient descent makes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spectra.errors import SpectraError
from spectra.lora import lora_ga_init, lora_init, mean_gradients, random_init, slice_init
from spectra.lora.configuration import SliceConfig
from tests.reference import lora as reference
from tests.reference.singular import svd


def made(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stepped(init: Any, G: Tensor, step: float) -> Tensor:
    """D after torch's own SGD on <G, c B A>, whose gradient by the weight is G."""
    A, B = (nn.Parameter(factor.clone()) for factor in (init.A0, init.B0))
    optimiser = torch.optim.SGD([A, B], lr=abs(step), maximize=step < 0)
    (init.scaling * (B @ A) * G).sum().backward()
    optimiser.step()
    return init.scaling * (B @ A - init.B0 @ init.A0).detach()


@pytest.mark.parametrize("shape", [(18, 18), (12, 30), (30, 12)])
@pytest.mark.parametrize("start", [0, 5, 9])
def test_the_first_step_on_a_slice_moves_the_cross_through_it(shape: tuple[int, int], start: int) -> None:
    """C_ij = -eta c G_ij (s_i [i in slice] + s_j [j in slice]), and nothing else but terms of second order."""
    W, G = made(*shape), made(*shape, seed=1)
    rank, c, step = 3, 2.0, 1e-3
    init = slice_init(W, start=start, rank=rank, scaling=c)
    D = stepped(init, G, step).numpy()
    exact = reference.first_step(init.B0.numpy(), init.A0.numpy(), G.numpy(), c, step)
    np.testing.assert_allclose(D, exact, atol=1e-12)
    U, _, V = svd(W.numpy())
    predicted = reference.predicted_cross(W.numpy(), G.numpy(), start, rank, c, step)
    back = reference.first_step(init.B0.numpy(), init.A0.numpy(), G.numpy(), c, -step)
    first_order = U.T @ (exact - back) @ V / 2  # c dB dA is even in the step
    np.testing.assert_allclose(first_order, predicted, atol=1e-9 * np.abs(predicted).max())
    # It is zero off the rows and columns of the slice; what one step adds there is of second order.
    assert np.abs(U.T @ D @ V - predicted).max() <= 30 * step * np.abs(predicted).max()


def test_orthonormal_slices_all_take_steps_of_one_size() -> None:
    W, G = made(20, 20), made(20, 20, seed=1)
    c, step, rank = 1.0, 1e-6, 4
    U, _, V = svd(W.numpy())
    for start in (0, 8, 16):
        D = stepped(slice_init(W, start=start, rank=rank, scaling=c, scale="orthonormal"), G, step).numpy()
        inside = np.zeros(20)
        inside[start : start + rank] = 1.0
        predicted = -step * c * (U.T @ G.numpy() @ V) * (inside[:, None] + inside[None, :])
        np.testing.assert_allclose(U.T @ D @ V, predicted, atol=1e-4 * np.abs(predicted).max())


@pytest.mark.parametrize("shape", [(16, 16), (12, 30), (30, 12)])
def test_lora_ga_first_moves_along_the_gradient_truncated_to_twice_the_rank(shape: tuple[int, int]) -> None:
    """D = -eta c^2 t^2 G_2r + eta^2 (c dB dA / eta^2): the first-order part exactly, by two steps of opposite sign."""
    W, G = made(*shape), made(*shape, seed=1)
    rank, c, gamma = 3, 16 / 3**0.5, 16.0
    init = lora_ga_init(W, G, rank=rank, scaling=c, gamma=gamma)
    t_squared = shape[0] ** 0.5 / gamma
    exact = -(c**2) * t_squared * reference.truncated(G.numpy(), 2 * rank)
    step = 1e-3
    odd = (stepped(init, G, step) - stepped(init, G, -step)).numpy() / (2 * step)
    assert np.linalg.norm(odd - exact) <= 1e-6 * np.linalg.norm(exact)
    # One actual step is off by its second order alone, which halves with it.
    rests = [float(np.linalg.norm(stepped(init, G, h).numpy() / h - exact)) for h in (1e-4, 5e-5)]
    assert rests[0] / rests[1] == pytest.approx(2, rel=1e-3)
    assert rests[0] < 1e-2 * np.linalg.norm(exact)


def test_lora_ga_takes_float32_weights_and_gradients() -> None:
    W, G = made(16, 20).float(), made(16, 20, seed=1).float()
    init = lora_ga_init(W, G, rank=2, scaling=2.0)
    assert init.A0.dtype == torch.float32
    torch.testing.assert_close(init.A0 @ init.A0.T, torch.eye(2) * 16**0.5 / 16, atol=1e-6, rtol=1e-5)
    assert float((init.B0.T @ (G @ init.A0.T)).abs().max()) < 1e-4  # the first r directions are not in B0


def test_the_random_control_is_orthonormal_seeded_and_of_the_sizes_asked_for() -> None:
    W = made(14, 10).float()
    sizes = torch.tensor([4.0, 1.0, 0.25])
    one, same, other = (random_init(W, rank=3, scaling=2.0, seed=s, singular_values=sizes) for s in (1, 1, 2))
    assert torch.equal(one.A0, same.A0)
    assert torch.equal(one.B0, same.B0)
    assert not torch.allclose(one.A0, other.A0)
    for gram in (one.A0 @ one.A0.T, one.B0.T @ one.B0):
        torch.testing.assert_close(gram, torch.diag(sizes) / 2, atol=1e-6, rtol=1e-5)


def test_plain_lora_starts_at_zero_with_kaimings_bound() -> None:
    init = lora_init(made(8, 100).float(), rank=4, seed=3)
    assert not init.B0.any()
    assert 0.09 < float(init.A0.abs().max()) <= 0.1
    assert float(init.A0.mean().abs()) < 0.02


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: lora_ga_init(made(6, 9), made(6, 9), rank=4, scaling=1.0), "at most 3"),
        (lambda: lora_ga_init(made(6, 9), made(9, 6), rank=1, scaling=1.0), r"\(9, 6\) was given for .*\(6, 9\)"),
        (lambda: lora_ga_init(made(6, 9), torch.zeros(6, 9), rank=1, scaling=1.0), "is zero"),
        (lambda: random_init(made(6, 9), rank=7), "no factors of rank 7"),
        (lambda: lora_init(made(6, 9), rank=1, scaling=-1.0), "above 0"),
    ],
)
def test_what_has_no_start_is_refused(make: Any, words: str) -> None:
    with pytest.raises(SpectraError, match=words):
        make()


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


def test_mean_gradients_are_autograds_own_and_leave_the_model_alone() -> None:
    pytest.importorskip("peft")
    model = small()
    model[0].bias.requires_grad_(False)
    model[3].weight.grad = torch.ones(5, 8)
    batches = [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(3)]

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    config = SliceConfig(rank=1, method="lora_ga", target_modules=["0", "3"])
    found = mean_gradients(model, batches, loss, config)
    assert model.training
    assert not model[0].bias.requires_grad
    assert model[0].weight.requires_grad
    assert torch.equal(model[3].weight.grad, torch.ones(5, 8))
    assert model[0].weight.grad is None
    assert list(found) == ["0", "3"]
    twin = small().eval()
    for batch in batches:
        (loss(twin, batch) / 3).backward()
    for name in found:
        torch.testing.assert_close(found[name], twin.get_submodule(name).weight.grad)


def test_mean_gradients_say_what_is_missing() -> None:
    pytest.importorskip("peft")
    model, config = small(), SliceConfig(rank=1, method="lora_ga", target_modules=["0"])
    with pytest.raises(SpectraError, match="no batch"):
        mean_gradients(model, [], lambda module, batch: module(batch).sum(), config)
    with pytest.raises(SpectraError, match="batch 1 is no finite number"):
        mean_gradients(model, [torch.full((1, 6), torch.nan)], lambda module, batch: module(batch).sum(), config)
    with pytest.raises(SpectraError, match="does not depend on '0'"):
        mean_gradients(model, [torch.ones(1, 5)], lambda module, batch: module[5](batch).sum(), config)
    config = SliceConfig(rank=1, method="lora_ga", target_modules=["0", "3"])
    with pytest.raises(SpectraError, match="does not depend on '0'"):
        mean_gradients(model, [torch.ones(1, 8)], lambda module, batch: module[3](batch).sum(), config)
