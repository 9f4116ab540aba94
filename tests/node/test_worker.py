from __future__ import annotations

from collections.abc import Callable
import io
import json
import os
from pathlib import Path
import sys
from typing import Any

import psutil
import pytest
from safetensors import safe_open

from forge.config import parse_config
from forge.errors import MemoryBudgetError
from forge.system import resident_bytes_of
from forge.train.memory import built_for_cuda, candidates
from node.agent import Agent
from node.client import FleetClient
from node.console import Console
from node.disk import training_bytes
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
    worker = Worker(Console(io.StringIO()), ram_bytes=100 << 20, threads=1, device="cpu", run_job=run_job, nice=0)
    beats = Heartbeats(connect("127.0.0.1:1"), "lease", 60, lambda _: None)  # not started: no pulse is needed
    with pytest.raises(MemoryBudgetError, match=rf"partition 1 used {expert_work.USED}, more than the 100M .* --ram \d+M"):
        worker.train(assignment, work, beats, smallest.peak_bytes)
    assert resident_bytes_of(jobs[0].pid) == 0
    assert {path.name for path in work.iterdir()} == {"train.log"}


@pytest.mark.skipif(built_for_cuda(), reason="what PyTorch for CUDA holds is known less well than these plans are apart")
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
        worker=Worker(console, ram_bytes=2 << 30, threads=1, device="cpu", run_job=run_job, nice=0),
        data_dir=tmp_path / "node", name="tester", ram_bytes=2 << 30, guest=fakes.unrestricted(),
        sleep=lambda _: None)  # fmt: skip
    assert agent.run() == 0
    assert printed.getvalue().count("it goes on from its checkpoint with a smaller plan") == 1
    assert planned == [largest.peak_bytes, second.peak_bytes], "the next lease begins with the plan that held"
    assert list(coordinator.lease_holder) == ["lease-0", "lease-1"] and coordinator.released == []
    assert coordinator.state == ["accepted"] * 2
    assert [manifest["tokens_seen"] for manifest in coordinator.manifests] == [4 * 4 * 1024] * 2


class Scene(FakeCoordinator):
    """Pauses a node when its first step is reported, lets it go on, and ends the lease after the next step."""

    def __init__(self) -> None:
        super().__init__()
        self.guest = fakes.unrestricted()
        self.jobs: list[RunningJob] = []
        self.priorities: set[int] = set()
        self.threads = ""
        self.paused_at = self.ordered_at = 0

    def run_job(self, *arguments: object) -> RunningJob:
        self.jobs.append(run_train_expert(*arguments))  # type: ignore[arg-type]
        return self.jobs[-1]

    def Heartbeat(self, request: Any, context: Any) -> Any:
        step, activity = request.progress.step, request.progress.activity
        if activity == "training" and step and not self.paused_at:
            self.priorities = {os.getpriority(os.PRIO_PROCESS, thread.id)
                               for thread in psutil.Process(self.jobs[0].pid).threads()}  # fmt: skip
            self.threads = psutil.Process(self.jobs[0].pid).environ()["OMP_NUM_THREADS"]
            self.paused_at = step
            self.guest.pause(None)
        elif activity == "paused":
            self.still_held = resident_bytes_of(self.jobs[0].pid)
            self.guest.resume()
        elif activity == "training" and len(self.jobs) > 1 and step > self.paused_at and not self.ordered_at:
            self.order, self.ordered_at = fakes.FINISH, step
            self.guest.finish()
        return super().Heartbeat(request, context)


@pytest.mark.skipif(sys.platform != "linux", reason="the priority of a thread")
def test_real_training_stands_back_pauses_and_obeys_within_a_step(
        tmp_path: Path, connect: Callable[..., FleetClient], machine: MachineProfile,
        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    tree = expert_work.CONFIG.model_dump()
    tree["train"].update(batch_size=6)  # A step that takes longer than the half second between two reports.
    tree["train"]["expert"].update(tokens=100 * 6 * 1024)
    config = parse_config(tree)
    monkeypatch.setattr(fakes, "CONFIG", config)
    scene, printed = Scene(), io.StringIO()
    files = expert_work.write_files(tmp_path / "files", config)
    scene.shared, scene.ffn, tokens = (
        scene._add(files[name].read_bytes()) for name in ("shared", "shared_ffn", "train_tokens"))  # fmt: skip
    scene.tokens = [tokens]
    console, identity = Console(printed), Identity.open(tmp_path / "node")
    # The lowest priority, whose time is what other tests leave, is tested with a process that needs none.
    worker = Worker(console, ram_bytes=2 << 30, threads=1, device="cpu", run_job=scene.run_job, hold=scene.guest.hold, nice=1)
    agent = Agent(client=connect(scene.address, identity), identity=identity, machine=machine, console=console,
                  worker=worker, data_dir=tmp_path / "node", name="tester", ram_bytes=2 << 30, guest=scene.guest)  # fmt: skip
    try:
        assert agent.run() == 0
    finally:
        scene.stop()
    assert scene.priorities == {1} and scene.threads == "1"
    assert scene.still_held == 0, "a pause frees the memory"
    assert len(scene.lease_holder) == 1 and scene.released == ["the test says so"]
    (checkpoint,) = (tmp_path / "node").rglob("checkpoint.safetensors")
    with safe_open(checkpoint, framework="np") as file:
        step = json.loads(file.metadata()["facts"])["step"]
    # The report is of a step that is over, the order comes during the next one, and a fast machine may be one further.
    assert scene.ordered_at <= step <= scene.ordered_at + 2
    written = 2 * checkpoint.stat().st_size
    assert written <= training_bytes(config) <= 1.1 * written + (2 << 20)
