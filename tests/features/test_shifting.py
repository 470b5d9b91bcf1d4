"""The whole way: models and batches in, a `CovarianceShift` out, against features that are computed one by one."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import spectra
from spectra.errors import SpectraError
from spectra.features import layer as of_layer
from spectra.shift import CovarianceShift
from tests.reference import covariance as brute

Array = NDArray[np.float64]


class Encoder(nn.Module):
    """Padded sequences through layers that are wide, narrow and square, and a pooler that sees one token of each."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.square = nn.Linear(6, 10), nn.Linear(10, 6, bias=False), nn.Linear(6, 6)
        self.pooler, self.unused = nn.Linear(6, 3), nn.Linear(2, 2)
        self.drop = nn.Dropout(0.5)

    def steps(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Module -> (input, feature)."""
        up = self.up(x)
        hidden = torch.tanh(self.drop(up))
        down = self.down(hidden)
        square = self.square(down)
        pooled = self.pooler(square[:, 0])
        return {"up": (x, up), "down": (hidden, down), "square": (down, square), "pooler": (square[:, 0], pooled)}

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.steps(x)["pooler"][1]


def moved(model: nn.Module, by: float = 0.2) -> nn.Module:
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += by * torch.randn_like(parameter)
    return tuned


@pytest.fixture
def pair() -> tuple[Encoder, Encoder]:
    torch.manual_seed(0)
    base = Encoder().double()
    return base, moved(base)  # type: ignore[return-value]


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    """A ragged last batch, and padding in each."""
    torch.manual_seed(1)
    found = []
    for count, length in ((8, 5), (8, 7), (3, 4)):
        lengths = torch.randint(1, length + 1, (count, 1))
        x = torch.randn(count, length, 6, dtype=torch.float64)
        found.append({"x": x, "attention_mask": (torch.arange(length) < lengths).long()})
    return found


def gathered(model: Encoder, batches: list[dict[str, Tensor]]) -> dict[str, tuple[Array, Array]]:
    """Every unpadded input and feature of each module, below each other."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with torch.no_grad():
        for batch in batches:
            keep = batch["attention_mask"].bool()
            for name, (x, y) in copy.deepcopy(model).eval().steps(batch["x"]).items():
                found.setdefault(name, []).append((x, y) if name == "pooler" else (x[keep], y[keep]))
    return {name: tuple(np.concatenate([p[i].numpy() for p in parts]) for i in (0, 1)) for name, parts in found.items()}  # type: ignore[misc]


def basis_of(which: str, W: Array, Y: Array, centred: bool, has_bias: bool) -> Array:
    k = min(W.shape)
    if which == "weight":
        return np.linalg.svd(W)[0][:, :k]
    k = min(W.shape[0], W.shape[1] + (has_bias and not centred))  # uncentred, the bias is one more direction
    return np.linalg.eigh(brute.covariance(Y, centred))[1][:, ::-1][:, :k]


@pytest.mark.parametrize("basis", ["weight", "feature"])
@pytest.mark.parametrize("mode", ["same_inputs", "end_to_end"])
@pytest.mark.parametrize("centred", [True, False])
def test_against_features_one_by_one(pair: Any, batches: Any, basis: Any, mode: Any, centred: bool) -> None:
    base, tuned = pair
    shift = spectra.covariance_shift(base, tuned, batches, basis=basis, mode=mode, centred=centred)
    before, after = gathered(base, batches), gathered(tuned, batches)
    assert set(shift.names) == {"up.weight", "down.weight", "square.weight", "pooler.weight"}
    for name, (X, Y) in before.items():
        module, module_tuned = getattr(base, name), getattr(tuned, name)
        W_tuned = module_tuned.weight.detach().numpy()
        b_tuned = 0.0 if module_tuned.bias is None else module_tuned.bias.detach().numpy()
        between = X @ W_tuned.T + b_tuned
        Y_tuned = after[name][1] if mode == "end_to_end" else between
        Q = basis_of(basis, module.weight.detach().numpy(), Y, centred, module.bias is not None)
        expected = brute.delta(Y, Y_tuned, Q, centred)
        own = brute.delta(Y, between, Q, centred)
        rows = shift.components[shift.components["name"] == f"{name}.weight"]
        row = shift.layers.set_index("name").loc[f"{name}.weight"]
        Sy, Sy_tuned = brute.covariance(Y, centred), brute.covariance(Y_tuned, centred)
        trace = np.trace(Sy)
        tolerance = {"rtol": 1e-8, "atol": 1e-9 * np.trace(Sy + Sy_tuned)}
        assert row["samples"] == len(X)
        np.testing.assert_allclose(rows["variance"], np.diag(Q.T @ Sy @ Q), **tolerance)
        np.testing.assert_allclose(rows["diagonal"], np.diag(expected), **tolerance)
        np.testing.assert_allclose(rows["own_diagonal"], np.diag(own), **tolerance)
        np.testing.assert_allclose(rows["inherited_diagonal"], np.diag(expected - own), **tolerance)
        off = (expected**2).sum(1) - np.diag(expected) ** 2
        np.testing.assert_allclose(rows["off_diagonal_energy"], off, rtol=1e-7, atol=1e-9 * trace**2)
        np.testing.assert_allclose(rows["normalised_diagonal"], np.diag(expected) / trace, rtol=1e-7, atol=1e-8)
        np.testing.assert_allclose(rows["normalised_off_diagonal_energy"], off / trace**2, rtol=1e-7, atol=1e-8)
        delta = shift.matrix(f"{name}.weight").numpy()  # directions are known up to their signs
        loose = {"rtol": 1e-7, "atol": 1e-8 * np.trace(Sy + Sy_tuned)}
        np.testing.assert_allclose(np.abs(delta), np.abs(expected), **loose)
        np.testing.assert_allclose(np.linalg.eigvalsh(delta), np.linalg.eigvalsh(expected), **loose)
        whole = Sy_tuned - Sy
        parts = brute.covariance(between, centred) - Sy, Sy_tuned - brute.covariance(between, centred)
        energy = np.sum(whole**2)
        assert row["variance_base"] == pytest.approx(trace)
        assert row["variance_tuned"] == pytest.approx(np.trace(Sy_tuned))
        assert row["relative_shift"] == pytest.approx(np.linalg.norm(whole) / np.linalg.norm(Sy))
        assert row["own_share"] == pytest.approx(np.sum(parts[0] * whole) / energy)
        assert row["inherited_share"] == pytest.approx(np.sum(parts[1] * whole) / energy, abs=1e-9)
        assert row["shift_outside_share"] == pytest.approx(1 - np.sum(expected**2) / energy, abs=1e-9)
        assert row["mean_shift"] == pytest.approx(np.linalg.norm(Y_tuned.mean(0) - Y.mean(0)))
        assert row["cka"] == pytest.approx(brute.linear_cka(Y, Y_tuned), abs=1e-9)
        if min(Y.shape) >= module.weight.shape[0] and module.weight.shape[0] <= module.weight.shape[1]:
            expected_distance = brute.bures(brute.covariance(Y), brute.covariance(Y_tuned))
            assert row["bures_distance"] == pytest.approx(expected_distance, rel=1e-5)


def test_parts_sum_to_the_whole(pair: Any, batches: Any) -> None:
    shift = spectra.covariance_shift(*pair, batches, mode="end_to_end")
    for name in shift.names:
        total, own, inherited = (shift.matrix(name, part) for part in ("total", "own", "inherited"))
        assert torch.linalg.norm(own + inherited - total) <= 1e-12 * torch.linalg.norm(total)
        assert torch.equal(total, total.T)
    summed = shift.components["own_diagonal"] + shift.components["inherited_diagonal"]
    np.testing.assert_allclose(summed, shift.components["diagonal"], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(shift.layers["own_share"] + shift.layers["inherited_share"], 1.0, rtol=1e-12)
    shares = shift.layers[["shift_diagonal_share", "shift_off_diagonal_share", "shift_outside_share"]].sum(axis=1)
    np.testing.assert_allclose(shares, 1.0, rtol=1e-9)
    inside = 1 - shift.layers.set_index("name")["shift_outside_share"]
    np.testing.assert_allclose(shift.slices.groupby("name")["shift_share"].sum(), inside.sort_index(), rtol=1e-9)
    assert set(shift.unmatched["name"]) >= {"unused.weight", "up.bias"}
    reason = shift.unmatched.set_index("name").loc["unused.weight", "reason"]
    assert "no batch brought it an input" in reason


def test_models_are_never_in_memory_together(pair: Any, batches: Any) -> None:
    base, tuned = pair
    seen: list[weakref.ref[nn.Module]] = []

    def built(model: nn.Module) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            assert all(reference() is None for reference in seen)
            made = copy.deepcopy(model)
            seen.append(weakref.ref(made))
            return made

        return build

    one = spectra.covariance_shift(built(base), built(tuned), lambda: iter(batches), mode="end_to_end")
    other = spectra.covariance_shift(base, tuned, batches, mode="end_to_end")
    assert len(seen) == 2
    np.testing.assert_array_equal(one.components["diagonal"], other.components["diagonal"])
    assert one.layers["cka"].isna().all()
    assert any("cka" in note for note in one.provenance["notes"])
    assert list(one.functional.columns) == list(other.functional.columns)
    np.testing.assert_array_equal(one.functional["output_change"], other.functional["output_change"])


def test_closed_form_of_a_linear_network() -> None:
    """y = W2 W1 x on inputs of known covariance, where everything is a matrix product."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False)).double()
    tuned = moved(base)
    X = torch.randn(50, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    S = torch.from_numpy(brute.covariance(X.numpy()))
    W1, W2, V1, V2 = (m.weight.detach() for m in (*base, *tuned))  # type: ignore[union-attr]
    own = V2 @ (W1 @ S @ W1.T) @ V2.T - W2 @ (W1 @ S @ W1.T) @ W2.T
    inherited = V2 @ (V1 @ S @ V1.T - W1 @ S @ W1.T) @ V2.T
    shift = spectra.covariance_shift(base, tuned, [X[:20], X[20:]], mode="end_to_end")
    Q = of_layer.weight_basis(W2, 3)
    np.testing.assert_allclose(shift.matrix("1.weight", "own"), Q.T @ own @ Q, atol=1e-10)
    np.testing.assert_allclose(shift.matrix("1.weight", "inherited"), Q.T @ inherited @ Q, atol=1e-10)


def test_data_free_is_the_limit_of_white_inputs() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 8)).double()
    tuned = moved(base)
    exact = spectra.covariance_shift(base, tuned)
    assert exact.provenance["mode"] == "data_free"
    errors = []
    for count in (500, 50_000):
        white = torch.randn(count, 12, dtype=torch.float64)
        streamed = spectra.covariance_shift(base, tuned, [white], functional=False)
        errors.append(float(torch.linalg.norm(streamed.matrix("0.weight") - exact.matrix("0.weight"))))
    assert 0.04 < errors[1] / errors[0] < 0.25  # 1 / sqrt(100), and what chance does to it
    exactly_white = torch.cat([torch.eye(12), -torch.eye(12)]).double() * 12**0.5
    streamed = spectra.covariance_shift(base, tuned, [exactly_white], functional=False)
    np.testing.assert_allclose(streamed.matrix("0.weight"), exact.matrix("0.weight"), atol=1e-12)


def test_convolutions_with_groups() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.ReLU(inplace=True), nn.Conv2d(6, 5, 2, bias=False)
    ).double()
    tuned = moved(base)
    images = [torch.randn(count, 4, 9, 7, dtype=torch.float64) for count in (3, 2)]
    shift = spectra.covariance_shift(base, tuned, images, mode="end_to_end", basis="weight")
    for index, name in ((0, "0.weight"), (2, "2.weight")):
        with torch.no_grad():
            Y, Y_tuned = (
                np.concatenate([m[: index + 1](x).movedim(1, -1).flatten(0, -2).numpy() for x in images])
                for m in (base, tuned)
            )
        W = base[index].weight.detach().flatten(1)  # type: ignore[union-attr, operator]
        Q = of_layer.weight_basis(W, min(W.shape)).numpy()  # type: ignore[arg-type, type-var]
        np.testing.assert_allclose(shift.matrix(name), brute.delta(Y, Y_tuned, Q), atol=1e-10)
        row = shift.layers.set_index("name").loc[name]
        assert row["samples"] == len(Y)
        assert row["cka"] == pytest.approx(brute.linear_cka(Y, Y_tuned), abs=1e-9)


def test_leading_directions_of_a_tall_layer_hold_what_is_said(monkeypatch: pytest.MonkeyPatch, pair: Any) -> None:
    monkeypatch.setattr(of_layer, "MOST_OUTPUTS", 9)
    monkeypatch.setattr(of_layer, "LEADING", 2)
    shift = spectra.covariance_shift(*pair, basis="feature")
    row = shift.layers.set_index("name").loc["up.weight"]
    W = pair[0].up.weight.detach().numpy()
    values = np.linalg.svd(W, compute_uv=False) ** 2
    assert row["directions"] == 2
    assert row["held_share"] == pytest.approx(values[:2].sum() / values.sum())
    assert row["note"] == f"the 2 leading of 6 directions, which hold {row['held_share']:.1%} of trace(Sigma_Y)"
    whole = pair[1].up.weight.detach().numpy()
    assert row["shift_norm"] == pytest.approx(np.linalg.norm(whole @ whole.T - W @ W.T))
    assert spectra.covariance_shift(*pair, top=3).layers["directions"].max() == 3


def test_bias_counts_without_centring_only() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 3)).double()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].bias += 1.0
    x = torch.randn(20, 4, dtype=torch.float64)
    centred = spectra.covariance_shift(base, tuned, [x]).layers.iloc[0]
    assert centred["shift_norm"] == 0
    assert centred["mean_shift"] == pytest.approx(3**0.5)
    assert spectra.covariance_shift(base, tuned, [x], centred=False).layers.iloc[0]["shift_norm"] > 0.1


def test_fused_attention_of_torch_has_the_names_of_compare() -> None:
    torch.manual_seed(0)
    base = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    tuned = moved(base)
    x = [torch.randn(4, 5, 8), torch.randn(2, 5, 8)]
    shift = spectra.covariance_shift(base, tuned, x, mode="end_to_end", centred=False)
    assert set(shift.names) == set(spectra.compare(base, tuned).layers["name"])
    assert {"self_attn.in_proj_weight[q]", "self_attn.out_proj.weight"} <= set(shift.names)
    assert (shift.layers["samples"] == 30).all()
    q = shift.layers.set_index("name").loc["self_attn.in_proj_weight[q]"]
    rows = torch.cat([batch.flatten(0, 1) for batch in x]).double().numpy()
    Y, Y_tuned = (
        rows @ m.self_attn.in_proj_weight[:8].detach().double().numpy().T
        + m.self_attn.in_proj_bias[:8].detach().double().numpy()
        for m in (base, tuned)
    )  # type: ignore[union-attr, operator, index]
    whole = brute.covariance(Y_tuned, centred=False) - brute.covariance(Y, centred=False)
    assert q["shift_norm"] == pytest.approx(np.linalg.norm(whole), rel=1e-5)


def test_custom_forward_and_mask(pair: Any, batches: Any) -> None:
    base, tuned = pair
    plain = spectra.covariance_shift(base, tuned, batches, functional=False)
    tuples = [(batch["x"], batch["attention_mask"], "label") for batch in batches]
    same = spectra.covariance_shift(
        base,
        tuned,
        tuples,
        forward=lambda model, batch: model(*batch[:2]),
        mask=lambda batch: batch[1],
        functional=False,
    )
    np.testing.assert_array_equal(same.components["diagonal"], plain.components["diagonal"])
    unmasked = spectra.covariance_shift(base, tuned, tuples, mask=lambda batch: None, functional=False)
    assert unmasked.layers["samples"].max() == sum(batch["x"].shape[0] * batch["x"].shape[1] for batch in batches)


def test_saved_and_loaded(pair: Any, batches: Any, tmp_path: Path) -> None:
    shift = spectra.covariance_shift(*pair, batches, mode="end_to_end")
    again = CovarianceShift.load(shift.save(tmp_path / "out", matrices=["*up*", "square*"]))
    for table in ("layers", "components", "slices", "unmatched", "functional"):
        assert getattr(again, table).equals(getattr(shift, table)), table
    assert torch.equal(again.matrix("up.weight", "inherited"), shift.matrix("up.weight", "inherited"))
    with pytest.raises(SpectraError, match=r"'down\.weight' was not kept"):
        again.matrix("down.weight")
    with pytest.raises(SpectraError, match="no matrix 'nothing'"):
        again.matrix("nothing")
    with pytest.raises(SpectraError, match="no part of a shift"):
        again.matrix("up.weight", "half")  # type: ignore[arg-type]
    with pytest.raises(SpectraError, match="holds no saved covariance shift"):
        CovarianceShift.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SpectraError, match="cannot write the covariance shift"):
        shift.save(tmp_path / "file")
    assert again.save(tmp_path / "out", matrices="*") == tmp_path / "out"  # over itself


def test_the_kept_matrices_go_with_the_result(pair: Any) -> None:
    shift = spectra.covariance_shift(*pair, matrices="up*")
    assert shift.matrices is not None
    folder = shift.matrices.folder
    assert list(shift.matrices.files) == ["up.weight"]
    assert folder.is_dir()
    del shift
    assert not folder.exists()


def test_a_comparison_gains_the_columns(pair: Any, batches: Any, tmp_path: Path) -> None:
    base, tuned = pair
    second = moved(base)
    comparison = spectra.compare(base, {"one": tuned, "two": second})
    shift = spectra.covariance_shift(base, tuned, batches, mode="end_to_end", exclude=["down*"])
    joined = comparison.join(shift, "one")
    for table in ("layers", "components"):
        before, after = getattr(comparison, table), getattr(joined, table)
        assert after[before.columns].equals(before)
    one = joined.components[(joined.components["tuned"] == "one") & (joined.components["name"] == "up.weight")]
    expected = shift.components[shift.components["name"] == "up.weight"]
    np.testing.assert_array_equal(one["shift_diagonal"], expected["diagonal"])
    np.testing.assert_array_equal(one["inherited_diagonal"], expected["inherited_diagonal"])
    rest = joined.components[(joined.components["tuned"] == "two") | (joined.components["name"] == "down.weight")]
    assert rest["shift_diagonal"].isna().all()
    again = spectra.load(joined.save(tmp_path))
    assert again.components.equals(joined.components)
    assert again.layers.equals(joined.layers)
    assert again.provenance["shifts"]["one"]["mode"] == "end_to_end"
    both = joined.join(spectra.covariance_shift(base, second, batches), "two")
    assert both.layers.set_index(["tuned", "name"])["mode"].loc[("one", "up.weight")] == "end_to_end"
    assert both.layers.set_index(["tuned", "name"])["mode"].loc[("two", "up.weight")] == "same_inputs"
    for options, message in (
        ({}, "say with `tuned`"),
        ({"tuned": "three"}, "'three' is none of them"),
    ):
        with pytest.raises(SpectraError, match=message):
            comparison.join(shift, **options)
    with pytest.raises(SpectraError, match="basis='weight'"):
        comparison.join(spectra.covariance_shift(base, tuned, basis="feature"), "one")


def test_mistakes_are_said_in_a_sentence(pair: Any, batches: Any) -> None:
    base, tuned = pair
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((base, tuned, []), {}, "there are no batches"),
        ((base, tuned, batches[0]), {}, "the batches are a single dict"),
        ((base, tuned, [{"y": torch.ones(1, 2, 6)}]), {}, "cannot be called with the keys y"),
        ((base, tuned, [{**batches[0], "x": torch.ones(1, 2, 5).double()}]), {}, "the base model failed on batch 0"),
        ((base, lambda: tuned, iter(batches)), {}, "can be gone through once"),
        ((lambda: 3, tuned, batches), {}, "the base is a int and no torch.nn.Module"),
        ((base, tuned.state_dict(), batches), {"mode": "end_to_end"}, "both models run"),
        ((base, nn.Linear(3, 2), batches), {}, "different architectures"),
        ((base, tuned, batches), {"basis": "features"}, "give 'weight' or 'feature'"),
        ((base, tuned, batches), {"mode": "both"}, "mode is 'both'"),
        ((base, tuned, batches), {"top": 0}, "must be at least 1"),
        ((base, tuned, batches), {"top": 2.5}, r"top is 2\.5, and"),
        ((base, tuned, batches), {"dtype": torch.float16}, "which the products cannot have"),
        ((base, tuned, batches), {"device": "abacus"}, "'abacus' is no device"),
        ((base, tuned, batches), {"include": ["nothing*"]}, "nothing"),
        ((base, tuned, batches), {"include": ["unused*"]}, "of no weight matrix the shift could be measured"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(SpectraError, match=message):
            spectra.covariance_shift(*arguments, **options)

    def growing() -> Iterator[Any]:
        growing.calls += 1  # type: ignore[attr-defined]
        return iter(batches * growing.calls)  # type: ignore[attr-defined]

    growing.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(SpectraError, match="come out the same each time"):
        spectra.covariance_shift(base, lambda: tuned, growing, functional=False, mode="end_to_end")


def test_weights_alone_are_enough_where_the_tuned_model_need_not_run(pair: Any, batches: Any) -> None:
    base, tuned = pair
    one = spectra.covariance_shift(base, tuned.state_dict(), batches)
    other = spectra.covariance_shift(base, tuned, batches, functional=False)
    np.testing.assert_array_equal(one.components["diagonal"], other.components["diagonal"])
    assert any("weights only" in note for note in one.provenance["notes"])
    assert len(one.functional) == 0


def test_nan_in_the_weights_fails_alone(pair: Any, batches: Any) -> None:
    base, tuned = pair
    with torch.no_grad():
        tuned.pooler.weight[0, 0] = torch.nan
    shift = spectra.covariance_shift(base, tuned, batches, functional=False)
    assert "pooler.weight" not in shift.names
    assert "1 NaN" in shift.unmatched.set_index("name").loc["pooler.weight", "reason"]
