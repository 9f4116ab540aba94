"""Kill a coordinator or a node at every point where it changes something, start it again, and see that nothing is lost.

    python -m tests.faults.sweep [--every N] [--jobs N] [--record FILE]

One run without a kill tells the points; then there is a run for each. After the kill the model directory must load, and after
the same commands have been given again: both processes end well; every partition is accepted once, with the bytes that
training without a kill makes; every receipt that the node was given is true; and no temporary file is left.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
import hashlib
import json
import multiprocessing
from multiprocessing.process import BaseProcess
import os
from pathlib import Path
import re
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
import time

import numpy as np
from safetensors.numpy import load_file

from coordinator.blobs import UNCOMMITTED_SECONDS
from coordinator.invite import create_token
from forge.checkpoint.assembly import arrived
from forge.checkpoint.safetensors_header import read_header
from forge.errors import ForgeError, NetworkError, StorageError
from forge.files import RunDirectory
from forge.vocabulary import CHECKPOINT_FILE, INDEX_FILE, expert_file
from node.control import ask
from tests.coordinator import fakes
from tests.faults import work
from tests.faults.points import FULL
from tests.faults.work import HOLD_FILE, INVITATION_FILE, LISTEN_FILE, RECEIPTS_FILE, shard_of

ROOT = Path(__file__).resolve().parents[2]
#: The processes of a run; in one of a hand-over the heir comes when the node has left.
ROLES, HEIR = ("coordinator", "node"), "heir"
#: Stands in the logs of the points where a hand-over begins, and where it is over.
MARK = "=="
#: Points at which something new comes onto the disk.
WRITES = re.compile(r"before (fsync|replace|rename|link|mkdir|write)")
#: Who dies, where, in a run of a hand-over or not, or has a full disk there.
Place = tuple[str, str, bool, bool]
#: Seconds that one run may take, kill and restart included.
PATIENCE = 300.0
#: Processes are forked from one that has imported everything: starting Python anew took four fifths of a kill's processor time.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.faults.warm"])
_starting = threading.Lock()
#: An upload of the day before yesterday that was never committed.
OLD_UPLOAD = hashlib.sha256(b"an old upload").hexdigest()
#: What may be left lying although its name ends so: growing uploads and downloads are no temporary files.
TEMPORARY = "*.tmp"


@dataclass
class Outcome:
    """What came of one run."""

    role: str
    point: str
    leaves: bool = False
    """Whether its node hands over and leaves."""
    full: bool = False
    """Whether the disk is full at the point, for that one call, and nobody dies."""
    killed: bool = False
    wrong: list[str] = field(default_factory=list)
    passed: dict[str, list[str]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The point without its number and its file's number."""
        return re.sub(r"\d+", "N", self.point.rpartition(" ")[0])

    @property
    def who(self) -> str:
        """Which process dies, and in what kind of run."""
        return self.role + ", handing over" * self.leaves + ", its disk full" * self.full


def one_run(role: str = "", point: str = "", leaves: bool = False, full: bool = False) -> Outcome:
    """A whole run from nothing, in which a role dies at a point (or nobody does)."""
    outcome = Outcome(role, point, leaves, full)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        address = free_address()
        prepare(root, address, [address], uses=2)
        (hand_over if leaves else follow)(root, outcome)
        if not outcome.wrong:
            check_end(root, outcome, nodes=2 if leaves else 1)
        outcome.passed = {log.stem: log.read_text().splitlines() for log in root.glob("*.log")}
        outcome.killed |= any(FULL in points for points in outcome.passed.values())
    return outcome


def free_address() -> str:
    """`HOST:PORT` where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def prepare(root: Path, listen: str, addresses: list[str], uses: int = 1) -> None:
    """Write down where the coordinator will listen, and the node's invitation, which says where to look for it."""
    (root / LISTEN_FILE).write_text(listen)
    text, _ = create_token(root / "run", uses=uses, expires="7d", name="", addresses=addresses)
    (root / INVITATION_FILE).write_text(text)
    old = RunDirectory(root / "run").blobs.path(OLD_UPLOAD)
    old.parent.mkdir()
    old.write_bytes(b"an old upload")
    os.utime(old, (time.time() - 2 * UNCOMMITTED_SECONDS,) * 2)


class Cast:
    """The processes of a run; the one that dies at its point is started again.

    Args:
        root: the directory of the run and its nodes.
        outcome: which process dies where; told what goes wrong.
        patience: seconds that the whole run may take.
    """

    def __init__(self, root: Path, outcome: Outcome, patience: float = PATIENCE) -> None:
        self.root, self.outcome, self._patience = root, outcome, patience
        self._deadline = time.monotonic() + patience
        self.running: dict[str, BaseProcess] = {}

    def __enter__(self) -> Cast:
        return self

    def __exit__(self, *raised: object) -> None:
        for process in self.running.values():
            process.kill()
            process.join()

    def start(self, role: str, point: str = "") -> None:
        """Start a process, which is to die at the point."""
        facts = {name: value for name, value in os.environ.items() if name.startswith("FAULTS_")}
        log, out = str(self.root / f"{role}.log"), str(self.root / f"{role}.out")
        facts |= {"FAULTS_FULL": "1"} if self.outcome.full and point else {}
        named = "coordinator" if role == "coordinator" else "node"
        arguments = (named, str(self.root), log, point, out, facts | ({} if named == role else {"FAULTS_NODE": role}))
        self.running[role] = _FORKS.Process(target=work.begin, args=arguments)
        with _starting:
            self.running[role].start()

    def first(self, role: str) -> None:
        """Start a process for the first time."""
        self.start(role, self.outcome.point if role == self.outcome.role else "")

    def until(self, condition: Callable[[], object]) -> bool:
        """Keep everybody going until something is so; False when something went wrong before."""
        while not condition():
            time.sleep(0.02)
            for role in list(self.running):
                self._look(role)
            if time.monotonic() > self._deadline:
                self.outcome.wrong.append(f"not done after {self._patience:.0f} s: {', '.join(self.running)} still running; "
                                          + "; ".join(_tail(path) for path in sorted(self.root.glob("*.out"))))  # fmt: skip
            if self.outcome.wrong:
                return False
        return True

    def _look(self, role: str) -> None:
        with _starting:  # Two threads that ask at once would take the answer from each other.
            code = self.running[role].exitcode
        if code == -signal.SIGKILL and role == self.outcome.role and not self.outcome.killed:
            self.outcome.killed = True
            _check_model(self.root, self.outcome)
            self.start(role)
        elif code == StorageError.exit_code and self.outcome.full and role == self.outcome.role and not self.outcome.killed:
            self.outcome.killed = True
            _check_model(self.root, self.outcome)
            self.start(role)  # A person made room.
        elif code == NetworkError.exit_code and role != "coordinator":
            self.start(role)  # A person who started it before the coordinator starts it again.
        elif code is not None:
            del self.running[role]
            if code:
                self.outcome.wrong.append(f"the {role} ended with {code}: {_tail(self.root / f'{role}.out')}")


def follow(root: Path, outcome: Outcome, patience: float = PATIENCE) -> None:
    """Run both processes to their end."""
    with Cast(root, outcome, patience) as cast:
        for role in ROLES:
            cast.first(role)
        cast.until(lambda: not cast.running)


def hand_over(root: Path, outcome: Outcome) -> None:
    """The owner of a node says `finish --now` in its first expert, until it has left; another node then does the rest."""
    (root / HOLD_FILE).touch()
    with Cast(root, outcome) as cast:
        for role in ROLES:
            cast.first(role)
        if not cast.until(lambda: any((root / "node").rglob(CHECKPOINT_FILE))):
            return
        _mark(root)

        def left() -> bool:
            with suppress(ForgeError):  # It has just been killed, or is about to leave.
                ask(root / "node", {"do": "finish", "now": True})
            return "node" not in cast.running

        if not cast.until(left):
            return
        cast.first(HEIR)
        if cast.until(lambda: any((root / HEIR).rglob(CHECKPOINT_FILE))):
            _mark(root)
            (root / HOLD_FILE).unlink()
            cast.until(lambda: not cast.running)


def _mark(root: Path) -> None:
    for log in root.glob("*.log"):
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{MARK}\n")


def handing_over(passed: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """The points, each with its role, between the marks of a run in which a node left."""
    for role, points in passed.items():
        begun = points.index(MARK) + 1 if role in ROLES else 0
        yield from ((role, point) for point in points[begun : points.index(MARK, begun) if role != "node" else None]
                    if point != MARK)  # fmt: skip


def _tail(path: Path) -> str:
    return " / ".join(path.read_text(errors="replace").splitlines()[-3:])


def _check_model(root: Path, outcome: Outcome) -> None:
    """At this very instant: the index, if there is one, names whole files that hold what it says."""
    model = root / "run" / "model"
    if not (model / INDEX_FILE).is_file():
        return
    weights: dict[str, str] = json.loads((model / INDEX_FILE).read_text())["weight_map"]
    for file in sorted(set(weights.values())):
        held = set(read_header(model / file).tensors)
        missing = {name for name, where in weights.items() if where == file} - held
        if missing:
            outcome.wrong.append(f"the model's {file} lacks {sorted(missing)[0]}")
    for file in ("config.json", "tokenizer.json"):
        json.loads((model / file).read_text())


def check_end(root: Path, outcome: Outcome, nodes: int = 1) -> None:
    """Nothing lost, nothing counted twice, nothing half-written. Among several nodes, one may come too late."""
    _check_model(root, outcome)
    run = RunDirectory(root / "run")
    with closing(sqlite3.connect(run.database)) as database:
        shards = {(partition, sha256): verdict for partition, sha256, verdict in
                  database.execute("select partition, sha256, verdict from shards")}  # fmt: skip
        known = database.execute("select count(*) from nodes").fetchone()[0]
        checkpoints = database.execute("select sha256, slot from handovers").fetchall()
    accepted = sorted(place for place, verdict in shards.items() if verdict == "accepted")
    if accepted != sorted(arrived(run.model).items()) or [k for k, _ in accepted] != list(range(fakes.CONFIG.model.n_experts)):
        outcome.wrong.append(f"accepted are {accepted}, and the model holds {arrived(run.model)}")
    for partition, _ in accepted:
        held, expected = load_file(run.model / expert_file(partition)), shard_of(root, partition)
        if any(not np.array_equal(held[name], tensor) for name, tensor in expected.items()):
            outcome.wrong.append(f"expert {partition} is another than without a kill")
    if known != nodes:
        outcome.wrong.append(f"{known} nodes are known where there were {nodes}")
    for line in (root / RECEIPTS_FILE).read_text().splitlines():
        partition, sha256, verdict = json.loads(line)
        if verdict != "ACCEPTED" and nodes > 1:  # A verdict was promised, which may be that another one came first.
            continue
        if verdict == "REJECTED" or shards.get((partition, sha256)) != "accepted":
            outcome.wrong.append(f"a receipt did not stay true: {line}")
    left = [str(path.relative_to(root)) for path in root.rglob(TEMPORARY)]
    blobs = [OLD_UPLOAD, *(sha256 for sha256, _ in checkpoints)]
    left += [f"{sha256[:12]} among the blobs" for sha256 in blobs if run.blobs.has(sha256)]
    left += [f"a checkpoint of partition {slot}" for _, slot in checkpoints if slot is not None]
    if left:
        outcome.wrong.append(f"left behind: {left}")


def sweep(every: int, jobs: int, offset: int = 0, record: Path | None = None, full: bool = False) -> list[Outcome]:
    """One run for each `every`-th point; the outcomes, the points that were not reached left out.

    Args:
        every, offset: which points.
        jobs: runs at a time.
        full: whether the disk is full where something is written, instead of kills.
        record: gets a line an outcome as it comes; the good ones that it has already are not made again.
    """
    plain, leaving = one_run(), one_run(leaves=True)
    if plain.wrong or leaving.wrong:
        return [outcome for outcome in (plain, leaving) if outcome.wrong]
    wanted = [(role, point, True, full) for role, point in handing_over(leaving.passed)]
    wanted += [(role, point, False, full) for role in ROLES for point in plain.passed[role]]
    if full:
        wanted = [place for place in wanted if WRITES.match(place[1])]
    held = {} if record is None else _recorded(record)

    def outcome_of(place: Place) -> Outcome:
        outcome = held.get(place) or one_run(*place)
        outcome.passed = {}  # A thousand names, of a thousand runs.
        if record is not None and place not in held:
            with _starting, open(record, "a", encoding="utf-8") as file:
                file.write(json.dumps([*place, outcome.killed, outcome.wrong]) + "\n")
        return outcome

    with ThreadPoolExecutor(jobs) as pool:
        outcomes = pool.map(outcome_of, wanted[offset % every :: every])
        return [outcome for outcome in outcomes if outcome.killed or outcome.wrong]


def _recorded(record: Path) -> dict[Place, Outcome]:
    """The outcomes in a record in which nothing went wrong."""
    lines = record.read_text().splitlines() if record.is_file() else []
    found = [Outcome(role, point, leaves, full, killed, wrong)
             for role, point, leaves, full, killed, wrong in map(json.loads, lines)]  # fmt: skip
    return {(outcome.role, outcome.point, outcome.leaves, outcome.full): outcome for outcome in found if not outcome.wrong}


def table(outcomes: list[Outcome]) -> str:
    """Kills and failures by kind of point, as Markdown."""
    kills = Counter((outcome.who, outcome.kind) for outcome in outcomes)
    failed = Counter((outcome.who, outcome.kind) for outcome in outcomes if outcome.wrong)
    lines = ["| process | killed | times | lost, doubled or stuck |", "|---|---|---|---|"]
    lines += [f"| {role} | {kind} | {count} | {failed[role, kind]} |" for (role, kind), count in sorted(kills.items())]
    return "\n".join([*lines, f"| **all** | | **{sum(kills.values())}** | **{sum(failed.values())}** |"])


def main() -> int:
    """Sweep, print the table and what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="only each N-th point")
    parser.add_argument("--offset", type=int, default=0, help="which of the N to begin with")
    parser.add_argument("--jobs", type=int, default=3, help="runs at a time")
    parser.add_argument("--record", type=Path, help="a file that remembers what was done, so that the same command goes on")
    parser.add_argument("--full", action="store_true", help="have the disk be full at each write, once, instead of kills")
    options = parser.parse_args()
    outcomes = sweep(options.every, options.jobs, options.offset, options.record, options.full)
    print(table(outcomes))
    for outcome in outcomes:
        for sentence in outcome.wrong:
            print(f"{outcome.who}, {outcome.point}: {sentence}")
    return 1 if any(outcome.wrong for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
