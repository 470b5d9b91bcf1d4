"""Weights that are shared among processes: on the CPU, by gloo, the numbers of one process come out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spectra.errors import SpectraError
from spectra.training import Run, Task, TensorExamples, load_run, train
from spectra.training.examples import in_turn, in_vain
from spectra.training.sharding import blocks, of_other_dtypes
from tests.training.small import method_settings, run_small

for extra in ("accelerate", "peft", "transformers"):
    pytest.importorskip(extra)

ROOT = Path(__file__).parents[2]
CASES = {
    "slice": {"method": "slice", "dtype": "float32"},
    "slice of a bfloat16 base": {"method": "slice", "dtype": "bfloat16"},
    "full": {"method": "full", "dtype": "float32"},
}


class Encoder(nn.Module):
    """A small BERT under the head of its own task, five classes. Its embedding is tied to a second module."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(vocab_size=50, max_position_embeddings=16, **sizes, **still)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.again = nn.Linear(16, 50, bias=False)
        self.again.weight = self.bert.embeddings.word_embeddings.weight
        self.old = nn.Linear(16, 5)

    def features(self, ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.bert(input_ids=ids).last_hidden_state
        return (states + self.again(states).softmax(-1) @ self.again.weight).mean(1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.old(self.features(ids))


class WithNewHead(nn.Module):
    """The encoder under a new head, in float32 on any encoder."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder.features(ids).float())


def token_ids() -> torch.Tensor:
    return torch.randint(0, 50, (70, 9), generator=torch.Generator().manual_seed(0))


def new_task(base: nn.Module) -> Task:
    """35 examples to learn from, and as many to be scored on in five batches, an odd number."""
    assert isinstance(base, Encoder)
    ids = token_ids()
    test, learnt = ({"ids": part, "labels": part[:, 0] % 3} for part in (ids[:35], ids[35:]))
    return Task(WithNewHead(base), TensorExamples(test), train=TensorExamples(learnt), head=("head",))


def old_task(base: nn.Module) -> Task:
    ids = token_ids()
    return Task(base, TensorExamples({"ids": ids, "labels": ids[:, 1] % 5}))


def run_encoder(out: Path, case: dict[str, str], shard: bool, **others: Any) -> Run:
    """Six steps of two batches each; the base is the same whoever makes it."""
    torch.manual_seed(1)
    base = Encoder().to(getattr(torch, case["dtype"])).eval()
    method = method_settings(case["method"]) | ({"targets": ["query", "dense"]} if case["method"] != "full" else {})
    settings = {
        "out": str(out),
        "compare": False,
        "device": "cpu",
        "shard": shard,
        "method": method,
        "keep_every": 3,
        "save_every": 2,
        "evaluation_batch_size": 8,
        "optimiser": {"steps": 6, "learning_rate": 1e-2, "batch_size": 6, "accumulate": 2},
    }
    return train(settings, base=base, task=new_task, retain={"old": old_task}, **others)


class _Killed(Exception):
    pass


def killed_after_three(out: Path) -> None:
    def progress(step: int, steps: int, word: str) -> None:
        if step == 3:
            raise _Killed

    with pytest.raises(_Killed):
        run_encoder(out, CASES["full"], True, progress=progress)


def all_in_two_processes(folder: Path) -> None:
    """What each of two processes runs: every case, and one that is killed and gone on with."""
    from torch.distributed.tensor import DTensor

    for name, case in CASES.items():
        run = run_encoder(folder / name, case, True)
        parameters = [*run.model.parameters()] if run.model is not None else []
        assert parameters and all(isinstance(parameter, DTensor) for parameter in parameters)
        own = sum(parameter.to_local().numel() for parameter in parameters if isinstance(parameter, DTensor))
        assert 0.4 < own / sum(parameter.numel() for parameter in parameters) < 0.6
    killed_after_three(folder / "gone on with")
    run_encoder(folder / "gone on with", CASES["full"], True, resume=True)
    killed_after_three(folder / "gone on with by one")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of two processes, all in one launch."""
    place = tmp_path_factory.mktemp("two")
    script = "import sys; from pathlib import Path; from tests.training.test_sharding import *; "
    script += "all_in_two_processes(Path(sys.argv[1]))"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    command = [*launch, sys.executable, "-c", script, str(place)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return place


def assert_same(one: Run, two: Run, tolerance: float, of_losses: float = 1e-6) -> None:
    """Losses, scores, and every tensor that was written, kept steps included."""
    columns = ["step", "split", "score"]
    assert two.metrics[columns].equals(one.metrics[columns])
    assert two.metrics.loss.tolist() == pytest.approx(one.metrics.loss.tolist(), rel=of_losses)
    files = sorted(path.relative_to(one.folder) for path in one.folder.rglob("*.safetensors"))
    assert len(files) == 3 and files == sorted(p.relative_to(two.folder) for p in two.folder.rglob("*.safetensors"))
    for file in files:
        a, b = load_file(one.folder / file), load_file(two.folder / file)
        assert a.keys() == b.keys() and all(a[name].dtype == b[name].dtype for name in a)
        assert max(float((a[name] - b[name]).abs().max()) for name in a) <= tolerance


@pytest.mark.parametrize("name", CASES)
def test_shared_weights_are_trained_as_whole_ones(folder: Path, tmp_path: Path, name: str) -> None:
    one = run_encoder(tmp_path / "one", CASES[name], False)
    two = load_run(folder / name)
    assert (one.summary["processes"], two.summary["processes"]) == (1, 2)
    for count in ("parameters", "trainable_parameters"):
        assert one.summary[count] == two.summary[count]
    # AdamW divides by the root of the second moment: where that is near 0, the order of a sum shows.
    assert_same(one, two, 2e-5, 1e-6 if CASES[name]["dtype"] == "float32" else 1e-4)


def test_a_killed_run_of_shared_weights_goes_on_to_the_same_numbers(folder: Path) -> None:
    assert_same(load_run(folder / "full"), load_run(folder / "gone on with"), 0.0)


def test_one_process_goes_on_with_the_state_of_two(folder: Path) -> None:
    run = run_encoder(folder / "gone on with by one", CASES["full"], False, resume=True)
    assert_same(load_run(folder / "full"), run, 2e-5)


def test_what_cannot_be_shared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpectraError, match=r"there is one; start the run with accelerate launch or torchrun"):
        run_small(tmp_path / "one", {"shard": True})
    assert not (tmp_path / "one").exists()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SpectraError, match=r"there is one; start the run with accelerate launch or torchrun"):
        run_small(tmp_path / "one")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(SpectraError, match="fsdp_offload_params is set"):
        run_small(tmp_path / "one")


def test_blocks_are_the_outermost_members_of_lists() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = nn.ModuleDict({"layers": nn.ModuleList([inner, nn.ReLU()]), "head": nn.Linear(2, 2)})
    assert [*blocks(nn.ModuleList([model, model["layers"]]))] == [inner]
    assert [*blocks(nn.ModuleList([inner]))] == [inner[0]]


def test_parameters_of_another_dtype_make_a_group_of_their_own() -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2)).bfloat16()
    assert of_other_dtypes(block) == []
    block[2].float()
    assert of_other_dtypes(block) == [block[2]]
    assert of_other_dtypes(block, [block[2]]) == []
    block[2].requires_grad_(False)
    assert of_other_dtypes(block) == []


@pytest.mark.parametrize(("count", "ranks"), [(35, 2), (35, 3), (8, 4), (1, 3), (16, 2)])
def test_every_process_runs_as_many_batches(count: int, ranks: int) -> None:
    examples = TensorExamples({"x": torch.arange(count)})
    own = [[*in_turn(examples, 8, rank, ranks)] for rank in range(ranks)]
    assert sorted(int(x) for batches in own for batch in batches for x in batch["x"]) == list(range(count))
    idle = [[*in_vain(examples, 8, rank, ranks)] for rank in range(ranks)]
    assert len({len(a) + len(b) for a, b in zip(own, idle, strict=True)}) == 1
