"""The commands as a person types them, and what they leave on the disk."""

from __future__ import annotations

from collections.abc import Mapping
import hashlib
import os
from pathlib import Path
import re
import shlex
import subprocess
import sysconfig
from types import MappingProxyType
from typing import NamedTuple

from forge.config import load_config
from tests.disk import Disk
from tests.test_pipeline import write_corpus

#: Name of an exit code in `docs/exit-codes.md` -> the code.
DOCUMENTED = {
    name: int(code) for code, name in re.findall(
        r"^\| (\d+) \| ([\w-]+) \|", (Path(__file__).parents[1] / "docs" / "exit-codes.md").read_text(), re.MULTILINE)
}  # fmt: skip


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def arguments(command: str) -> list[str]:
    """The command line with the program that is installed beside this Python."""
    program, *rest = shlex.split(command)
    return [str(Path(sysconfig.get_path("scripts")) / program), *rest]


def start(command: str, cwd: Path, disk: Disk | None = None, output: Path | None = None,
          environment: Mapping[str, str] = MappingProxyType({})) -> subprocess.Popen[str]:  # fmt: skip
    """Start a command in a directory, on a disk if one is given; all that it prints goes to `output`, else to pipes."""
    line = arguments(command)
    with open(output or os.devnull, "a") as file:
        stdout, stderr = (subprocess.PIPE, subprocess.PIPE) if output is None else (file, subprocess.STDOUT)
        return subprocess.Popen(
            line if disk is None else disk.command(*line, cwd=cwd), cwd=cwd, stdout=stdout, stderr=stderr, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment})  # fmt: skip


def run(command: str, cwd: Path, disk: Disk | None = None,
        environment: Mapping[str, str] = MappingProxyType({})) -> Outcome:  # fmt: skip
    """Run a command to its end."""
    with start(command, cwd, disk, None, environment) as process:
        try:
            out, err = process.communicate(timeout=600)  # A machine that others use as well is slow.
        finally:
            process.kill()
    return Outcome(process.returncode, out, err)


def is_one_sentence(outcome: Outcome, code: str, *words: str) -> None:
    """Assert the exit code of that name, and one sentence on stderr that holds the words."""
    assert outcome.code == DOCUMENTED[code], outcome
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ") and line[-1] in ".?", line
    for word in words:
        assert word in line
    assert "Traceback" not in outcome.out


def worked(outcome: Outcome) -> Outcome:
    """Assert that a command succeeded and had nothing to complain about."""
    assert (outcome.code, outcome.err) == (0, ""), outcome
    return outcome


def tree(root: Path) -> Mapping[str, str]:
    """Everything below a directory: relative path -> sha256 of a file, "" of a directory."""
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            for path in root.rglob("*")}  # fmt: skip


def write_inputs(directory: Path) -> Path:
    """A run of seconds (`tiny.yaml` on `corpus.jsonl`), and files that are wrong in one way each."""
    config = load_config("smoke", [
        "name=tiny", f"data.source={write_corpus(directory / 'corpus.jsonl', 60)}", "data.validation_fraction=0.15",
        "data.test_fraction=0.15", "model.vocab_size=300", "model.d_model=32", "model.d_ff=64", "model.n_layers=1",
        "model.n_heads=2", "model.n_experts=2", "model.top_k=1", "train.batch_size=4", "train.shared.tokens=16384",
        "train.expert.tokens=8192", "train.expert.learning_rate=0.004", "train.checkpoint_seconds=0.1",
        "router.tokens=4000", "evaluation.tokens=1000", "evaluation.samples=1", "evaluation.sample_tokens=4"])  # fmt: skip
    for name, text in {"tiny.yaml": config.to_yaml(), "broken.yaml": "name: tiny\nmodel: [1, 2\ndata: x\n", "list.yaml": "- 1\n",
                       "empty.txt": "", "blank.txt": " \n\n", "small.txt": "one document", "text.txt": "The sail.\n",
                       "deep.jsonl": "[" * 100_000 + "\n"}.items():  # fmt: skip
        (directory / name).write_text(text)
    return directory
