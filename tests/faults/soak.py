"""Does anything grow? Run after run on one coordinator process, by two node processes of which one lives through all of it.

    python -m tests.faults.soak --hours 2

The processes are those of the sweep: everything is real but the training. A run ends when every expert is accepted; each node
then has itself revoked with its shards, so that the same partitions are open again, and joins anew with another key. The other
node is killed every half minute. A browser's worth of `/metrics` is read all the time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import closing, suppress
import ctypes
from dataclasses import dataclass
import json
import os
from pathlib import Path
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

import psutil

from coordinator.invite import create_token
from coordinator.serve import Coordinator
from forge.errors import StorageError, report_errors
from forge.files import RunDirectory, read_json, write_bytes
from forge.invitation import Invitation
from node.cli import run_node
from node.link import Link
from node.preferences import load_preferences
from tests.coordinator import fakes
from tests.coordinator.fakes import FakeJobs
from tests.faults.sweep import ROOT, free_address
from tests.faults.work import INVITATION_FILE, LISTEN_FILE, ChainedJob

SAMPLE_SECONDS, KILL_SECONDS = 2.0, 30.0
#: Where a process writes down what of its memory is in use.
HEAP_FILE = "{role}.heap"
#: A file of this suffix beside it has the process give back what it does not use.
TRIM = ".trim"
#: What the last fifth of the time may have more than the second: a share, and so much.
GROWTH, SLACK = 0.02, {"resident": 4 << 20, "in_use": 1 << 20, "blocks": 5_000, "handles": 2, "threads": 2}
LASTING = ("coordinator", "node")
NAMES = {"resident": "resident, MiB", "in_use": "in use, MiB", "blocks": "Python's blocks"}


@dataclass(frozen=True)
class Sample:
    """A process at one moment."""

    resident: int
    in_use: int
    """Bytes that were asked of the C library and not given back. What is resident beyond it was given back, and is kept by it."""
    blocks: int
    """Of memory that Python holds."""
    handles: int
    threads: int


class _Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "free_chunks", "fast_chunks", "mapped_regions", "mapped", "unused",
                                                     "fast", "in_use", "free", "top")]  # fmt: skip


def note_heap(path: Path) -> None:
    """Write down for good what this process has in use, every `SAMPLE_SECONDS`."""
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Heap
    while True:
        if path.with_suffix(TRIM).exists():
            library.malloc_trim(0)
        heap = library.mallinfo2()
        write_bytes(path, json.dumps([heap.in_use + heap.mapped, sys.getallocatedblocks()]).encode())
        time.sleep(SAMPLE_SECONDS)


def coordinate(root: Path) -> None:
    """A coordinator for as long as it is let."""
    with Coordinator(fakes.CONFIG, root / "run", (root / LISTEN_FILE).read_text(), run_job=FakeJobs(), echo=lambda line: None,
                     dashboard="127.0.0.1:0") as coordinator:  # fmt: skip
        coordinator.wait()


def work(root: Path, name: str) -> None:
    """Join, train until nothing is left, take it all back, and join anew with another key."""
    invitation = Invitation.parse((root / INVITATION_FILE).read_text())
    for number in range(sys.maxsize):
        data_dir, called = root / name, f"{name}-{number}-{os.getpid()}"
        preferences = load_preferences(None, data_dir, {"ram": "2G", "threads": 1, "device": "cpu", "nice": 0, "name": called})
        code = run_node(Link(None, data_dir=data_dir, invitation=invitation), preferences, data_dir, False,
                        lambda arguments, *more: ChainedJob(root, arguments))  # fmt: skip
        if code:
            sys.exit(code)
        # In a process of its own, as an operator does it: this one is to hold what a node holds, and nothing of a database.
        subprocess.run([sys.executable, "-m", "coordinator.cli", "nodes", "revoke", called, "--drop-shards", "--run-dir",
                        str(root / "run")], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)  # fmt: skip
        shutil.rmtree(data_dir)


def sample(process: subprocess.Popen[bytes], heap: Path) -> Sample:
    """The process now."""
    seen = psutil.Process(process.pid)
    in_use, blocks = json.loads(heap.read_text()) if heap.is_file() else (0, 0)
    with seen.oneshot():
        handles = seen.num_fds() if os.name == "posix" else seen.num_handles()  # type: ignore[attr-defined,unused-ignore]
        return Sample(seen.memory_info().rss, in_use, blocks, handles, seen.num_threads())


def soak(root: Path, seconds: float) -> Iterator[dict[str, Sample]]:
    """Samples of the coordinator and of the node that is not killed; the last one after both gave back what they do not use."""
    address = free_address()
    (root / LISTEN_FILE).write_text(address)
    text, _ = create_token(root / "run", uses=100_000, expires="7d", name="", addresses=[address])
    (root / INVITATION_FILE).write_text(text)
    running = {role: start(root, role) for role in ("coordinator", "node", "mortal")}
    begun = killed = time.monotonic()
    try:
        while time.monotonic() - begun < seconds:
            time.sleep(SAMPLE_SECONDS)
            for role, process in running.items():
                code = process.poll()
                if code is not None and role == "coordinator":
                    raise RuntimeError(f"the coordinator ended with {code}: {(root / 'coordinator.out').read_text()[-2000:]}")
                if code is not None:  # Nobody answered when it came, or it was killed after it had itself revoked.
                    shutil.rmtree(root / role, ignore_errors=True)
                    running[role] = start(root, role)
            if time.monotonic() - killed > KILL_SECONDS:
                killed = time.monotonic()
                kill(running["mortal"])
                running["mortal"] = start(root, "mortal")
            with suppress(OSError, StorageError):  # Not yet.
                page = read_json(root / "run" / "coordinator.json")["dashboard"]
                urllib.request.urlopen(f"{page.rstrip('/')}/metrics", timeout=10).read()
            yield {role: sample(running[role], root / HEAP_FILE.format(role=role)) for role in LASTING}
        for role in LASTING:
            (root / HEAP_FILE.format(role=role)).with_suffix(TRIM).touch()
        time.sleep(2 * SAMPLE_SECONDS)
        yield {role: sample(running[role], root / HEAP_FILE.format(role=role)) for role in LASTING}
    finally:
        for process in running.values():
            kill(process)


def start(root: Path, role: str) -> subprocess.Popen[bytes]:
    """One of the processes."""
    with open(root / f"{role}.out", "ab") as out:
        return subprocess.Popen([sys.executable, "-m", "tests.faults.soak", "--role", role, str(root)], cwd=ROOT, stdout=out,
                                stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)  # fmt: skip


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill one of the processes, with the one that revokes its node."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def count(root: Path) -> tuple[int, int, int]:
    """Runs that were completed, shards that came, and partitions that have more than one shard now."""
    with closing(sqlite3.connect(RunDirectory(root / "run").database)) as database:
        shards, slots, distinct = database.execute("select count(*), count(slot), count(distinct slot) from shards").fetchone()
    journal = (root / "run" / "events.jsonl").read_text()
    return journal.count('"event": "done"'), shards + journal.count('"event": "withdrawn"'), slots - distinct


def report(samples: list[dict[str, Sample]]) -> tuple[str, list[str]]:
    """A table by fifths of the time, and what grew.

    Of each fifth it takes what nine tenths of the samples stay below: a node between two runs holds less than one in a run.
    """
    fifths = [samples[len(samples) * k // 5 : len(samples) * (k + 1) // 5] for k in range(5)]
    lines, grew = ["| process | | 1st fifth | 2nd | 3rd | 4th | 5th |", "|---|---|---|---|---|---|---|"], []
    for role in samples[0]:
        for what, unit in (("resident", 1 << 20), ("in_use", 1 << 20), ("blocks", 1), ("handles", 1), ("threads", 1)):
            held = [sorted(getattr(seen[role], what) for seen in fifth)[9 * len(fifth) // 10] for fifth in fifths]
            shown = " | ".join(f"{value / unit:.1f}" if unit > 1 else f"{value:,.0f}" for value in held)
            lines.append(f"| {role} | {NAMES.get(what, what)} | {shown} |")
            allowed = held[1] * GROWTH + SLACK[what]
            if held[4] > held[1] + allowed:
                grew.append(f"{what} of the {role} grew from {held[1]:,.0f} to {held[4]:,.0f}")
    return "\n".join(lines), grew


def main() -> int:
    """Soak, print the table, and what grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0, help="how long")
    parser.add_argument("--role", choices=["coordinator", "node", "mortal"], help=argparse.SUPPRESS)
    parser.add_argument("root", nargs="?", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role is not None:
        threading.Thread(target=note_heap, args=(options.root / HEAP_FILE.format(role=options.role),), daemon=True).start()
        with report_errors():
            coordinate(options.root) if options.role == "coordinator" else work(options.root, options.role)
        return 0
    with tempfile.TemporaryDirectory() as name:
        *samples, trimmed = soak(Path(name), options.hours * 3600)
        runs, shards, doubled = count(Path(name))
        table, grew = report(samples)
        print(table)
        for role in LASTING:
            print(f"resident of the {role} without what the C library keeps: {trimmed[role].resident / 2**20:.1f} MiB")
        print(f"{options.hours:g} hours: {runs} runs completed, {shards} shards, {doubled} partitions counted twice")
    for sentence in grew:
        print(sentence)
    return 1 if grew or doubled or not runs else 0


if __name__ == "__main__":
    sys.exit(main())
