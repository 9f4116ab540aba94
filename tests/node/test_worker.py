from __future__ import annotations

from collections.abc import Callable
import io
from pathlib import Path

import pytest

from forge.errors import MemoryBudgetError
from forge.system import resident_bytes_of
from forge.train.memory import candidates
from node.agent import Agent
from node.client import FleetClient
from node.console import Console
from node.heartbeat import Heartbeats
from node.identity import Identity
from node.machine import MachineProfile
from node.worker import RunningJob, Worker, run_train_expert
from tests import expert_work

from . import fakes
from .fakes import FakeCoordinator


def test_a_child_above_its_limit_is_stopped(tmp_path: Path, connect: Callable[..., FleetClient]) -> None:
    jobs: list[RunningJob] = []

    def run_job(*arguments: object) -> RunningJob:
        jobs.append(run_train_expert(*arguments))  # type: ignore[arg-type]
        return jobs[-1]

    assignment = expert_work.assignment(tmp_path / "files")
    work = tmp_path / "work"
    work.mkdir()
    *_, smallest = candidates(expert_work.CONFIG, "expert")
    worker = Worker(Console(io.StringIO()), ram_bytes=100 << 20, threads=1, device="cpu", run_job=run_job)
    beats = Heartbeats(connect("127.0.0.1:1"), "lease", 60, lambda _: None)  # not started: no pulse is needed
    with pytest.raises(MemoryBudgetError, match=r"partition 1 used 1\d\dM, more than the 100M .* --ram \d+M"):
        worker.train(assignment, work, beats, smallest.peak_bytes)
    assert resident_bytes_of(jobs[0].pid) == 0
    assert {path.name for path in work.iterdir()} == {"train.log"}


def test_a_node_whose_training_outgrows_its_limit_goes_on_smaller_under_the_same_lease(
        tmp_path: Path, connect: Callable[..., FleetClient], machine: MachineProfile, coordinator: FakeCoordinator,
        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A real agent, a real training process; only the limit is lower than the prediction says."""
    monkeypatch.setattr(fakes, "CONFIG", expert_work.CONFIG)
    files = expert_work.write_files(tmp_path / "files")
    coordinator.shared, coordinator.ffn, tokens = (
        coordinator._add(files[name].read_bytes()) for name in ("shared", "shared_ffn", "train_tokens"))  # fmt: skip
    coordinator.tokens, coordinator.state = [tokens] * 2, ["open"] * 2
    largest, second, *_ = candidates(expert_work.CONFIG, "expert")
    limit = (largest.peak_bytes + second.peak_bytes) // 2
    planned: list[object] = []

    def run_job(arguments: dict[str, object], threads: int, log: Path, ram_bytes: int) -> RunningJob:
        planned.append(arguments["ram_bytes"])
        assert ram_bytes == 2 << 30
        return run_train_expert(arguments, threads, log, limit)

    printed = io.StringIO()
    console, identity = Console(printed), Identity.open(tmp_path / "node")
    agent = Agent(
        client=connect(coordinator.address, identity), identity=identity, machine=machine, console=console,
        worker=Worker(console, ram_bytes=2 << 30, threads=1, device="cpu", run_job=run_job),
        data_dir=tmp_path / "node", name="tester", ram_bytes=2 << 30, sleep=lambda _: None)  # fmt: skip
    assert agent.run() == 0
    assert printed.getvalue().count("it goes on from its checkpoint with a smaller plan") == 1
    assert planned == [largest.peak_bytes, second.peak_bytes], "the next lease begins with the plan that held"
    assert list(coordinator.lease_holder) == ["lease-0", "lease-1"] and coordinator.released == []
    assert coordinator.state == ["accepted"] * 2
    assert [manifest["tokens_seen"] for manifest in coordinator.manifests] == [4 * 4 * 1024] * 2
