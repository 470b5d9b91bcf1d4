"""Nothing in a file is run, and no file fills the memory. One process with little memory opens them all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from spectra.checkpoints import CheckpointError, open_checkpoint
from tests.checkpoints.hostile_files import Call, Storage, pickled, tensor, write_all, write_legacy, write_zip

resource = pytest.importorskip("resource", reason="memory is capped with setrlimit")

# Room for the largest header that is parsed, on top of what Python and torch take.
MEMORY_BYTES = 600 << 20

OPENER = """
import json, resource, sys
from pathlib import Path
from spectra.checkpoints import CheckpointError, open_checkpoint
files, cap = json.loads(sys.stdin.read())
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + cap,) * 2)
said = {}
for what, path in files.items():
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint:
            checkpoint[name]
        said[what] = "OPENED " + repr(dict(checkpoint.refused))
    except CheckpointError as error:
        said[what] = str(error)
    except BaseException as error:
        said[what] = f"RAISED {type(error).__name__}: {error}"
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, Path], Path]:
    if not Path("/proc/self/statm").exists():
        pytest.skip("the size of a process is read from /proc")
    folder = tmp_path_factory.mktemp("hostile")
    canary = tmp_path_factory.mktemp("canary") / "ran"
    files = write_all(folder, canary)
    process = subprocess.run(
        [sys.executable, "-c", OPENER],
        input=json.dumps([{what: str(path) for what, path in files.items()}, MEMORY_BYTES]),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout), files, canary


def test_no_hostile_file_runs_its_code(verdicts: tuple[dict[str, str], dict[str, Path], Path]) -> None:
    said, _, canary = verdicts
    assert sum(what.startswith("code") for what in said) > 20
    assert not canary.exists()


def test_every_hostile_file_is_refused_in_a_sentence_with_its_path(
    verdicts: tuple[dict[str, str], dict[str, Path], Path],
) -> None:
    said, files, _ = verdicts
    for what, path in files.items():
        assert not said[what].startswith(("OPENED", "RAISED")), (what, said[what])
        assert str(path) in said[what] and said[what].isprintable(), (what, said[what])


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("code, zip.pt", "'posix.system', which is code"),
        ("code, legacy.bin", "'posix.system', which is code"),
        ("code, zip.safetensors", "'posix.system', which is code"),
        ("code, plain.pkl", "plain pickle"),
        ("code, head of legacy", "'posix.system', which is code"),
        ("code, keys of legacy", "'posix.system', which is code"),
        ("code, distributed", "distributed checkpoint"),
        ("code, adapter", "'posix.system', which is code"),
        ("4 TB storage, zip", "more than the file holds"),
        ("4 TB storage, legacy", "more than the file holds"),
        ("4 TB tensor, zip", "of a storage of 16"),
        ("4 TB tensor, legacy", "of a storage of 16"),
        ("past its storage", "claims 24 bytes of a storage of 16"),
        ("4 TB view, zip", "repeats 4 bytes"),
        ("storage of another record", "lacks the data of storage '../byteorder'"),
        ("bytearray of 8 GB", "'bytearray"),
        ("fifteen million sets", "larger than weights need"),
        ("fifteen million sets, legacy", "larger than weights need"),
        ("inflating zip", "compressed"),
        ("inflating pickle", "compressed"),
        ("header of 4 EB", "truncated or no safetensors file"),
        ("a million tensors", "split the file into shards"),
        ("4 TB tensor, safetensors", "'w' .*truncated"),
        ("index to ../zip.pt", "outside its folder"),
        ("index to ..\\zip.pt", "outside its folder"),
    ],
)
def test_the_reason_is_the_right_one(
    verdicts: tuple[dict[str, str], dict[str, Path], Path], what: str, reason: str
) -> None:
    assert re.search(reason, verdicts[0][what].replace("builtins.", "")), verdicts[0][what]


def test_the_same_code_runs_under_a_loader_that_trusts_it(tmp_path: Path) -> None:
    # Otherwise a canary that never appears would prove nothing.
    canary = tmp_path / "ran"
    path = write_legacy(tmp_path / "model.pt", {"w": Call(os.system, f"echo ran > '{canary}'")}, keys=())
    with pytest.raises(CheckpointError):
        open_checkpoint(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()


def test_attributes_that_a_file_hangs_on_a_dict_or_tensor_change_nothing(tmp_path: Path) -> None:
    weight = tensor((2, 2), (2, 1), Storage(4))
    dressed = Call(
        torch._tensor._rebuild_from_type_v2,
        torch._utils._rebuild_tensor_v2,
        torch.Tensor,
        (Storage(4), 0, (4,), (1,), False, OrderedDict()),
        {"untyped_storage": torch.Size, "stride": 3, "detach": torch.device},
    )
    content = Call(OrderedDict, [["weight", weight], ["dressed", dressed]], state={"items": torch.Size, "get": 3})
    path = write_zip(tmp_path / "dressed.pt", pickled(content), torch.arange(4.0).numpy().tobytes())
    checkpoint = open_checkpoint(path)
    assert checkpoint["weight"].tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert checkpoint["dressed"].tolist() == [0.0, 1.0, 2.0, 3.0]
