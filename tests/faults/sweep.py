"""Kill a coordinator or a node at every point where it changes something, start it again, and see that nothing is lost.

    python -m tests.faults.sweep [--every N] [--jobs N]

One run without a kill tells the points; then there is a run for each. After the kill the model directory must load, and after
the same commands have been given again: both processes end well; every partition is accepted once, with the bytes that
training without a kill makes; every receipt that the node was given is true; and no temporary file is left.
"""

from __future__ import annotations

import argparse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
import json
import os
from pathlib import Path
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time

import numpy as np
from safetensors.numpy import load_file

from coordinator.invite import create_token
from forge.checkpoint.assembly import arrived
from forge.checkpoint.safetensors_header import read_header
from forge.errors import NetworkError
from forge.files import RunDirectory
from forge.vocabulary import INDEX_FILE, expert_file
from tests.coordinator import fakes
from tests.faults.work import INVITATION_FILE, LISTEN_FILE, RECEIPTS_FILE, shard_of

ROOT = Path(__file__).resolve().parents[2]
ROLES = ("coordinator", "node")
#: Seconds that one run may take, kill and restart included.
PATIENCE = 120.0
#: What may be left lying although its name ends so: growing uploads and downloads are no temporary files.
TEMPORARY = "*.tmp"


@dataclass
class Outcome:
    """What came of one run."""

    role: str
    point: str
    killed: bool = False
    wrong: list[str] = field(default_factory=list)
    passed: dict[str, list[str]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The point without its number and its file's number."""
        return re.sub(r"\d+", "N", self.point.rpartition(" ")[0])


def one_run(role: str = "", point: str = "") -> Outcome:
    """A whole run from nothing, in which a role dies at a point (or nobody does)."""
    outcome = Outcome(role, point)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        address = free_address()
        prepare(root, address, [address])
        follow(root, outcome)
        if not outcome.wrong:
            check_end(root, outcome)
        outcome.passed = {role: (root / f"{role}.log").read_text().splitlines() for role in ROLES}
    return outcome


def free_address() -> str:
    """`HOST:PORT` where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def prepare(root: Path, listen: str, addresses: list[str]) -> None:
    """Write down where the coordinator will listen, and the node's invitation, which says where to look for it."""
    (root / LISTEN_FILE).write_text(listen)
    text, _ = create_token(root / "run", uses=1, expires="7d", name="", addresses=addresses)
    (root / INVITATION_FILE).write_text(text)


def follow(root: Path, outcome: Outcome, patience: float = PATIENCE) -> None:
    """Run both processes to their end; the one that dies at its point is started again."""
    running = {role: _start(role, root, outcome.point if role == outcome.role else "") for role in ROLES}
    deadline = time.monotonic() + patience
    try:
        while running:
            time.sleep(0.02)
            for role, process in list(running.items()):
                code = process.poll()
                if code == -signal.SIGKILL and role == outcome.role and not outcome.killed:
                    outcome.killed = True
                    _check_model(root, outcome)
                    running[role] = _start(role, root, "")
                elif code == NetworkError.exit_code and role == "node":
                    running[role] = _start(role, root, "")  # A person who started it before the coordinator starts it again.
                elif code is not None:
                    del running[role]
                    if code:
                        outcome.wrong.append(f"the {role} ended with {code}: {_tail(root / f'{role}.out')}")
                        return
            if time.monotonic() > deadline:
                outcome.wrong.append(f"not done after {patience:.0f} s: {', '.join(running)} still running; "
                                     f"{_tail(root / 'node.out')}; {_tail(root / 'coordinator.out')}")  # fmt: skip
                return
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def _start(role: str, root: Path, point: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.faults.work", role, str(root), str(root / f"{role}.log"), point]
    with open(root / f"{role}.out", "ab") as out:
        return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})


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
    if left:
        outcome.wrong.append(f"left behind: {left}")


def sweep(every: int, jobs: int, offset: int = 0) -> list[Outcome]:
    """One run for each `every`-th point of each role; the outcomes, the points that were not reached left out."""
    first = one_run()
    if first.wrong:
        return [first]
    wanted = [(role, point) for role in ROLES for point in first.passed[role]][offset % every :: every]
    with ThreadPoolExecutor(jobs) as pool:
        return [outcome for outcome in pool.map(lambda place: one_run(*place), wanted) if outcome.killed or outcome.wrong]


def table(outcomes: list[Outcome]) -> str:
    """Kills and failures by kind of point, as Markdown."""
    kills = Counter((outcome.role, outcome.kind) for outcome in outcomes)
    failed = Counter((outcome.role, outcome.kind) for outcome in outcomes if outcome.wrong)
    lines = ["| process | killed | times | lost, doubled or stuck |", "|---|---|---|---|"]
    lines += [f"| {role} | {kind} | {count} | {failed[role, kind]} |" for (role, kind), count in sorted(kills.items())]
    return "\n".join([*lines, f"| **all** | | **{sum(kills.values())}** | **{sum(failed.values())}** |"])


def main() -> int:
    """Sweep, print the table and what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="only each N-th point")
    parser.add_argument("--offset", type=int, default=0, help="which of the N to begin with")
    parser.add_argument("--jobs", type=int, default=3, help="runs at a time")
    options = parser.parse_args()
    outcomes = sweep(options.every, options.jobs, options.offset)
    print(table(outcomes))
    for outcome in outcomes:
        for sentence in outcome.wrong:
            print(f"{outcome.role}, {outcome.point}: {sentence}")
    return 1 if any(outcome.wrong for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
