"""kill -9 in every phase; the same command goes on, and every partition is accepted exactly once."""

from __future__ import annotations

from collections.abc import Iterator
import json
import os
from pathlib import Path
import signal
import subprocess
import sys

from modularforge.v1 import fleet_pb2 as pb
import pytest

from forge.checkpoint.assembly import arrived
from forge.files import RunDirectory
from forge.vocabulary import STAGES

from .fakes import FakeNode, make_shard, sha256_of, until

ROOT = Path(__file__).resolve().parents[2]


class Processes:
    """Coordinators on one run directory, one after another."""

    def __init__(self, root: Path, repo: str = "", **environment: str) -> None:
        self.root, self._repo, self._environment = root, repo, os.environ | environment
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, kill_at: str = "") -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.coordinator.process", str(self.root), kill_at, self._repo]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=self._environment)
        self.running.append(process)
        return process

    def address(self, process: subprocess.Popen[bytes]) -> str:
        def told() -> str | None:
            try:
                held = json.loads((self.root / "coordinator.json").read_text())
            except (OSError, ValueError):
                return None
            return str(held["address"]) if held["pid"] == process.pid else None

        return str(until(told, 20))

    def close(self) -> None:
        for process in self.running:
            process.kill()
            process.wait()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tmp_path / "run")
    yield processes
    processes.close()


def working(node: FakeNode) -> FakeNode:
    node.join()
    until(lambda: node.ask().WhichOneof("answer") == "assignment")
    return node


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_coordinator_killed_in_every_phase_goes_on(processes: Processes) -> None:
    for stage in (*STAGES, "evaluate"):
        assert processes.start(stage).wait(20) == -signal.SIGKILL

    process = processes.start("validate")
    node = working(FakeNode(processes.address(process), "laptop", processes.root))
    run = RunDirectory(processes.root)
    shards = [make_shard(run, partition) for partition in range(3)]
    first = node.lease()
    node.open(first.lease_id, shards[0])
    node.send(first.lease_id, shards[0][:1000], sha256=sha256_of(shards[0]))
    process.kill()
    process.wait(20)

    process = processes.start("validate")
    node = working(FakeNode(processes.address(process), "laptop", processes.root))
    assert node.lease().lease_id == first.lease_id
    assert node.open(first.lease_id, shards[0]).offset == 1000
    assert node.hand_in(first, shards[0], run.run_id).verdict == pb.Receipt.VERDICT_PENDING
    assert process.wait(20) == -signal.SIGKILL
    assert processes.start("evaluate").wait(20) == -signal.SIGKILL

    process = processes.start()
    node = working(FakeNode(processes.address(process), "laptop", processes.root))
    for partition, shard in enumerate(shards):
        assignment = first if partition == 0 else node.lease(partition)
        node.hand_in(assignment, shard, run.run_id)
        assert node.verdict(assignment, shard, run.run_id).verdict == pb.Receipt.VERDICT_ACCEPTED
    assert node.ask().WhichOneof("answer") == "done"
    assert process.wait(20) == 0
    assert arrived(run.model) == {k: sha256_of(shard) for k, shard in enumerate(shards)}
    events = [json.loads(line) for line in (processes.root / "events.jsonl").read_text().splitlines()]
    accepted = [event["partition"] for event in events if event["event"] == "accepted"]
    assert sorted(accepted) == [0, 1, 2]
