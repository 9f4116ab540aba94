from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
import io
from pathlib import Path
from typing import Any

import grpc
import pytest

from forge.errors import AccessError, MemoryBudgetError, ProtocolError, ShardError, StorageError, TrainingError
from forge.train.memory import candidates, format_size, plan
from node.agent import Agent
from node.cache import claimed
from node.client import FleetClient
from node.console import Console
from node.disk import training_bytes
from node.identity import Identity
from node.machine import MachineProfile
from node.worker import Worker

from .fakes import ABANDON, ACCEPTED, CONFIG, CONTINUE, FINISH, REJECTED, CountingJob, FakeCoordinator, unrestricted


class Node:
    """A node with a data directory; every `run` is what one start of the command does."""

    def __init__(self, data_dir: Path, connect: Callable[..., FleetClient], machine: MachineProfile) -> None:
        self.data_dir, self.connect, self.machine = data_dir, connect, machine
        self.jobs: list[CountingJob] = []
        self.disk_bytes: int | None = None
        self.on_sleep: Callable[[], None] = lambda: None

    def run(self, address: str, *, once: bool = False, ram_bytes: int = 2 << 30, job: type[CountingJob] = CountingJob,
            hold_at: int | None = None) -> tuple[int, str]:  # fmt: skip
        printed = io.StringIO()
        console = Console(printed)

        def run_job(arguments: dict[str, Any], threads: int, log: Path, ram_bytes: int) -> CountingJob:
            self.jobs.append(job(arguments, hold_at=hold_at))
            return self.jobs[-1]

        identity = Identity.open(self.data_dir)
        agent = Agent(
            client=self.connect(address, identity), identity=identity, machine=self.machine, console=console,
            worker=Worker(console, ram_bytes=ram_bytes, threads=1, device="cpu", run_job=run_job),
            data_dir=self.data_dir, name="tester", ram_bytes=ram_bytes, once=once, disk_bytes=self.disk_bytes,
            guest=unrestricted(), sleep=lambda _: self.on_sleep())  # fmt: skip
        code = agent.run()
        return code, printed.getvalue()

    def work_files(self) -> set[str]:
        return {path.name for path in (self.data_dir / "runs").rglob("*") if path.is_file()}


@pytest.fixture
def node(tmp_path: Path, connect: Callable[..., FleetClient], machine: MachineProfile) -> Node:
    return Node(tmp_path / "node", connect, machine)


def test_a_node_trains_until_nothing_is_left(node: Node, coordinator: FakeCoordinator) -> None:
    coordinator.pending_answers = 2
    code, printed = node.run(coordinator.address)
    assert code == 0 and coordinator.state == ["accepted"]
    (manifest,) = coordinator.manifests
    receipt = coordinator.receipts[manifest["sha256"]]
    assert receipt.verdict == ACCEPTED
    assert manifest == {
        "run_id": "run-1", "lease_id": "lease-0", "partition": 0, "sha256": receipt.sha256,
        "size": len(coordinator.uploads[receipt.sha256]), "tokens_seen": 500, "final_loss": 1.0,
        "node_name": "tester", "config_fingerprint": CONFIG.fingerprint, "shared_sha256": coordinator.shared,
        "format_version": "1", "checkpoints": {},
    }  # fmt: skip
    assert "Leased partition 0: 500 tokens." in printed and "\npartition 0: starting to train\n" in printed
    assert "accepted and credited to tester" in printed
    assert "trainer of partition 0: peak memory: measured" in printed and "agent: peak memory: measured" in printed
    assert "Nothing is left to do: every partition is accepted." in printed


def test_files_go_with_the_verdict_and_shared_components_stay(node: Node, coordinator: FakeCoordinator) -> None:
    node.run(coordinator.address)
    assert node.work_files() == {"shared.json"}
    assert {path.name for path in (node.data_dir / "blobs").iterdir()} == {coordinator.shared, coordinator.ffn}


def test_shared_components_are_downloaded_once(tmp_path: Path, node: Node) -> None:
    coordinator = FakeCoordinator(partitions=3)
    try:
        assert node.run(coordinator.address)[0] == 0
    finally:
        coordinator.stop()
    assert coordinator.state == ["accepted"] * 3
    assert coordinator.calls.count("FetchBlob") == 2 + 3


def test_a_rejection_is_shown_and_the_node_goes_on(node: Node, coordinator: FakeCoordinator) -> None:
    coordinator.verdicts = [REJECTED, ACCEPTED]
    code, printed = node.run(coordinator.address)
    assert code == 0
    assert "the shard is rejected: it is worse than the shared components." in printed
    assert "accepted: 1, rejected: 1" in printed
    assert [job.first for job in node.jobs] == [0, 0], "a rejected expert is trained anew"


def test_rejections_in_a_row_end_the_node(node: Node, coordinator: FakeCoordinator) -> None:
    coordinator.verdicts = [REJECTED]
    with pytest.raises(ShardError, match="3 shards of this node in a row"):
        node.run(coordinator.address)


def test_once_leaves_after_one_verdict(node: Node) -> None:
    coordinator = FakeCoordinator(partitions=2)
    try:
        coordinator.pending_answers = 3
        code, printed = node.run(coordinator.address, once=True)
        assert code == 0 and coordinator.state == ["accepted", "open"] and "--once" in printed
        coordinator.verdicts = [REJECTED]
        with pytest.raises(ShardError, match="worse than the shared components"):
            node.run(coordinator.address, once=True)
    finally:
        coordinator.stop()


def test_a_shard_without_a_verdict_is_settled_by_the_next_start(node: Node, coordinator: FakeCoordinator) -> None:
    class Killed(BaseException):
        """Stands for kill -9: nothing of the agent's own clean-up may matter."""

    def killed() -> None:
        raise Killed

    coordinator.pending_answers, node.on_sleep = 10**6, killed
    with pytest.raises(Killed):
        node.run(coordinator.address, once=True)
    assert "submission.json" in node.work_files()
    coordinator.pending_answers = 0
    code, printed = node.run(coordinator.address, once=True)
    assert code == 0 and "accepted and credited" in printed
    assert len(node.jobs) == 1 and len(coordinator.manifests) == 1 and len(coordinator.upload_offsets) == 1


def test_an_abandoned_lease_keeps_its_checkpoint(node: Node, coordinator: FakeCoordinator) -> None:
    class Abandoned(CountingJob):
        def events(self) -> Any:
            for event in super().events():
                if len(node.jobs) == 1 and event["step"] == 2:  # Obeyed at once: before that, there is no second step.
                    coordinator.order = ABANDON
                yield event

        def kill(self) -> None:
            coordinator.state[0], coordinator.order = "open", CONTINUE
            super().kill()

    code, printed = node.run(coordinator.address, job=Abandoned, hold_at=2)
    assert code == 0
    assert "is lost (the test says so); its checkpoint is kept" in printed
    assert "Going on with partition 0 from its checkpoint." in printed
    assert node.jobs[0].killed and node.jobs[1].first == 2
    assert coordinator.preferred[1] == [0]


def test_leases_that_are_lost_do_not_fill_the_disk(node: Node) -> None:
    coordinator = FakeCoordinator(partitions=4)
    partitions: list[set[str]] = []

    class Late(CountingJob):
        """Leaves 4 MiB in its directory; another node's shard is accepted before all but the last."""

        def events(self) -> Any:
            partitions.append({path.name for path in (node.data_dir / "runs" / "run-1").glob("partition-*")})
            (self.work_dir / "metrics.jsonl").write_bytes(bytes(4 << 20))
            self.hold_at = 2 if len(node.jobs) < 4 else None
            for event in super().events():
                if len(node.jobs) < 4 and event["step"] == 2:
                    coordinator.order = ABANDON
                yield event

        def kill(self) -> None:
            coordinator.state[len(node.jobs) - 1], coordinator.order = "accepted", CONTINUE
            super().kill()

    needed = training_bytes(CONFIG) + 2 * (3 << 20) + 1000
    node.disk_bytes = needed + (9 << 20)
    try:
        code, printed = node.run(coordinator.address, job=Late)
    finally:
        coordinator.stop()
    assert code == 0 and coordinator.state == ["accepted"] * 4 and printed.count("its checkpoint is kept") == 3
    assert partitions[2:] == [{"partition-000", "partition-001", "partition-002"},
                              {"partition-001", "partition-002", "partition-003"}]  # fmt: skip
    assert printed.count("is deleted, since --disk has no room") == 1
    assert coordinator.tokens[0] not in {path.name for path in (node.data_dir / "blobs").iterdir()}


def test_a_checkpoint_that_vanishes_while_it_comes_is_done_without(node: Node, coordinator: FakeCoordinator) -> None:
    left = coordinator.leave(3 << 20)
    coordinator.on_chunk = lambda sha256: sha256 == left and coordinator.blobs.pop(left, None)
    coordinator.cut_fetch = [1 << 30] * 3 + [1 << 20]
    begun: list[set[str]] = []

    class Begun(CountingJob):
        def events(self) -> Any:
            begun.append({path.name for path in (node.data_dir / "blobs").iterdir()})
            yield from super().events()

    code, printed = node.run(coordinator.address, job=Begun)
    assert code == 0 and coordinator.state == ["accepted"] and node.jobs[0].first == 0
    assert "What another node left of partition 0 is of no use: This run publishes no such file." in printed
    assert begun == [{coordinator.shared, coordinator.ffn, coordinator.tokens[0]}]
    assert coordinator.fetch_offsets == [0] * 4, "it had come in part"


def test_who_may_not_have_a_checkpoint_is_told(node: Node, coordinator: FakeCoordinator) -> None:
    left = coordinator.leave(1000)

    def revoke(sha256: str) -> None:
        if sha256 == coordinator.tokens[0]:
            coordinator.refusals["FetchBlob"] = (grpc.StatusCode.PERMISSION_DENIED, "access", "You are not invited any more.")

    coordinator.on_chunk = revoke
    with pytest.raises(AccessError, match="not invited any more"):
        node.run(coordinator.address)
    assert left in coordinator.blobs and node.jobs == []


def test_an_order_ends_the_download_of_a_checkpoint(node: Node, coordinator: FakeCoordinator) -> None:
    left = coordinator.leave(3 << 20)

    def accept_another(sha256: str) -> None:
        if sha256 == left and coordinator.order != ABANDON:
            coordinator.order, coordinator.state = ABANDON, ["accepted"]
            with coordinator.changed:  # The second heartbeat from now on comes when the first was answered.
                heard = len(coordinator.activities) + 2
                assert coordinator.changed.wait_for(lambda: len(coordinator.activities) >= heard, 30)

    coordinator.on_chunk = accept_another
    code, printed = node.run(coordinator.address)
    assert code == 0 and "The lease of partition 0 is lost (the test says so)" in printed
    assert node.jobs == [] and left not in {path.name for path in (node.data_dir / "blobs").iterdir()}


def test_finish_gives_the_lease_back_at_a_checkpoint(node: Node, coordinator: FakeCoordinator) -> None:
    class Finished(CountingJob):
        def events(self) -> Any:
            for event in super().events():
                if len(node.jobs) == 1 and event["step"] == 2:  # Obeyed at once: before that, there is no second step.
                    coordinator.order = FINISH
                yield event

        def finish(self) -> None:
            coordinator.order = CONTINUE
            super().finish()

    code, printed = node.run(coordinator.address, job=Finished, hold_at=2)
    assert code == 0 and "asks to stop at the next checkpoint" in printed
    assert coordinator.released == ["the test says so"]
    assert node.jobs[1].first == 2


def test_what_cannot_fit_is_refused_before_a_lease(node: Node, coordinator: FakeCoordinator) -> None:
    with pytest.raises(MemoryBudgetError, match="--ram"):
        node.run(coordinator.address, ram_bytes=64 << 20)
    assert coordinator.calls == ["Join"]


@pytest.mark.parametrize(("free", "budget", "words"), [
    (16 << 30, 8 << 30, None),
    (3 << 30, 8 << 30, "3.0G of memory is free now and --ram allows 8.0G: training is planned within 2.0G"),
    ((1 << 30) + 1, 0, "1.0G of memory is free now and --ram allows 8.0G: training takes the smallest plan"),
])  # fmt: skip
def test_memory_that_is_in_use_is_said_before_it_starts(
        node: Node, coordinator: FakeCoordinator, free: int, budget: int, words: str | None) -> None:  # fmt: skip
    node.machine = replace(node.machine, free_bytes=free)  # A machine of 8 GB.
    code, printed = node.run(coordinator.address, ram_bytes=8 << 30)
    assert code == 0 and "Work in child processes is held to 8.0G by" in printed
    assert printed.count("Warning: ") == (words is not None) and (words or "") in printed
    smallest = min(candidate.peak_bytes for candidate in candidates(CONFIG, "expert"))
    predicted = plan(CONFIG, "expert", max(budget, smallest)).peak_bytes
    assert f"needs {format_size(predicted)} of the 8.0G allowed" in printed
    assert node.jobs[0].ram_bytes == predicted


def test_a_failed_training_gives_the_lease_back(node: Node, coordinator: FakeCoordinator) -> None:
    class Failing(CountingJob):
        def result(self) -> dict[str, Any]:
            raise TrainingError("The loss is not finite at step 3.")

    with pytest.raises(TrainingError):
        node.run(coordinator.address, job=Failing)
    assert coordinator.released == ["failed: training"]


def test_an_unknown_lease_keeps_the_checkpoint(node: Node, coordinator: FakeCoordinator) -> None:
    coordinator.refusals["OpenUpload"] = (grpc.StatusCode.NOT_FOUND, "protocol", "The lease is unknown.")

    class Forgiving(CountingJob):
        def events(self) -> Any:
            if len(node.jobs) > 1:
                coordinator.refusals.clear()
            yield from super().events()

    code, printed = node.run(coordinator.address, job=Forgiving)
    assert code == 0 and "could not be handed in (The lease is unknown)" in printed
    assert node.jobs[1].first == 5


def test_a_shard_damaged_on_disk_is_made_again(node: Node, coordinator: FakeCoordinator) -> None:
    coordinator.refusals["OpenUpload"] = (grpc.StatusCode.UNKNOWN, "storage", "The disk of the coordinator is full.")
    with pytest.raises(StorageError, match="coordinator is full"):
        node.run(coordinator.address)
    assert "submission.json" in node.work_files(), "finished work is never lost"
    (shard,) = (node.data_dir / "runs").rglob("shard.safetensors")
    shard.write_bytes(b"damaged")
    coordinator.refusals["OpenUpload"] = (grpc.StatusCode.INVALID_ARGUMENT, "shard", "The shard is not what it says.")
    node.on_sleep = lambda: None
    with pytest.raises(ShardError):
        node.run(coordinator.address)
    assert [job.first for job in node.jobs][:2] == [0, 5]


def test_one_agent_a_data_directory(node: Node, coordinator: FakeCoordinator) -> None:
    with claimed(node.data_dir), pytest.raises(StorageError, match="--data-dir"):
        node.run(coordinator.address)
    assert coordinator.calls == []


def test_a_config_that_is_understood_differently_is_refused(
        node: Node, coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from . import fakes

    monkeypatch.setattr(fakes, "CONFIG", _Renamed(fakes.CONFIG))
    with pytest.raises(ProtocolError, match="same version"):
        node.run(coordinator.address)


class _Renamed:
    """A config whose fingerprint another version would compute differently."""

    def __init__(self, config: Any) -> None:
        self.fingerprint = "f" * 64
        self.model_dump = config.model_dump
