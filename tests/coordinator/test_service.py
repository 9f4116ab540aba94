"""The services over a real gRPC connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
import json
from pathlib import Path
import threading
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from modularforge.v1 import fleet_pb2 as pb
import numpy as np
import pytest
from safetensors.numpy import save

from coordinator.blobs import MAX_UPLOADS
from forge.errors import StorageError, TrainingError
from forge.model import names
from forge.vocabulary import CHUNK_BYTES, PROTOCOL_VERSION

from .conftest import World
from .fakes import CONFIG, LEASE_SECONDS, FakeNode, make_shard, sha256_of, until

CONTINUE, ABANDON = pb.HeartbeatResponse.ORDER_CONTINUE, pb.HeartbeatResponse.ORDER_ABANDON
PENDING, ACCEPTED = pb.Receipt.VERDICT_PENDING, pb.Receipt.VERDICT_ACCEPTED
REJECTED = pb.Receipt.VERDICT_REJECTED


def refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str | None, str]:
    """Status, error code and sentence of a refused call."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), dict(error.trailing_metadata() or ()).get("forge-error-code"), error.details()


def test_a_node_joins_and_its_key_is_always_the_same_node(world: World) -> None:
    node = world.node("laptop")
    first, second = node.join(), node.join()
    assert (first.node_id, first.credential) == (second.node_id, second.credential)
    assert first.run.config_fingerprint == CONFIG.fingerprint
    assert (first.run.run_id, first.run.phase, first.run.name) == (world.run_id, "experts", "tiny")
    assert sum("laptop joined" in line for line in world.said) == 1


@pytest.mark.parametrize(("changed", "status", "words"), [
    ({"protocol_version": PROTOCOL_VERSION + 1}, grpc.StatusCode.FAILED_PRECONDITION, "install the same version"),
    ({"public_key": b"short"}, grpc.StatusCode.INVALID_ARGUMENT, "32 bytes"),
    ({"name": ""}, grpc.StatusCode.INVALID_ARGUMENT, "printable"),
    ({"name": "x" * 65}, grpc.StatusCode.INVALID_ARGUMENT, "printable"),
    ({"name": "bell\a"}, grpc.StatusCode.INVALID_ARGUMENT, "printable"),
])  # fmt: skip
def test_a_wrong_introduction_is_refused_in_one_sentence(world: World, changed: dict[str, Any],
                                                         status: grpc.StatusCode, words: str) -> None:  # fmt: skip
    node = world.node("laptop")
    fields = {"protocol_version": PROTOCOL_VERSION, "public_key": node.public_key, "name": "x", **changed}
    code, error, sentence = refusal(lambda: node.stub.Join(pb.JoinRequest(**fields), metadata=node.joining))
    assert (code, error) == (status, "protocol")
    assert words in sentence


def test_every_other_call_needs_the_credential(world: World) -> None:
    node = world.node("laptop")
    shard = make_shard(world.run, 0)
    assignment = node.lease()
    node.credential = "0" * 16 + "." + "0" * 64
    calls: list[Callable[[], Any]] = [
        node.ask, lambda: node.heartbeat("x"), lambda: node.fetch("0" * 64), lambda: node.open("x", shard),
        lambda: node.send("x", shard), lambda: node.commit(assignment, shard, world.run_id),
        lambda: node.stub.Release(pb.ReleaseRequest(), metadata=node.metadata)]  # fmt: skip
    for call in calls:
        assert refusal(call)[:2] == (grpc.StatusCode.UNAUTHENTICATED, "protocol")


def test_a_blob_is_read_from_any_offset_but_only_if_it_is_published(world: World) -> None:
    node = world.node("laptop")
    blob = node.lease(1).expert.train_tokens
    whole = node.fetch(blob.sha256)
    assert (len(whole), sha256_of(whole)) == (blob.size, blob.sha256)
    assert node.fetch(blob.sha256, 2 * CHUNK_BYTES + 5) == whole[2 * CHUNK_BYTES + 5 :]
    assert node.fetch(blob.sha256, blob.size) == b""
    assert refusal(lambda: node.fetch(blob.sha256, blob.size + 1))[0] == grpc.StatusCode.INVALID_ARGUMENT
    secret = world.run.root / "hidden"
    secret.write_bytes(b"not published")
    hidden = world.run.blobs.adopt(secret)
    for sha256 in (hidden, "../run.json", ""):
        assert refusal(partial(node.fetch, sha256))[0] == grpc.StatusCode.NOT_FOUND


def test_nobody_reads_the_documents_that_shards_are_judged_by(world: World) -> None:
    node, published = world.node("laptop"), world.run.marker("publish")
    assert published is not None
    work = node.lease(1).expert
    for blob in (work.shared, work.shared_ffn, work.train_tokens):
        assert sha256_of(node.fetch(blob.sha256)) == blob.sha256
    held_out = [part[split] for part in published["partitions"] for split in ("validation", "test")]
    for blob in (*held_out, published["router"], published["shared_with_context"]):
        assert world.run.blobs.has(blob["sha256"])
        assert refusal(partial(node.fetch, blob["sha256"]))[0] == grpc.StatusCode.NOT_FOUND


def test_the_whole_way_of_a_shard(world: World) -> None:
    node = world.node("laptop")
    assignment = node.lease(2)
    assert assignment.expert.partition == 2
    assert assignment.expert.partition_tokens == 1002
    assert assignment.heartbeat_seconds == LEASE_SECONDS / 4
    assert node.lease(0).lease_id == assignment.lease_id
    assert node.heartbeat(assignment.lease_id) == CONTINUE
    shard = make_shard(world.run, 2)
    assert node.open(assignment.lease_id, shard).offset == 0
    assert node.send(assignment.lease_id, shard) == len(shard)
    receipt = node.verdict(assignment, shard, world.run_id)
    assert (receipt.verdict, receipt.partition, receipt.sha256) == (ACCEPTED, 2, sha256_of(shard))
    opened = node.open(assignment.lease_id, shard)
    assert (opened.offset, opened.receipt.verdict) == (len(shard), ACCEPTED)
    assert node.heartbeat(assignment.lease_id) == ABANDON


def test_a_shard_that_waits_behind_another_one_is_handed_in_once(make_world: Callable[[], World]) -> None:
    world = make_world()
    proceed = threading.Event()
    world.jobs.before = lambda what: None if what != "validate" else (proceed.wait(20), None)[1]
    world.jobs.verdicts = [{"accepted": False, "reasons": ["no better"]}]
    world.start()
    node, other = world.node("laptop"), world.node("desktop")
    late, first = node.lease(0), make_shard(world.run, 0, seed=1)
    world.clock.now += LEASE_SECONDS + 1
    assignment, second = other.lease(0), make_shard(world.run, 0, seed=2)
    node.hand_in(late, first, world.run_id)
    other.hand_in(assignment, second, world.run_id)
    for _ in range(3):
        assert other.commit(assignment, second, world.run_id).verdict == PENDING

    def handed_in() -> list[str]:
        return [line for line in world.said if "handed expert" in line]

    assert handed_in() == ["laptop handed expert 0 in"]
    proceed.set()
    assert other.verdict(assignment, second, world.run_id).verdict == ACCEPTED
    assert handed_in() == ["laptop handed expert 0 in", "desktop handed expert 0 in"]


def test_an_upload_resumes_where_it_was_cut(world: World) -> None:
    node = world.node("laptop")
    lease_id = node.lease().lease_id
    shard = make_shard(world.run, 0)

    part = world.run.blobs.directory / "incoming" / f"{sha256_of(shard)}.part"
    assert node.open(lease_id, shard).offset == 0

    def cut() -> Iterator[pb.UploadRequest]:
        yield pb.UploadRequest(lease_id=lease_id, sha256=sha256_of(shard), data=shard[:1000])
        until(lambda: part.exists() and part.stat().st_size == 1000)
        raise ConnectionError("the laptop was closed")

    refusal(lambda: node.stub.Upload(cut(), metadata=node.metadata))
    assert node.open(lease_id, shard).offset == 1000
    assert node.send(lease_id, shard, 1000) == len(shard)


def test_damaged_bytes_are_to_be_sent_again_and_then_refused(world: World) -> None:
    node = world.node("laptop")
    lease_id = node.lease().lease_id
    shard = make_shard(world.run, 0)
    node.open(lease_id, shard)
    wrong = shard[:-1] + bytes([shard[-1] ^ 1])
    send = partial(node.send, lease_id, wrong, sha256=sha256_of(shard))
    assert refusal(send)[:2] == (grpc.StatusCode.ABORTED, "network")
    assert node.open(lease_id, shard).offset == 0
    assert refusal(send)[:2] == (grpc.StatusCode.FAILED_PRECONDITION, "shard")


def test_a_commit_must_be_complete_signed_and_about_this_shard(world: World) -> None:
    node, other = world.node("laptop"), world.node("thief")
    assignment = node.lease()
    shard = make_shard(world.run, 0)

    def commit(**changed: Any) -> pb.Receipt:
        return node.commit(assignment, shard, world.run_id, **changed)

    assert "not complete" in refusal(commit)[2]
    node.open(assignment.lease_id, shard)
    node.send(assignment.lease_id, shard)
    wrong: dict[str, tuple[Any, str]] = {
        "run_id": ("x", "run id"), "partition": (1, "partition"), "sha256": ("0" * 64, "sha256"), "lease_id": ("x", "lease id"),
        "shared_sha256": ("0" * 64, "shared components"), "config_fingerprint": ("x", "config")}  # fmt: skip
    for key, (value, word) in wrong.items():
        code, error, sentence = refusal(partial(commit, **{key: value}))
        assert (code, error) == (grpc.StatusCode.FAILED_PRECONDITION, "shard")
        assert word in sentence
    assert "no such lease" in refusal(lambda: other.commit(assignment, shard, world.run_id))[2]
    forged = pb.CommitRequest(lease_id=assignment.lease_id, sha256=sha256_of(shard), manifest=b"{}", signature=bytes(64))
    assert "not signed" in refusal(lambda: node.stub.Commit(forged, metadata=node.metadata))[2]
    long = pb.CommitRequest(lease_id=assignment.lease_id, sha256=sha256_of(shard), manifest=b" " * (1 << 17),
                            signature=bytes(64))  # fmt: skip
    assert refusal(lambda: node.stub.Commit(long, metadata=node.metadata))[0] == grpc.StatusCode.INVALID_ARGUMENT
    assert commit().verdict in (PENDING, ACCEPTED)


def test_a_size_that_no_shard_has_is_refused_before_a_byte_comes(world: World) -> None:
    node = world.node("laptop")
    lease_id = node.lease().lease_id
    assert refusal(lambda: node.open(lease_id, b"x", size=1 << 40))[:2] == (
        grpc.StatusCode.FAILED_PRECONDITION, "protocol")  # fmt: skip
    assert refusal(lambda: node.open("../..", b"x"))[0] == grpc.StatusCode.INVALID_ARGUMENT


def test_waiting_nodes_hear_what_they_wait_for(make_world: Callable[[], World]) -> None:
    world = make_world()
    proceed: list[str] = []
    world.jobs.before = lambda what: until(lambda: what != "shared" or proceed)
    coordinator = world.start()
    node = FakeNode(coordinator.address, "early", world.root)
    world.nodes.append(node)
    assert node.join().run.phase in ("prepare", "shared")
    wait = until(lambda: w if (w := node.ask().wait).reason.startswith("the coordinator is training") else None)
    assert wait.reason == "the coordinator is training the shared components"
    assert 1 <= wait.retry_seconds <= 15
    proceed.append("go")
    nodes = [world.node(f"n{k}") for k in range(3)]
    for node in nodes:
        node.lease()
    wait = world.node("late").ask().wait
    assert wait.reason == "no partition is open: 0 of 3 accepted, 3 being trained by other nodes"
    assert 1 <= wait.retry_seconds <= 15


def test_a_node_that_waits_for_a_released_lease_gets_it(world: World) -> None:
    node, other = world.node("laptop"), world.node("desktop")
    first = node.lease(1)
    node.stub.Release(pb.ReleaseRequest(lease_id=first.lease_id, reason="closing the lid"), metadata=node.metadata)
    assert node.heartbeat(first.lease_id) == ABANDON
    assert other.lease(1).expert.partition == 1


def test_errors_of_this_machine_ask_to_try_again_and_do_not_leak(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = world.node("laptop")
    desk = world.coordinator._desk  # type: ignore[union-attr]

    def full(*_: object) -> None:
        raise StorageError("The disk that holds /home/me/secret is full.")

    monkeypatch.setattr(desk.state, "grant", full)
    code, error, sentence = refusal(node.ask)
    assert (code, error) == (grpc.StatusCode.ABORTED, "storage")
    assert "/home" not in sentence
    assert any("/home/me/secret" in line for line in world.said)

    def broken(*_: object) -> None:
        raise KeyError("a password")

    monkeypatch.setattr(desk.state, "grant", broken)
    code, error, sentence = refusal(node.ask)
    assert (code, error) == (grpc.StatusCode.INTERNAL, None)
    assert "password" not in sentence
    assert "a password" in (world.root / "coordinator.log").read_text()
    monkeypatch.setattr(desk.state, "grant", lambda *_: (_ for _ in ()).throw(TrainingError("x", detail="secret")))
    assert refusal(node.ask) == (grpc.StatusCode.FAILED_PRECONDITION, "training", "x")


def test_what_a_peer_sends_is_bounded(world: World) -> None:
    node = world.node("laptop")
    code, _, _ = refusal(lambda: node.ask(*range(5000)))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    machine = pb.MachineProfile(hostname="h" * 100_000 + "\x1b[2J", cores=4, memory_bytes=(1 << 64) - 1)
    node.stub.Join(pb.JoinRequest(protocol_version=PROTOCOL_VERSION, public_key=node.public_key, name="x",
                                  machine=machine), metadata=node.joining)  # fmt: skip
    machine.platform = "p" * 100_000
    assert refusal(lambda: node.stub.Lease(pb.LeaseRequest(machine=machine), metadata=node.metadata))[0] == (
        grpc.StatusCode.INVALID_ARGUMENT)  # fmt: skip
    lease_id = node.lease().lease_id
    node.open(lease_id, bytes(CHUNK_BYTES), size=2000)
    long = pb.UploadRequest(lease_id=lease_id, sha256=sha256_of(bytes(CHUNK_BYTES)), data=bytes(CHUNK_BYTES + 1))
    assert "A chunk has at most" in refusal(lambda: node.stub.Upload(iter([long]), metadata=node.metadata))[2]
    held = world.coordinator._desk.state.nodes()[0].machine  # type: ignore[union-attr]
    assert (len(held["hostname"]), held["memory_bytes"]) == (200, (1 << 63) - 1)
    empty = iter(())
    assert refusal(lambda: node.stub.Upload(empty, metadata=node.metadata))[0] == grpc.StatusCode.INVALID_ARGUMENT


def checkpoint(step: int = 1, changed: dict[str, np.ndarray] | None = None) -> bytes:
    """What a node of this run has come to at a step, as bytes."""
    weights = {kind.format(name): np.full(shape, 0.5, np.float32) for name, shape in names.ffn_tensors(CONFIG.model).items()
               for kind in ("model.{}", "optimizer.{}.momentum_buffer")}  # fmt: skip
    return bytes(save(weights | (changed or {}), {"facts": json.dumps({"step": step})}))


def leave(node: FakeNode, lease_id: str, data: bytes) -> None:
    """Send a checkpoint and give the lease back with it."""
    node.stub.OpenUpload(pb.OpenUploadRequest(lease_id=lease_id, sha256=sha256_of(data), size=len(data), checkpoint=True),
                         metadata=node.metadata)  # fmt: skip
    node.send(lease_id, data)
    node.stub.Release(pb.ReleaseRequest(lease_id=lease_id, checkpoint_sha256=sha256_of(data)), metadata=node.metadata)


def test_the_next_node_is_given_what_another_one_left(world: World) -> None:
    first, second = world.node("first"), world.node("second")
    lease, data = first.lease(0), checkpoint()
    assert not lease.expert.HasField("checkpoint")
    leave(first, lease.lease_id, data)
    again = pb.ReleaseRequest(lease_id=lease.lease_id, checkpoint_sha256=sha256_of(data))
    first.stub.Release(again, metadata=first.metadata)  # The reply was lost: the same again.
    assert any("first leaves expert 0 at step 1 to the next" in line for line in world.said)
    given = second.lease(0)
    assert given.expert.partition == 0 and given.expert.checkpoint == pb.Blob(sha256=sha256_of(data), size=len(data))
    assert second.fetch(sha256_of(data)) == data
    shard = make_shard(world.run, 0)
    second.hand_in(given, shard, world.run_id)
    assert second.verdict(given, shard, world.run_id).verdict == ACCEPTED
    until(lambda: not world.run.blobs.has(sha256_of(data)))
    assert refusal(lambda: second.fetch(sha256_of(data)))[1] == "protocol"


def test_what_is_no_checkpoint_is_refused_and_not_kept(world: World) -> None:
    node = world.node("hostile")
    lease = node.lease(0)
    name = f"model.{next(iter(names.ffn_tensors(CONFIG.model)))}"
    shape = next(iter(names.ffn_tensors(CONFIG.model).values()))
    for data, words in ((checkpoint(step=99), "no step between"), (b"no tensors at all", "not a sound safetensors file"),
                        (checkpoint(changed={name: np.full(shape, np.nan, np.float32)}), "not finite")):  # fmt: skip
        _, code, sentence = refusal(lambda data=data: leave(node, lease.lease_id, data))  # type: ignore[misc]
        assert code == "shard" and words in sentence, sentence
        assert not world.run.blobs.has(sha256_of(data))
    large = pb.OpenUploadRequest(lease_id=lease.lease_id, sha256="0" * 64, size=1 << 30, checkpoint=True)
    assert "A checkpoint of this run has at most" in refusal(lambda: node.stub.OpenUpload(large, metadata=node.metadata))[2]
    assert node.heartbeat(lease.lease_id) == CONTINUE


def blobs(world: World) -> set[Path]:
    return {path for path in world.run.blobs.directory.iterdir() if path.is_file()}


def test_a_file_of_the_run_that_somebody_calls_a_checkpoint_stays(world: World) -> None:
    node, made = world.node("hostile"), {path.name for path in blobs(world)}
    lease_id = node.lease(0).lease_id
    assert len(made) == 4 + 3 * CONFIG.model.n_experts
    for sha256 in made:
        opened = pb.OpenUploadRequest(lease_id=lease_id, sha256=sha256, size=1000, checkpoint=True)
        assert node.stub.OpenUpload(opened, metadata=node.metadata).offset == 1000
        release = pb.ReleaseRequest(lease_id=lease_id, checkpoint_sha256=sha256)
        assert refusal(lambda release=release: node.stub.Release(release, metadata=node.metadata))[1] == "shard"  # type: ignore[misc]
    assert {path.name for path in blobs(world)} == made


def test_a_node_cannot_fill_the_disk_with_uploads_that_it_does_not_hand_in(world: World) -> None:
    node, before = world.node("hostile"), blobs(world)
    lease, shards = node.lease(0), [make_shard(world.run, 0, seed) for seed in range(4)]
    for shard in shards:
        node.open(lease.lease_id, shard)
        node.send(lease.lease_id, shard)
    assert {path.name for path in blobs(world) - before} == {sha256_of(shards[-1])}
    assert node.verdict(lease, shards[-1], world.run_id).verdict == ACCEPTED
    for number in range(4):  # Of a lease each, and of two leases that are left once the last one is left.
        lease_id, data = node.lease(1).lease_id, checkpoint(changed={"number": np.full(1, number)})
        opened = pb.OpenUploadRequest(lease_id=lease_id, sha256=sha256_of(data), size=len(data), checkpoint=True)
        node.stub.OpenUpload(opened, metadata=node.metadata)
        node.send(lease_id, data)
        node.stub.Release(pb.ReleaseRequest(lease_id=lease_id), metadata=node.metadata)
    assert len(blobs(world) - before) == 1 + MAX_UPLOADS and world.run.blobs.has(sha256_of(shards[-1]))


def test_the_health_service_is_on(world: World) -> None:
    node = world.node("laptop")
    for service in ("", "modularforge.v1.FleetService", "modularforge.v1.AdminService"):
        answer = health_pb2_grpc.HealthStub(node.channel).Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
