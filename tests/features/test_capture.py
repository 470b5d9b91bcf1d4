"""What hooks see: the inputs of every kind of module, and a model that is afterwards as it was before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spectra.errors import SpectraError
from spectra.features.capture import Capture, capturing
from spectra.features.masks import Masks
from spectra.features.sites import expanded
from tests.reference import covariance as brute


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def features_follow(capture: Capture, module: nn.Module, name: str, groups: int = 1, stream: str | None = None) -> None:
    """The features' covariance is W Sigma_X W^T, their mean W mean + b: so Sigma_X is that of this module's inputs."""
    weight, bias = module.weight.detach(), module.bias.detach()
    W = expanded((weight if type(module).__name__ != "Conv1D" else weight.T).flatten(1).double(), groups)
    inputs, outputs = capture.inputs(stream or name), capture.outputs(name)
    assert inputs is not None
    assert outputs is not None
    assert inputs.count == outputs.count > 0
    np.testing.assert_allclose((W @ inputs.covariance() @ W.T).numpy(), outputs.covariance().numpy(), atol=1e-6)
    np.testing.assert_allclose((W @ inputs.mean + bias.double()).numpy(), outputs.mean.numpy(), atol=1e-6)


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, (3, 2), stride=(1, 2), dilation=(2, 1), groups=2),
    nn.Conv2d(4, 4, 3, padding="same", groups=4),
    nn.Conv2d(4, 5, 3, padding=2, padding_mode="reflect"),
    nn.Conv2d(4, 5, 1),
]


@pytest.mark.parametrize("module", CONVOLUTIONS, ids=str)
def test_convolutions_are_unfolded(module: nn.Conv2d) -> None:
    model = nn.Sequential(module)
    with capturing(model, ["0"], outputs=True, dtype=torch.float64) as capture:
        for count in (3, 2):
            model(torch.randn(count, 4, 8, 7))
        model(torch.randn(4, 8, 7))  # without a batch
    features_follow(capture, module, "0", module.groups)


def test_patches_are_those_of_a_loop() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, (3, 2), stride=2, padding=1, dilation=2))
    x = torch.randn(2, 3, 9, 8)
    with capturing(model, ["0"], dtype=torch.float64) as capture:
        model(x)
    expected = brute.patches(x.double().numpy(), (3, 2), stride=2, padding=1, dilation=2)
    found = capture.inputs("0")
    assert found is not None
    assert found.count == len(expected)
    np.testing.assert_allclose(found.covariance().numpy(), brute.covariance(expected), atol=1e-7)


@pytest.mark.parametrize("mode", ["zeros", "circular", "replicate"])
def test_convolutions_in_one_dimension(mode: str) -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode=mode))
    with capturing(model, ["0"], outputs=True, dtype=torch.float64) as capture:
        model(torch.randn(5, 4, 11))
    features_follow(capture, model[0], "0", groups=2)


def test_conv1d_of_transformers_is_turned() -> None:
    utilities = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(utilities.Conv1D(6, 4))
    with capturing(model, ["0"], outputs=True, dtype=torch.float64) as capture:
        model(torch.randn(2, 5, 4))
    features_follow(capture, model[0], "0")


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 10}])
def test_attention_of_torch(batch_first: bool, widths: dict[str, int]) -> None:
    """Its output projection is hidden from hooks; the fused kernels pass by the others as well."""
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **widths).eval()
    query, key, value = torch.randn(3, 5, 8), torch.randn(3, 5, attention.kdim), torch.randn(3, 5, attention.vdim)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    laid = query, key, value
    if not batch_first:
        laid = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    nn.init.normal_(attention.out_proj.bias)
    with capturing(nn.ModuleDict({"a": attention}), ["a"], outputs=True, dtype=torch.float64) as capture:
        attended = attention(*laid)[0]  # without a mask
    features_follow(capture, attention.out_proj, "a", stream="a.out_proj")
    with capturing(nn.ModuleDict({"a": attention}), ["a"], dtype=torch.float64) as capture:
        capture.masks = Masks(mask)
        again = attention(laid[0], key=laid[1], value=laid[2])[0]
    assert torch.equal(attended, again)
    for slot, x in (("query", query), ("key", key), ("value", value)):
        found = capture.inputs(f"a[{slot}]")
        assert found is not None
        expected = brute.covariance(x[mask.bool()].double().numpy())
        np.testing.assert_allclose(found.covariance().numpy(), expected, atol=1e-12)
    found = capture.inputs("a.out_proj")
    assert found is not None
    assert found.count == 10
    assert hooks(attention) == 0


def test_encoder_layer_of_torch_does_not_slip_past_the_hooks() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    fused = torch.backends.mha.get_fastpath_enabled()
    with capturing(layer, ["self_attn", "linear1", "linear2"]) as capture:
        layer(torch.randn(2, 5, 8))
    assert set(capture.calls.values()) == {1}
    assert len(capture.calls) == 6
    assert torch.backends.mha.get_fastpath_enabled() == fused


class Branching(nn.Module):
    """q, k, v of one tensor; then v alone, of another; a shared module twice; and a write into what was read."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.twice = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor, other: Tensor | None = None, write: bool = False) -> Tensor:
        y = self.q(x)
        if write:
            x += 1.0
        y = y + self.k(x) + self.v(x if other is None else other)
        return self.twice(self.twice(y))


def test_modules_that_receive_one_tensor_share_their_moments() -> None:
    model = Branching()
    with capturing(model, ["q", "k", "v"]) as capture:
        for _ in range(3):
            model(torch.randn(5, 4))
    assert capture.kept == 1
    assert capture.inputs("q") is capture.inputs("v")


def test_sharing_ends_without_loss_where_inputs_part() -> None:
    model, calls = Branching(), []
    with capturing(model, ["q", "k", "v"], dtype=torch.float64) as capture:
        for count in (5, 3, 4):
            x, other = torch.randn(count, 4), torch.randn(count, 4)
            calls.append((x, other if count == 3 else x))
            model(x, other if count == 3 else None)
    for name, side in (("q", 0), ("k", 0), ("v", 1)):
        found = capture.inputs(name)
        assert found is not None
        expected = brute.covariance(torch.cat([call[side] for call in calls]).double().numpy())
        np.testing.assert_allclose(found.covariance().numpy(), expected, atol=1e-12)


def test_a_tensor_that_was_written_to_in_between_is_another_one() -> None:
    model, x = Branching(), torch.randn(5, 4)
    before = x.double().numpy().copy()
    with capturing(model, ["q", "k"], dtype=torch.float64) as capture:
        model(x, write=True)
    found = capture.inputs("q"), capture.inputs("k")
    assert found[0] is not None
    assert found[1] is not None
    np.testing.assert_allclose(found[0].mean.numpy(), before.mean(0), atol=1e-12)
    np.testing.assert_allclose(found[1].mean.numpy(), before.mean(0) + 1.0, atol=1e-6)


def test_a_module_that_is_called_twice_counts_twice() -> None:
    model = Branching()
    with capturing(model, ["twice"]) as capture:
        model(torch.randn(5, 4))
    found = capture.inputs("twice")
    assert capture.calls["twice"] == 2
    assert found is not None
    assert found.count == 10
    layer = nn.Linear(4, 2)
    with capturing(layer, [""]) as capture:  # and of one and the same tensor, too
        x = torch.randn(5, 4)
        layer(x), layer(x)
    found = capture.inputs("")
    assert found is not None
    assert found.count == 10


class Interrupted(nn.Linear):
    error: BaseException = RuntimeError("in the middle")

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("in the middle"), KeyboardInterrupt()])
def test_hooks_are_gone_and_modes_back_whatever_happens(error: BaseException) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4), Interrupted(4, 4))
    model[3].error = error  # type: ignore[assignment]
    model.train()
    model[2].eval()  # as of a frozen part
    with pytest.raises(type(error)), capturing(model, ["0", "3"]):
        assert hooks(model) == 2
        assert not model.training
        assert not torch.is_grad_enabled()
        model(torch.randn(5, 4))
    assert hooks(model) == 0
    assert [module.training for module in model] == [True, True, False, True]
    assert torch.is_grad_enabled()


def test_nothing_of_the_model_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with capturing(model, ["0"]):
        model(torch.randn(5, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


REFUSED = {
    "embedding": (nn.Embedding(5, 4), "rows are looked up"),
    "lstm": (nn.LSTM(4, 4), "one kernel that hooks do not see"),
    "transposed": (nn.ConvTranspose2d(4, 4, 3), "transposed convolution"),
    "volume": (nn.Conv3d(4, 4, 3), "three dimensions"),
    "norm": (nn.LayerNorm(4), "held by a LayerNorm"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_captured_is_said(kind: str) -> None:
    module, reason = REFUSED[kind]
    with pytest.raises(SpectraError, match=reason), capturing(nn.ModuleDict({kind: module}), [kind]):
        pass


def test_an_unknown_module_is_said() -> None:
    with pytest.raises(SpectraError, match="no module 'nothing'"), capturing(nn.Linear(2, 2), ["nothing"]):
        pass


def test_nan_is_refused_with_the_name_of_the_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(SpectraError, match="0: the input holds 8 NaN"), capturing(model, ["0"]):
        model(torch.full((2, 4), torch.nan))
