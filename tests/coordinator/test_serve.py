from __future__ import annotations

from collections.abc import Callable
import json
import os
from pathlib import Path
import re
import socket

import pytest

from coordinator import phases
from coordinator.addresses import parse_listen
from coordinator.serve import Coordinator
from forge.errors import ConfigError, DataError, ForgeError, NetworkError, RunMismatchError, StorageError
from forge.vocabulary import STAGES

from .conftest import World
from .fakes import CONFIG, FakeJobs, FakeNode, make_shard, sha256_of, until


def events(world: World) -> list[dict[str, object]]:
    return [json.loads(line) for line in (world.root / "events.jsonl").read_text().splitlines()]


def test_a_run_goes_from_nothing_to_done(make_world: Callable[[], World]) -> None:
    world = make_world()
    coordinator = world.start(exit_when_done=True)
    assert json.loads((world.root / "coordinator.json").read_text()) == {
        "address": coordinator.address, "addresses": [coordinator.address], "pid": os.getpid(),
        "encrypted": True}  # fmt: skip
    assert any(f"forge-coordinator token create --run-dir {world.root}" in line for line in world.said)
    assert not any("WARNING" in line for line in world.said)
    node = world.node("laptop")
    for partition in range(3):
        shard = make_shard(world.run, partition)
        assignment = node.lease(partition)
        node.hand_in(assignment, shard, world.run_id)
        node.verdict(assignment, shard, world.run_id)
    assert "3 experts are accepted" in node.ask().done.reason
    coordinator.wait()
    assert node.join().run.phase == "done"
    assert world.jobs.calls == [*STAGES, "evaluate", *["validate", "evaluate"] * 3, "evaluate"]
    # The world invites its nodes while the coordinator starts: that event may come anywhere.
    names = [event["event"] for event in events(world) if event["event"] != "invited"]
    assert names[:3] == ["started", "stage-started", "stage-finished"]
    assert names[-1] == "done"
    assert names.count("accepted") == 3
    assert all(event["ts"] for event in events(world))
    world.stop()
    assert not (world.root / "coordinator.json").exists()


def test_a_finished_coordinator_stays_until_waiting_nodes_have_heard(make_world: Callable[[], World]) -> None:
    world = make_world()
    coordinator = world.start(exit_when_done=True)
    node, waiting = world.node("laptop"), world.node("desktop")
    for partition in range(3):
        assignment, shard = node.lease(partition), make_shard(world.run, partition)
        node.hand_in(assignment, shard, world.run_id)
        node.verdict(assignment, shard, world.run_id)
    node.ask()
    until(lambda: node.join().run.phase == "done")
    waiting.join()
    assert waiting.ask().done.reason
    coordinator.wait()


def test_the_same_command_goes_on_in_every_phase(make_world: Callable[[], World]) -> None:
    world = make_world()
    world.start()
    node = world.node("laptop")
    credential, kept, lost = node.credential, node.lease(0), make_shard(world.run, 0)
    node.open(kept.lease_id, lost)
    part = lost[:1000]
    node.send(kept.lease_id, part, sha256=sha256_of(lost))
    world.stop()

    coordinator = world.start()
    again = FakeNode(coordinator.address, "laptop", world.root)
    world.nodes.append(again)
    again.credential = credential
    until(lambda: again.ask().WhichOneof("answer") == "assignment")
    assert again.lease().lease_id == kept.lease_id
    assert again.open(kept.lease_id, lost).offset == 1000
    assert again.hand_in(kept, lost, world.run_id)
    assert again.verdict(kept, lost, world.run_id).verdict
    assert world.jobs.calls.count("shared") == 1
    assert world.jobs.calls.count("evaluate") <= 2


def test_an_interrupted_stage_is_run_again_and_finished_ones_are_not(make_world: Callable[[], World]) -> None:
    world = make_world()
    world.jobs.failures["partition"] = [DataError("The corpus is too small for 3 experts.")]
    coordinator = world.start()
    with pytest.raises(DataError, match="too small"):
        coordinator.wait()
    world.stop()
    world.start()
    world.node("laptop")
    assert world.jobs.calls[:6] == ["prepare", "shared", "partition", "partition", "router", "publish"]


def test_a_stage_that_leaves_no_marker_is_an_error(make_world: Callable[[], World]) -> None:
    world = make_world()
    coordinator = world.start
    world.jobs = type("Silent", (FakeJobs,), {"__call__": lambda *_: {}})()
    with pytest.raises(ForgeError, match="without a result"):
        coordinator().wait()


def test_a_taken_port_is_one_sentence_and_leaves_no_directory(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(NetworkError, match="another program uses the port"):
            Coordinator(CONFIG, tmp_path / "run", address, run_job=FakeJobs(), echo=lambda _: None).start()
    assert not (tmp_path / "run").exists()


def test_two_coordinators_do_not_share_a_run_directory(world: World) -> None:
    second = Coordinator(CONFIG, world.root, "127.0.0.1:0", run_job=FakeJobs(), echo=lambda _: None)
    with pytest.raises(StorageError, match="Another forge"):
        second.start()
    assert world.node("laptop").lease()


def test_another_config_does_not_take_a_run_over(world: World) -> None:
    world.node("laptop")
    world.stop()
    other = CONFIG.model_copy(update={"seed": 9})
    with pytest.raises(RunMismatchError):
        Coordinator(other, world.root, "127.0.0.1:0", run_job=world.jobs, echo=lambda _: None).start()


def test_a_directory_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError):
        Coordinator(CONFIG, tmp_path / "file" / "run", "127.0.0.1:0", run_job=FakeJobs(), echo=lambda _: None).start()


@pytest.mark.parametrize("listen", ["7433", ":7433", "host:", "host:x", "host:99999"])
def test_a_wrong_address_is_a_config_error(listen: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        parse_listen(listen)


@pytest.mark.parametrize("host", ["0..0.0", "a" * 70])
def test_a_dashboard_at_what_is_no_address_is_one_sentence(make_world: Callable[[], World], host: str) -> None:
    world = make_world()
    with pytest.raises(NetworkError, match=f"The dashboard cannot listen on {re.escape(host)}:7473"):
        world.start(dashboard=f"{host}:7473")
    assert not world.root.exists()


def test_a_repo_must_look_like_one(make_world: Callable[[], World]) -> None:
    with pytest.raises(ConfigError, match="USER/REPO"):
        make_world().start(push="nonsense")


def test_plaintext_is_asked_for_and_for_other_machines_twice(make_world: Callable[[], World]) -> None:
    world = make_world()
    with pytest.raises(ConfigError, match="say it twice"):
        world.start(listen="0.0.0.0:0", insecure=1)
    assert not world.root.exists()
    world.start(listen="0.0.0.0:0", insecure=2)
    assert any("WARNING: nothing is encrypted" in line for line in world.said)
    other = make_world()
    other.start(listen="0.0.0.0:0")
    assert not any("WARNING" in line for line in other.said)
    addresses = json.loads((other.root / "coordinator.json").read_text())["addresses"]
    assert addresses and not any(address.startswith("0.0.0.0") for address in addresses)


def test_a_stage_whose_process_died_is_started_again_a_few_times(make_world: Callable[[], World],
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(phases, "RETRY_SECONDS", 0.01)
    world = make_world()
    world.jobs.failures["shared"] = [ForgeError("killed by SIGKILL")]
    world.start()
    world.node("laptop")
    assert world.jobs.calls.count("shared") == 2
    other = make_world()
    other.jobs.failures["shared"] = [ForgeError("killed by SIGKILL")] * 3
    with pytest.raises(ForgeError, match="SIGKILL"):
        other.start().wait()
