"""KL and losses of base and tuned model, against loops in float64, on real small transformers and plain modules."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spectra.errors import SpectraError
from spectra.features.functional import FunctionalCheck, divergence

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


def log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row.astype(np.float64) - row.max()
    return shifted - np.log(np.exp(shifted).sum())


def kl(base: np.ndarray, tuned: np.ndarray) -> float:
    p, q = log_softmax(base), log_softmax(tuned)
    return float((np.exp(p) * (p - q)).sum())


def checked(folder: Path, base: Any, tuned: Any, batches: list[Any], **options: Any) -> FunctionalCheck:
    """A check of two models, each run over the batches by itself, as dict batches are run."""
    check = FunctionalCheck(folder, **options)
    for model, take in ((base, check.base), (tuned, check.tuned)):
        for batch in batches:
            with torch.no_grad():
                known = {name: value for name, value in batch.items() if name != "labels"}
                take(model(**known), batch)
    return check


def moved(model: nn.Module, size: float = 0.02) -> nn.Module:
    """The same model with noise on its weights."""
    import copy

    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return other


def token_batches(words: int = 50, sizes: tuple[int, ...] = (3, 2)) -> list[dict[str, Tensor]]:
    """Ragged batches: the last is smaller, texts end at different positions, some are padded on the left."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for size in sizes:
        length = 4 + size
        mask = torch.ones(size, length, dtype=torch.int64)
        mask[0, 3:] = 0
        mask[-1, :2] = 0
        ids = torch.randint(0, words, (size, length), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@pytest.fixture(scope="module")
def bert() -> dict[str, Any]:
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3,
        max_position_embeddings=16,
    )  # fmt: skip
    kinds = {"mlm": BertForMaskedLM, "classes": BertForSequenceClassification, "plain": BertModel}
    return {name: kind(config).eval() for name, kind in kinds.items()}


def test_classes_have_a_divergence_and_a_loss_each(bert: dict[str, Any], tmp_path: Path) -> None:
    base, tuned = bert["classes"], moved(bert["classes"])
    batches = [{**batch, "labels": torch.arange(len(batch["input_ids"])) % 3} for batch in token_batches()]
    frame = checked(tmp_path, base, tuned, batches).result()
    assert list(frame["sample"]) == [0, 1, 2, 3, 4]
    at = 0
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            p, q = (model(**inputs).logits.numpy() for model in (base, tuned))
        for row, label in enumerate(batch["labels"].tolist()):
            assert frame["kl"][at] == pytest.approx(kl(p[row], q[row]), rel=1e-9)
            assert frame["base_loss"][at] == pytest.approx(-log_softmax(p[row])[label], rel=1e-9)
            assert frame["tuned_loss"][at] == pytest.approx(-log_softmax(q[row])[label], rel=1e-9)
            at += 1
    np.testing.assert_array_equal(frame["loss_change"], frame["tuned_loss"] - frame["base_loss"])
    assert (frame["kl"] > 0).all()


def test_a_masked_language_model_is_averaged_over_what_is_not_padding(bert: dict[str, Any], tmp_path: Path) -> None:
    base, tuned = bert["mlm"], moved(bert["mlm"])
    batches = token_batches()
    labelled = [{**batch, "labels": torch.full_like(batch["input_ids"], -100)} for batch in batches]
    labelled[0]["labels"][1, 2] = 7
    labelled[0]["labels"][1, 4] = 9
    frame = checked(tmp_path, base, tuned, labelled).result()
    at = 0
    for batch in labelled:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            p, q = (model(**inputs).logits.numpy() for model in (base, tuned))
        for row, mask in enumerate(batch["attention_mask"].numpy()):
            expected = np.mean([kl(p[row, t], q[row, t]) for t in np.flatnonzero(mask)])
            assert frame["kl"][at] == pytest.approx(expected, rel=1e-9)
            if at == 1:
                losses = [-log_softmax(p[row, 2])[7], -log_softmax(p[row, 4])[9]]
                assert frame["base_loss"][at] == pytest.approx(np.mean(losses), rel=1e-9)
            else:
                assert np.isnan(frame["base_loss"][at])
            at += 1


def test_a_masked_language_model_without_labels_has_no_loss(bert: dict[str, Any], tmp_path: Path) -> None:
    frame = checked(tmp_path, bert["mlm"], moved(bert["mlm"]), token_batches()).result()
    assert frame["kl"].notna().all()
    assert frame[["base_loss", "tuned_loss", "loss_change"]].isna().all().all()


@needs_transformers
@pytest.mark.parametrize("with_labels", [False, True])
def test_a_causal_model_predicts_the_next_token(tmp_path: Path, with_labels: bool) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()
    tuned = moved(base)
    batches = token_batches()
    if with_labels:  # as one labels them for transformers: the inputs, padding aside
        batches = [
            {**batch, "labels": torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)}
            for batch in batches
        ]
    frame = checked(tmp_path, base, tuned, batches).result()
    at = 0
    for batch in batches:
        with torch.no_grad():
            outputs = [model(batch["input_ids"], attention_mask=batch["attention_mask"]) for model in (base, tuned)]
        p, q = (output.logits.numpy() for output in outputs)
        ids = batch["input_ids"].numpy()
        for row, mask in enumerate(batch["attention_mask"].numpy()):
            assert frame["kl"][at] == pytest.approx(
                np.mean([kl(p[row, t], q[row, t]) for t in np.flatnonzero(mask)]), rel=1e-9
            )
            if with_labels:  # a labelled token after padding is predicted from padding, as transformers has it
                steps = [t for t in range(len(mask) - 1) if mask[t + 1]]
            else:
                steps = [t for t in range(len(mask) - 1) if mask[t] and mask[t + 1]]
            for logits, column in ((p, "base_loss"), (q, "tuned_loss")):
                expected = np.mean([-log_softmax(logits[row, t])[ids[row, t + 1]] for t in steps])
                assert frame[column][at] == pytest.approx(expected, rel=1e-9)
            at += 1


def test_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()
    ids = torch.randint(0, 50, (1, 9), generator=torch.Generator().manual_seed(0))
    frame = checked(tmp_path, model, model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]).result()
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss)
    assert frame["base_loss"][0] == pytest.approx(expected, rel=1e-5)
    assert frame["kl"][0] == 0
    assert frame["loss_change"][0] == 0


def test_an_encoder_is_compared_by_its_features(bert: dict[str, Any], tmp_path: Path) -> None:
    base, tuned = bert["plain"], moved(bert["plain"])
    batches = token_batches()
    check = checked(tmp_path, base, tuned, batches)
    frame = check.result()
    assert frame["kl"].isna().all()
    assert any("no logits" in note for note in check.notes)
    at = 0
    for batch in batches:
        with torch.no_grad():
            hidden = [model(**batch).last_hidden_state.double().numpy() for model in (base, tuned)]
        for row, mask in enumerate(batch["attention_mask"].numpy().astype(bool)):
            h, changed = (each[row][mask].mean(axis=0) for each in hidden)
            assert frame["output_change"][at] == pytest.approx(
                np.linalg.norm(changed - h) / np.linalg.norm(h), rel=1e-9
            )
            cosine = h @ changed / np.linalg.norm(h) / np.linalg.norm(changed)
            assert frame["output_cosine"][at] == pytest.approx(cosine, rel=1e-9)
            at += 1


def test_padding_more_changes_nothing(bert: dict[str, Any], tmp_path: Path) -> None:
    (batch,) = token_batches(sizes=(3,))
    padded = {name: torch.nn.functional.pad(values, (0, 4)) for name, values in batch.items()}
    one, other = (
        checked(tmp_path, bert["mlm"], moved(bert["mlm"]), [each]).result()["kl"].to_numpy() for each in (batch, padded)
    )
    np.testing.assert_allclose(one, other, rtol=1e-4)  # float32 forward passes of other shapes


class Plain(nn.Module):
    """A classifier of one's own that returns a tensor."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.fc = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def take(check: FunctionalCheck, base: nn.Module, tuned: nn.Module, batches: list[Any]) -> None:
    for model, method in ((base, check.base), (tuned, check.tuned)):
        for batch in batches:
            with torch.no_grad():
                method(model(batch[0] if isinstance(batch, tuple) else batch), batch)


def test_a_plain_tensor_is_logits_where_integer_labels_come_with_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x, labels = Plain(), torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    tuned = moved(base)
    check = FunctionalCheck(tmp_path)
    take(check, base, tuned, [(x, labels)])
    frame = check.result()
    p, q = base(x).detach().numpy(), tuned(x).detach().numpy()
    np.testing.assert_allclose(frame["kl"], [kl(*pair) for pair in zip(p, q, strict=True)], rtol=1e-9)
    assert any("taken for logits" in note for note in check.notes)

    features = FunctionalCheck(tmp_path)
    take(features, base, tuned, [x])
    assert features.result()["kl"].isna().all()
    np.testing.assert_allclose(
        features.result()["output_change"],
        np.linalg.norm(q.astype(np.float64) - p, axis=1) / np.linalg.norm(p.astype(np.float64), axis=1),
        rtol=1e-9,
    )


def test_regression_has_squared_errors_and_no_divergence(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x, labels = Plain(1), torch.randn(5, 6), torch.randn(5)
    tuned = moved(base)
    check = FunctionalCheck(tmp_path)
    take(check, base, tuned, [(x, labels)])
    frame = check.result()
    error = (tuned(x)[:, 0].double() - labels.double()).square().detach().numpy()
    np.testing.assert_allclose(frame["tuned_loss"], error, rtol=1e-12)
    assert frame["kl"].isna().all()
    assert frame["output_change"].notna().all()


def test_several_labels_at_once_are_independent_sigmoids(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(3, 4, generator=generator) for _ in range(2))
    labels = (torch.rand(3, 4, generator=generator) > 0.5).float()
    check = FunctionalCheck(tmp_path)
    check.base({"logits": p}, {"labels": labels})
    check.tuned({"logits": q}, {"labels": labels})
    frame = check.result()
    a, b = (1 / (1 + np.exp(-x.double().numpy())) for x in (p, q))
    each = a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))
    np.testing.assert_allclose(frame["kl"], each.sum(axis=1), rtol=1e-9)
    truth = labels.double().numpy()
    losses = -(truth * np.log(a) + (1 - truth) * np.log(1 - a)).mean(axis=1)
    np.testing.assert_allclose(frame["base_loss"], losses, rtol=1e-9)


def test_divergence_of_forbidden_classes_is_finite() -> None:
    never = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert float(divergence(never, never)) == 0
    other = torch.tensor([[1.0, -torch.inf, 1.0]])
    assert float(divergence(never, other)) == pytest.approx(kl(np.array([0.0, 1.0]), np.array([1.0, 1.0])))
    assert float(divergence(other, torch.tensor([[1.0, 0.0, -torch.inf]]))) == np.inf


def test_divergence_keeps_its_digits_where_the_models_are_near() -> None:
    """KL ~ half the variance of the difference of the logits under p; float32 would be all noise at 1e-12."""
    generator = torch.Generator().manual_seed(0)
    logits, step = (torch.randn(1, 1000, generator=generator, dtype=torch.float64) for _ in range(2))
    p = torch.softmax(logits, dim=1)
    variance = float((p * step.square()).sum() - (p * step).sum() ** 2)
    assert float(divergence(logits, logits + 1e-5 * step)) == pytest.approx(0.5e-10 * variance, rel=1e-3)


def test_the_first_samples_that_fit_have_a_divergence_and_all_have_losses(bert: dict[str, Any], tmp_path: Path) -> None:
    batches = token_batches(sizes=(3, 3, 2))
    batches = [{**batch, "labels": torch.zeros(len(batch["input_ids"]), dtype=torch.int64)} for batch in batches]
    whole = checked(tmp_path, bert["classes"], moved(bert["classes"]), batches).result()
    check = checked(tmp_path, bert["classes"], moved(bert["classes"]), batches, limit=4 * 3 * 4)
    frame = check.result()
    assert list(frame["kl"].notna()) == [True] * 4 + [False] * 4
    np.testing.assert_array_equal(frame["kl"][:4], whole["kl"][:4])
    np.testing.assert_array_equal(frame["loss_change"], whole["loss_change"])
    assert any("first 4 of 8 samples" in note for note in check.notes)
    assert not list(tmp_path.iterdir())  # each file goes when it has been used


def test_batches_that_come_out_differently_are_refused(bert: dict[str, Any], tmp_path: Path) -> None:
    one, other = token_batches()
    check = FunctionalCheck(tmp_path)
    check.base(bert["mlm"](**one), one)
    with pytest.raises(SpectraError, match="batch 0 was another one"):
        check.tuned(bert["mlm"](**other), other)
    check = FunctionalCheck(tmp_path)
    check.base(bert["mlm"](**one), one)
    check.tuned(bert["mlm"](**one), one)
    with pytest.raises(SpectraError, match="more than the 1"):
        check.tuned(bert["mlm"](**one), one)


def test_models_that_answer_differently_are_compared_by_nothing(bert: dict[str, Any], tmp_path: Path) -> None:
    check = checked(tmp_path, bert["plain"], bert["classes"], token_batches())
    frame = check.result()
    assert len(frame) == 5
    assert frame.drop(columns="sample").isna().all().all()
    assert any("base answers with features" in note for note in check.notes)


def test_an_output_without_tensors_is_noted(tmp_path: Path) -> None:
    check = FunctionalCheck(tmp_path)
    check.base(None, torch.zeros(2, 3))
    check.tuned(None, torch.zeros(2, 3))
    assert check.result().empty
    assert any("nothing to compare" in note for note in check.notes)
    assert FunctionalCheck(tmp_path).result().empty


def test_a_label_that_is_no_class_is_named_and_changes_nothing_else(tmp_path: Path) -> None:
    """Whether a plain output is logits is settled by the first batch, and a later label cannot unsettle it."""
    torch.manual_seed(0)
    base, x = Plain(), torch.randn(5, 6)
    good, wrong = (x, torch.tensor([0, 1, 2, 3, 0])), (x, torch.tensor([0, 7, 2, 3, 0]))
    with pytest.raises(SpectraError, match=r"^batch 1 \(run by the base\) has the label 7, .* classes 0 to 3;"):
        take(FunctionalCheck(tmp_path), base, base, [good, wrong])
    features = FunctionalCheck(tmp_path)
    take(features, base, moved(base), [wrong, good])
    assert features.result()["kl"].isna().all()
    assert features.result()["output_change"].notna().all()
    (note,) = [note for note in features.notes if "labels" in note]
    assert "2 of 2 batches were not used: batch 0 has the label 7 beside an output of shape [5, 4]" in note


@pytest.mark.parametrize("label", [4, -1])
def test_a_label_that_is_no_class_of_named_logits_is_named(label: int, tmp_path: Path) -> None:
    check = FunctionalCheck(tmp_path)
    with pytest.raises(SpectraError, match=rf"^batch 0 .* has the label {label}, and .* classes 0 to 3"):
        check.base({"logits": torch.zeros(3, 4)}, {"labels": torch.tensor([0, label, -100])})
    check.base({"logits": torch.zeros(2, 4)}, {"labels": torch.tensor([0, 3])})
    with pytest.raises(SpectraError, match=r"^batch 0 \(run by the tuned model\) has the label 3, .* 0 to 2"):
        check.tuned({"logits": torch.zeros(2, 3)}, {"labels": torch.tensor([0, 3])})


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int16, list, np.array])
def test_labels_of_any_whole_numbers_are_the_same_labels(kind: Any, tmp_path: Path) -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    labels = kind([0, 2, 3]) if callable(kind) else torch.tensor([0, 2, 3], dtype=kind)
    check = FunctionalCheck(tmp_path)
    check.base({"logits": logits}, {"labels": labels})
    check.tuned({"logits": logits}, {"labels": labels})
    expected = [-log_softmax(row)[label] for row, label in zip(logits.numpy(), [0, 2, 3], strict=True)]
    np.testing.assert_allclose(check.result()["base_loss"], expected, rtol=1e-9)
    assert not check.notes


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.tensor([0, 1]), "labels of shape [2]"),
        (torch.tensor([0.0, 1.0, 2.0]), "labels of shape [3] and type torch.float32 beside logits of shape [3, 4]"),
        (["no", "yes", "no"], "a list for labels"),
    ],
)
def test_labels_that_cannot_be_used_are_noted(labels: Any, said: str, tmp_path: Path) -> None:
    check, logits = FunctionalCheck(tmp_path), torch.zeros(3, 4)
    for use in (check.base, check.tuned):
        use({"logits": logits}, {"labels": labels})
    assert check.result()["kl"].eq(0).all()
    assert check.result()["base_loss"].isna().all()
    (note,) = check.notes
    assert f"the labels of 1 of 1 batches were not used: batch 0 has {said}" in note


def test_a_batch_without_samples_adds_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x, labels = Plain(), torch.randn(5, 6), torch.arange(5) % 4
    for batches in ([x, x[:0]], [(x[:0], labels[:0]), (x, labels)]):
        check = FunctionalCheck(tmp_path)
        take(check, base, moved(base), batches)
        frame = check.result()
        assert list(frame["sample"]) == list(range(5))
        assert frame["kl" if isinstance(batches[0], tuple) else "output_change"].gt(0).all()
        assert not any("not used" in note for note in check.notes)
