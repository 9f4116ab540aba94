"""The commands of a page of the documentation, run in order as its reader would type them, in an empty directory.

    python -m tests.pages docs/quick-start.md

Every fenced block marked `sh`, `console` (lines after `$ `), `python` or `yaml` is run, unless an HTML comment right
above it says otherwise. Blocks without a mark show what was printed, and indented ones how something is written. Comments:

    <!-- not run: it needs the Hub -->       the reason, which the tests list
    <!-- until: to watch: -->               goes on in the background once this was printed; ended by Ctrl-C after the page
    <!-- first: Ctrl-C -->                   what runs in the background is ended before
    <!-- exit: 13 -->                       the exit code, when it is not 0 (in the background: when it ends by itself)
    <!-- set: KEY=VALUE KEY=VALUE -->       environment of the block
    <!-- file: node.yaml -->                the block is written to this file (yaml must be)
    <!-- given: smoke is a tiny config -->  anywhere: what lies in the directory beforehand; see `_given`

Each block has a shell of its own. What is printed is what runs, but for `forge1_...`, which stands for the invitation
that the page made last. `smoke` and `default` as files in the directory win over the packaged configs of that name: so the
commands of a page take seconds where the reader's take longer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
import os
from pathlib import Path
import re
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time

import yaml

ROOT = Path(__file__).resolve().parent.parent
RUNNABLE = {"sh", "console", "python", "yaml"}
#: What blocks of shell begin their lines with. Others (pip, make, ssh) change more than a directory: they are not run.
PROGRAMS = {"forge", "forge-coordinator", "forge-node", "cat", "cd", "cp", "curl", "echo", "kill", "ls", "lm-eval", "mkdir",
            "rm", "tar"}  # fmt: skip
COMMENT = re.compile(r"<!-- (not run|first|until|exit|set|file|given): (.*?) -->")
#: Seconds that a block may take, and a process that was sent Ctrl-C: a machine that does ten other things is slow.
PATIENCE = 900


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block: the page and line that it is at, its language, its lines, and what the comments above it say."""

    where: str
    language: str
    text: str
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def why_not(self) -> str:
        """Why it is not run, in the page's words; empty when it is."""
        return self.notes.get("not run", "")

    @property
    def script(self) -> str:
        """What a shell is given."""
        if self.language == "console":
            return "\n".join(line[2:] for line in self.text.splitlines() if line.startswith("$ "))
        return self.text

    def strangers(self) -> list[str]:
        """Programs of a block of shell that no test runs."""
        lines = self.script.replace("\\\n", " ").splitlines()
        found = [re.sub(r"^(\w+=\S+ +)+", "", command.strip()).split(" ")[0]
                 for line in lines for command in re.split(r"\||&&|;", re.sub(r"(^|\s)#.*|'.*?'|\".*?\"", "", line))]  # fmt: skip
        return [program for program in found if program and program not in PROGRAMS]


def pages() -> list[Path]:
    """The README and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    """Every fenced block with a language, in order."""
    notes: dict[str, str] = {}
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
    for number, line in lines:
        if comment := COMMENT.fullmatch(line.strip()):
            notes[comment[1]] = comment[2]
        elif fence := re.fullmatch(r"\s*```(\w*)", line):
            body = []
            for _, inner in lines:
                if inner.strip() == "```":
                    break
                body.append(inner)
            if fence[1]:
                yield Block(where=f"{page.relative_to(ROOT).as_posix()}:{number}", language=fence[1], notes=notes,
                            text="\n".join(body))  # fmt: skip
            notes = {}
        elif line.strip():
            notes = {}


class Desk:
    """A reader's directory and what runs in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._invitation = ""
        self._servers: list[tuple[Block, subprocess.Popen[bytes], Path]] = []
        self._environment = {key: value for key, value in os.environ.items() if not key.startswith(("FORGE_", "XDG_DATA", "HF_"))}
        self._environment |= {"HOME": str(directory), "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}",
                              "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
                              "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip

    def type(self, block: Block) -> None:
        """Do what the block says.

        Raises:
            AssertionError: it did not end as the page says.
        """
        if "first" in block.notes:
            self.leave()
        if name := block.notes.get("file"):
            target = self.directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text + "\n")
            return
        if block.language == "yaml":
            assert yaml.safe_load(block.text) is not None, block.where
            return
        text = block.script.replace("forge1_...", self._invitation)
        command = [sys.executable, "-c", text] if block.language == "python" else ["bash", "-e", "-o", "pipefail", "-c", text]
        settings = dict(pair.split("=", 1) for pair in block.notes.get("set", "").split())
        output = self.directory / f".{block.where.replace('/', '-')}.out"
        with open(output, "wb") as file:
            process = subprocess.Popen(command, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=file, start_new_session=True,
                                       stderr=subprocess.STDOUT, env={**self._environment, **settings})  # fmt: skip
        self._servers.append((block, process, output))
        if (awaited := block.notes.get("until")) is not None:
            self._wait_for(awaited, process, output, block)
            return
        process.wait(PATIENCE)
        self._servers.pop()
        said = output.read_text(errors="replace")
        print(said, end="", flush=True)
        assert process.returncode == int(block.notes.get("exit", 0)), f"{block.where} ended with {process.returncode}:\n{said}"
        self._invitation = next(iter(re.findall(r"forge1_[\w-]+", said)), self._invitation)

    def _wait_for(self, awaited: str, process: subprocess.Popen[bytes], output: Path, block: Block) -> None:
        deadline = time.monotonic() + PATIENCE
        while awaited not in (said := output.read_text(errors="replace")):
            assert process.poll() is None, f"{block.where} ended with {process.returncode} before it said {awaited!r}:\n{said}"
            assert time.monotonic() < deadline, f"{block.where} has not said {awaited!r}:\n{said}"
            time.sleep(0.1)
        print(said, end="", flush=True)

    def leave(self) -> None:
        """End what runs, the last one first, as Ctrl-C does."""
        while self._servers:
            block, process, output = self._servers.pop()
            if process.poll() is None:
                _signal(process, signal.SIGINT)
            try:
                process.wait(PATIENCE)
            finally:
                _signal(process, signal.SIGKILL)
            good = {0, 130, -signal.SIGINT, int(block.notes.get("exit", 0))}
            assert process.returncode in good, f"{block.where}: {output.read_text(errors='replace')}"

    def kill(self) -> None:
        """Leave nothing running after a failure."""
        for _, process, _ in self._servers:
            _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _given(directory: Path, page: Path, desk: Path | None) -> None:
    """What the comments `given` of a page promise, from a directory that holds `run`, `tiny.yaml` and `corpus.jsonl`."""
    for kind, sentence in COMMENT.findall(page.read_text(encoding="utf-8")):
        if kind != "given":
            continue
        assert desk is not None, "give a directory with a finished run by --desk"
        name, _, what = sentence.partition(" is ")
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if what == "a finished run":
            shutil.copytree(desk / "run", target)
        elif what == "a tiny config":
            tree = yaml.safe_load((desk / "tiny.yaml").read_text())
            target.write_text(yaml.safe_dump({**tree, "name": name}))
        else:
            assert what == "a few texts", sentence
            shutil.copyfile(desk / "corpus.jsonl", target)


def own_network() -> None:
    """Bring up the loopback of a network namespace that has just been made."""
    import fcntl
    import socket

    bring_up, flags = 0x8914, 0x1 | 0x40  # SIOCSIFFLAGS, IFF_UP | IFF_RUNNING
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as interface:
        fcntl.ioctl(interface, bring_up, struct.pack("16sH14x", b"lo", flags))


def main() -> None:
    """Run a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--desk", type=Path, help="holds run, tiny.yaml and corpus.jsonl, for pages that are given some")
    parser.add_argument("--own-network", action="store_true", help="in a network namespace: bring up its loopback")
    options = parser.parse_args()
    if options.own_network:
        own_network()
    with tempfile.TemporaryDirectory(prefix="page-") as directory:
        _given(Path(directory), options.page.resolve(), options.desk and options.desk.resolve())
        desk = Desk(Path(directory))
        try:
            for block in blocks(options.page.resolve()):
                if not block.why_not and block.language in RUNNABLE:
                    print(f"--- {block.where}\n{block.script}", flush=True)
                    started = time.monotonic()
                    desk.type(block)
                    print(f"--- {time.monotonic() - started:.1f} s", flush=True)
            desk.leave()
        finally:
            desk.kill()


if __name__ == "__main__":
    main()
