from __future__ import annotations

from collections.abc import Callable
import hashlib
from pathlib import Path
import socket
import threading
import time

import grpc
import pytest

from forge.errors import MemoryBudgetError, NetworkError, ProtocolError, ShardError
from node.client import FleetClient
from node.identity import Identity
from node.machine import MachineProfile
from node.messages import Assignment, Done, Order, Progress, Verdict, Wait

from .fakes import ABANDON, REJECTED, FakeCoordinator

Connect = Callable[..., FleetClient]
MIB = 1 << 20


@pytest.fixture
def client(coordinator: FakeCoordinator, connect: Connect, machine: MachineProfile) -> FleetClient:
    client = connect(coordinator.address)
    client.join(machine)
    return client


def _fetch(client: FleetClient, coordinator: FakeCoordinator, target: Path) -> None:
    data = coordinator.blobs[coordinator.shared]
    client.fetch_blob(coordinator.shared, len(data), target)
    assert target.read_bytes() == data
    assert not target.with_name(target.name + ".part").exists()


def test_joining_twice_is_one_node(coordinator: FakeCoordinator, connect: Connect, machine: MachineProfile) -> None:
    first, second = (connect(coordinator.address).join(machine) for _ in range(2))
    assert first == second
    assert first.run.run_id == "run-1"


def test_a_lease_comes_back_to_its_node_and_ends_in_done(client: FleetClient, coordinator: FakeCoordinator) -> None:
    first, second = client.lease([]), client.lease([3])
    assert isinstance(first, Assignment) and first == second
    assert coordinator.preferred == [[], [3]]
    assert first.heartbeat_seconds == pytest.approx(0.02)
    coordinator.state = ["uploaded"]
    assert isinstance(client.lease([]), Wait)
    coordinator.state = ["accepted"]
    assert client.lease([]) == Done(reason="every partition is accepted")


def test_a_download_goes_on_where_it_was_cut(client: FleetClient, coordinator: FakeCoordinator, tmp_path: Path,
                                             said: list[str]) -> None:  # fmt: skip
    coordinator.cut_fetch = [MIB, MIB // 2]
    _fetch(client, coordinator, tmp_path / "blob")
    assert coordinator.fetch_offsets == [0, MIB, MIB * 3 // 2]
    assert "going on" in said[0]


def test_a_download_that_is_cut_before_its_first_byte_waits_and_says_so(
        client: FleetClient, coordinator: FakeCoordinator, tmp_path: Path, said: list[str]) -> None:  # fmt: skip
    coordinator.cut_fetch = [0, 0]
    _fetch(client, coordinator, tmp_path / "blob")
    assert len(said) == 2 and "trying again in" in said[0]


def test_a_line_that_breaks_within_every_large_message_gets_small_ones(
        client: FleetClient, coordinator: FakeCoordinator, tmp_path: Path) -> None:  # fmt: skip
    lease = client.lease([])
    assert isinstance(lease, Assignment)
    coordinator.passes = 40_000
    _fetch(client, coordinator, tmp_path / "blob")
    shard = tmp_path / "shard"
    shard.write_bytes(bytes(3 * MIB))
    sha256 = hashlib.sha256(shard.read_bytes()).hexdigest()
    assert client.upload(lease.lease_id, sha256, shard) is None
    assert coordinator.uploads[sha256] == shard.read_bytes()
    # What breaks is halved, what passes is doubled again: 256, 128, 64, then 32 KiB.
    assert coordinator.fetch_offsets == [0] * 4 and set(coordinator.upload_offsets) == {0}
    assert len(coordinator.upload_offsets) == 2


def test_a_coordinator_that_asks_to_come_back_does_not_make_messages_smaller(
        client: FleetClient, coordinator: FakeCoordinator, tmp_path: Path) -> None:  # fmt: skip
    said_twice: list[str] = []

    def wait(text: str) -> None:
        said_twice.append(text)
        if len(said_twice) == 2:
            coordinator.refusals.clear()

    client._on_wait = wait
    coordinator.refusals["FetchBlob"] = (grpc.StatusCode.ABORTED, "error", "busy")
    _fetch(client, coordinator, tmp_path / "blob")
    coordinator.cut_fetch = [0]
    _fetch(client, coordinator, tmp_path / "again")
    assert len(said_twice) == 3 and coordinator.fetch_chunks == [256 << 10, 256 << 10, 128 << 10]


def test_a_download_goes_on_from_the_part_of_a_killed_process(client: FleetClient, coordinator: FakeCoordinator,
                                                              tmp_path: Path) -> None:  # fmt: skip
    (tmp_path / "blob.part").write_bytes(coordinator.blobs[coordinator.shared][:12345])
    _fetch(client, coordinator, tmp_path / "blob")
    assert coordinator.fetch_offsets == [12345]


def test_a_damaged_part_is_downloaded_again(client: FleetClient, coordinator: FakeCoordinator, tmp_path: Path) -> None:
    (tmp_path / "blob.part").write_bytes(b"not what it should be")
    _fetch(client, coordinator, tmp_path / "blob")
    assert coordinator.fetch_offsets == [21, 0]


def test_content_that_never_matches_its_hash_is_refused(client: FleetClient, coordinator: FakeCoordinator,
                                                        tmp_path: Path) -> None:  # fmt: skip
    sha256 = "0" * 64
    coordinator.blobs[sha256] = b"foreign"
    with pytest.raises(NetworkError, match="damaged twice"):
        client.fetch_blob(sha256, 7, tmp_path / "blob")
    assert list(tmp_path.iterdir()) == []


def test_a_silent_stream_is_cut_and_resumed_on_a_new_connection(
        coordinator: FakeCoordinator, connect: Connect, machine: MachineProfile, tmp_path: Path) -> None:  # fmt: skip
    client = connect(coordinator.address, stream=0.3)
    client.join(machine)
    coordinator.stall_fetch = [MIB, 0]
    _fetch(client, coordinator, tmp_path / "blob")
    assert coordinator.fetch_offsets == [0, MIB, MIB]


def test_an_upload_goes_on_where_it_was_cut(client: FleetClient, coordinator: FakeCoordinator, tmp_path: Path) -> None:
    shard = tmp_path / "shard"
    shard.write_bytes(bytes(range(256)) * (5 * MIB // 256))
    sha256 = hashlib.sha256(shard.read_bytes()).hexdigest()
    coordinator.cut_upload = [2 * MIB, MIB]
    assert client.upload("lease-0", sha256, shard) is None
    assert coordinator.uploads[sha256] == shard.read_bytes()
    assert coordinator.upload_offsets == [0, 2 * MIB, 3 * MIB]
    assert client.upload("lease-0", sha256, shard) is None
    assert len(coordinator.upload_offsets) == 3, "what is held already is not sent again"


def test_a_lost_commit_reply_costs_a_repeat_and_nothing_else(
        coordinator: FakeCoordinator, connect: Connect, machine: MachineProfile, tmp_path: Path) -> None:  # fmt: skip
    identity = Identity.open(tmp_path)
    client = connect(coordinator.address, identity)
    client.join(machine)
    assignment = client.lease([])
    assert isinstance(assignment, Assignment)
    shard = tmp_path / "shard"
    shard.write_bytes(b"x" * 1000)
    sha256 = hashlib.sha256(shard.read_bytes()).hexdigest()
    client.upload(assignment.lease_id, sha256, shard)
    coordinator.lost_replies, coordinator.verdicts = {"Commit": 2}, [REJECTED]
    receipt = client.commit(assignment.lease_id, sha256, b"{}", identity.sign(b"{}"))
    assert receipt.verdict is Verdict.REJECTED and receipt.reasons == ("it is worse than the shared components",)
    assert coordinator.calls.count("Commit") == 3 and len(coordinator.manifests) == 1
    assert client.upload(assignment.lease_id, sha256, shard) == receipt


def test_heartbeats_carry_progress_and_bring_orders(client: FleetClient, coordinator: FakeCoordinator) -> None:
    assert client.heartbeat("lease-0", Progress(activity="training", step=7, steps=9))[0] is Order.CONTINUE
    assert coordinator.steps == [7]
    coordinator.order = ABANDON
    assert client.heartbeat("lease-0", Progress(activity="training")) == (Order.ABANDON, "the test says so")


def test_a_coordinator_that_forgot_the_node_is_joined_again(client: FleetClient, coordinator: FakeCoordinator,
                                                            tmp_path: Path) -> None:  # fmt: skip
    coordinator.credentials.clear()
    assert isinstance(client.lease([]), Assignment)
    coordinator.credentials.clear()
    _fetch(client, coordinator, tmp_path / "blob")
    assert coordinator.calls.count("Join") == 3


def test_a_coordinator_with_another_run_is_refused(client: FleetClient, coordinator: FakeCoordinator) -> None:
    coordinator.credentials.clear()
    coordinator.run_id = "run-2"
    with pytest.raises(ProtocolError, match="another run"):
        client.lease([])


def test_a_restarting_coordinator_is_waited_for(client: FleetClient, coordinator: FakeCoordinator,
                                                said: list[str]) -> None:  # fmt: skip
    coordinator.stop()
    answers: list[object] = []
    asking = threading.Thread(target=lambda: answers.append(client.lease([])))
    asking.start()
    while not said:
        asking.join(0.01)
    coordinator.start()
    asking.join(20)
    assert isinstance(answers[0], Assignment)
    assert "for work" in said[0] and "trying again" in said[0]


@pytest.mark.parametrize(("code", "expected"), [
    ("memory", MemoryBudgetError), ("shard", ShardError), ("protocol", ProtocolError)])  # fmt: skip
def test_the_coordinators_errors_keep_class_and_sentence(
        client: FleetClient, coordinator: FakeCoordinator, code: str, expected: type[Exception]) -> None:  # fmt: skip
    coordinator.refusals["Lease"] = (grpc.StatusCode.FAILED_PRECONDITION, code, "No, and here is why.")
    with pytest.raises(expected, match=r"^No, and here is why\.$"):
        client.lease([])
    assert coordinator.calls.count("Lease") == 1


def test_aborted_calls_are_repeated(client: FleetClient, coordinator: FakeCoordinator, said: list[str]) -> None:
    coordinator.refusals["Lease"] = (grpc.StatusCode.ABORTED, "error", "busy")
    said_once = threading.Event()
    client._on_wait = lambda text: (coordinator.refusals.clear(), said.append(text), said_once.set())[0]  # type: ignore[func-returns-value]
    assert isinstance(client.lease([]), Assignment)
    assert "busy" in said[0]


@pytest.mark.parametrize(("asked", "obeyed"), [(7.5, 7.5), (1e9, 60.0), (float("nan"), 0.0)])
def test_a_call_that_came_too_soon_is_made_again_when_the_coordinator_says(
        client: FleetClient, coordinator: FakeCoordinator, said: list[str], asked: float, obeyed: float) -> None:  # fmt: skip
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        coordinator.too_soon.clear()

    client._sleep, coordinator.too_soon = sleep, {"Lease": asked}
    if not obeyed:  # Nothing that can be obeyed: then the status means what it means elsewhere, and it is no use to wait.
        with pytest.raises(ProtocolError, match="too many calls"):
            client.lease([])
        return
    assert isinstance(client.lease([]), Assignment)
    assert obeyed <= slept[0] < obeyed + 1 and "too many calls" in said[0]


def test_a_coordinator_that_cannot_take_a_node_is_not_one_that_is_down(
        coordinator: FakeCoordinator, connect: Connect, machine: MachineProfile) -> None:  # fmt: skip
    coordinator.refusals["Join"] = (grpc.StatusCode.ABORTED, "storage", "its disk is full")
    with pytest.raises(NetworkError, match=r"cannot take this node .*: its disk is full; run the same command again"):
        connect(coordinator.address).join(machine)


def test_another_version_is_refused(coordinator: FakeCoordinator, connect: Connect, machine: MachineProfile) -> None:
    coordinator.protocol_version = 99
    with pytest.raises(ProtocolError, match="version 99 of the protocol and this node version"):
        connect(coordinator.address).join(machine)


def test_nobody_there_fails_soon(connect: Connect, machine: MachineProfile, said: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(NetworkError, match="forge-coordinator serve"):
            connect(address).join(machine)
    assert "to join: it cannot be reached" in said[0]


def test_blobs_are_held_to_their_rates_and_small_calls_are_not(
        coordinator: FakeCoordinator, connect: Connect, machine: MachineProfile, tmp_path: Path) -> None:  # fmt: skip
    """Half of the file a second: one second's worth may be saved up, the other has to be waited for."""
    size = len(coordinator.blobs[coordinator.shared])
    # With less patience than the transfers take: a slow line is not a dead one.
    client = connect(coordinator.address, stream=1.5, rate=size // 2)
    client.join(machine)
    assignment = client.lease([])
    assert isinstance(assignment, Assignment)
    beats: list[float] = []
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            before = time.monotonic()
            client.heartbeat(assignment.lease_id, Progress(activity="downloading"))
            beats.append(time.monotonic() - before)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        before = time.monotonic()
        _fetch(client, coordinator, tmp_path / "blob")
        between = time.monotonic()
        client.upload(assignment.lease_id, coordinator.shared, tmp_path / "blob")
        assert between - before > 0.9 and time.monotonic() - between > 0.9
    finally:
        over.set()
        thread.join()
    assert coordinator.fetch_offsets == [0] and coordinator.upload_offsets == [0]
    assert bytes(coordinator.uploads[coordinator.shared]) == coordinator.blobs[coordinator.shared]
    assert len(beats) > 5
