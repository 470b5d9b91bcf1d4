"""The pure parts: the order of the data, the learning rate, loss and score, what the optimiser moves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spectra import SpectraError
from spectra.training import Task, TensorExamples, evaluate
from spectra.training.examples import as_examples, drawn, in_turn
from spectra.training.optimising import learning_rate, make_optimiser, steps_in_all
from spectra.training.settings import OptimiserSettings
from spectra.training.tasks import next_token_logits, next_tokens


@given(st.integers(1, 12), st.integers(0, 5), st.integers(0, 40), st.integers(0, 40))
def test_data_order_is_a_stream_of_whole_epochs(count: int, seed: int, start: int, more: int) -> None:
    stream = drawn(count, seed, 0, start + more)
    assert stream[start:] == drawn(count, seed, start, start + more)
    for first in range(0, len(stream) - count + 1, count):
        assert sorted(stream[first : first + count]) == list(range(count))


def test_data_order_depends_on_seed_and_epoch() -> None:
    orders = {tuple(drawn(50, seed, epoch * 50, (epoch + 1) * 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_shares_of_processes_make_up_all_examples() -> None:
    examples = TensorExamples({"x": torch.arange(23)})
    shares = [torch.cat([batch["x"] for batch in in_turn(examples, 4, rank, 3)]) for rank in range(3)]
    assert sorted(torch.cat(shares).tolist()) == list(range(23))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.3])
def test_learning_rate_rises_then_falls_and_never_vanishes(schedule: str, warmup: float) -> None:
    settings = OptimiserSettings(learning_rate=0.1, schedule=schedule, warmup=warmup)  # type: ignore[arg-type]
    rates = [learning_rate(settings, step, 20) for step in range(1, 21)]
    peak = round(20 * warmup)
    assert max(rates) == pytest.approx(0.1) == pytest.approx(rates[peak])
    assert all(rate > 0 for rate in rates)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    middle = rates[peak + (20 - peak) // 2] / 0.1
    assert middle == pytest.approx({"constant": 1.0, "linear": 0.5, "cosine": 0.5}[schedule])


def test_steps_follow_from_epochs() -> None:
    assert steps_in_all(OptimiserSettings(epochs=2.0, accumulate=4), 640, 16) == 20
    seen = [steps_in_all(OptimiserSettings(epochs=epochs), 50, 40) for epochs in (0.0, 0.1, 1.0, 4.0, 0.1 * 3 * 8)]
    assert seen == [0, 1, 2, 5, 3]  # so that the last examples of a pass are seen, too
    with pytest.raises(SpectraError, match=r"give optimiser\.steps or optimiser\.epochs"):
        steps_in_all(OptimiserSettings(), 640, 16)


def test_optimiser_decays_matrices_only_and_scales_rates_by_pattern() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    settings = OptimiserSettings(weight_decay=0.1, learning_rate_pattern={"2.*": 10.0})
    groups = {
        (g["weight_decay"], g["factor"]): [p.shape for p in g["params"]]
        for g in make_optimiser(settings, model).param_groups
    }
    assert groups == {(0.0, 1.0): [(4,), (4,)], (0.1, 10.0): [(2, 4)], (0.0, 10.0): [(2,)]}
    with pytest.raises(SpectraError, match=r"'0\.\*', which fits no trained parameter"):
        make_optimiser(OptimiserSettings(learning_rate_pattern={"0.*": 2.0}), model)
    with pytest.raises(SpectraError, match="no parameter of the model is to be trained"):
        make_optimiser(OptimiserSettings(), model.requires_grad_(False))


class _Table(nn.Module):
    """Logits looked up by token, so that the right loss can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 5)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.table(input_ids)


def test_language_loss_counts_every_next_token_but_padding() -> None:
    model = _Table()
    ids = torch.tensor([[1, 2, 3, 0], [4, 1, 2, 3], [2, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    task = Task(
        model,
        TensorExamples({"input_ids": ids, "attention_mask": mask}),
        metric="log_likelihood",
        forward=next_token_logits,
        targets=next_tokens,
    )
    pairs = [(1, 2), (2, 3), (4, 1), (1, 2), (2, 3), (2, 2)]
    table = model.table.weight.detach().double()
    wanted = -sum(float(torch.log_softmax(table[one], 0)[two]) for one, two in pairs) / len(pairs)
    for batch_size in (1, 2, 3):  # a mean of means would differ, since the rows are of different lengths
        found = evaluate(task, in_turn(task.test, batch_size))
        assert found["loss"] == pytest.approx(wanted, rel=1e-6)
        assert found["score"] == -found["loss"]
        assert found["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-6)


def test_evaluation_leaves_modes_and_random_numbers_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    model[1].eval()
    task = Task(model, TensorExamples({"input": torch.randn(8, 3), "labels": torch.zeros(8, dtype=torch.long)}))
    before = torch.get_rng_state()
    first, second = (evaluate(task, in_turn(task.test, 3)) for _ in range(2))
    assert first == second
    assert [model.training, model[0].training, model[1].training] == [True, True, False]
    assert torch.equal(before, torch.get_rng_state())


def test_examples_and_labels_that_will_not_do_are_refused() -> None:
    with pytest.raises(SpectraError, match="of one length above 0"):
        as_examples({"x": torch.zeros(3), "labels": torch.zeros(2)}, "train")
    with pytest.raises(SpectraError, match="train is int"):
        as_examples(3, "train")
    with pytest.raises(SpectraError, match="train is empty"):
        as_examples([], "train")
    task = Task(nn.Linear(3, 2), TensorExamples({"input": torch.randn(4, 3), "labels": torch.tensor([0, 1, 2, 1])}))
    with pytest.raises(SpectraError, match="labels reach from 0 to 2, but the head has 2 classes"):
        evaluate(task, in_turn(task.test, 4))
    unlabelled = Task(nn.Linear(3, 2), TensorExamples({"input": torch.randn(4, 3)}))
    with pytest.raises(SpectraError, match="a batch holds no labels"):
        evaluate(unlabelled, in_turn(unlabelled.test, 4))
