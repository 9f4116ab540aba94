"""Audits over real gRPC: what a node has to show, when a shard waits for it, and who is blamed. Only the job is a fake one."""

from __future__ import annotations

from collections.abc import Callable
import json
from pathlib import Path
from typing import Any

import grpc
from modularforge.v1 import fleet_pb2 as pb
import numpy as np
import pytest

from coordinator import phases
from coordinator.audits import Audits
from coordinator.auth import Credentials
from coordinator.database import DatabaseUnavailableError
from coordinator.records import ShardRecord
from coordinator.state import State
from forge.config import parse_config
from forge.files import RunDirectory
from forge.model import names

from .conftest import World
from .fakes import CONFIG, Clock, FakeNode, make_shard, sha256_of, until
from .test_service import ACCEPTED, checkpoint, leave, refusal

REJECTED = pb.Receipt.VERDICT_REJECTED
#: Three steps, so that each is a part.
AUDITED = parse_config(CONFIG.model_dump() | {"fleet": {"lease_seconds": 40.0, "audit": 1.0, "audit_parts": 3}})
KEPT = {step: checkpoint(step) for step in (1, 2)}
MATRIX = f"model.{next(iter(names.ffn_tensors(CONFIG.model)))}"
OTHERS = {step: checkpoint(step, {MATRIX: np.ones(names.ffn_tensors(CONFIG.model)[MATRIX.removeprefix("model.")], np.float32)})
          for step in (1, 2)}  # fmt: skip


@pytest.fixture
def world(make_world: Callable[[], World]) -> World:
    world = make_world()
    world.start(config=AUDITED)
    return world


def said_of(kept: dict[int, bytes]) -> dict[str, str]:
    return {str(step): sha256_of(data) for step, data in kept.items()}


def hand_in(world: World, node: FakeNode, partition: int, kept: dict[int, bytes] = KEPT,
            **said: Any) -> tuple[pb.Assignment, Callable[[], pb.Receipt]]:  # fmt: skip
    """Upload a shard; its assignment, and the commit that can be made again and again."""
    assignment, shard = node.lease(partition), make_shard(world.run, partition)
    node.open(assignment.lease_id, shard)
    node.send(assignment.lease_id, shard)
    return assignment, lambda: node.commit(assignment, shard, world.run_id, **({"checkpoints": said_of(kept)} | said))


def show(node: FakeNode, lease_id: str, data: bytes) -> None:
    request = pb.OpenUploadRequest(lease_id=lease_id, sha256=sha256_of(data), size=len(data), checkpoint=True)
    node.stub.OpenUpload(request, metadata=node.metadata)
    node.send(lease_id, data)


def decided(commit: Callable[[], pb.Receipt]) -> pb.Receipt:
    def look() -> pb.Receipt | None:
        receipt = commit()
        return receipt if receipt.verdict != pb.Receipt.VERDICT_PENDING else None

    receipt: pb.Receipt = until(look, seconds=60)
    return receipt


def test_a_shard_waits_for_its_checkpoints_and_nothing_of_them_stays(world: World) -> None:
    node, other = world.node("laptop"), world.node("desktop")
    assignment, commit = hand_in(world, node, 1)
    wanted = list(commit().wanted)
    assert wanted and set(wanted) <= set(said_of(KEPT).values()) and list(commit().wanted) == wanted
    waiting, second = hand_in(world, other, 2, OTHERS)
    for data in OTHERS.values():  # They are there first: the older shard does not hold this one up.
        if sha256_of(data) in second().wanted:
            show(other, waiting.lease_id, data)
    assert decided(second).verdict == ACCEPTED
    missing = [data for data in KEPT.values() if sha256_of(data) in commit().wanted]
    for data in missing:
        show(node, assignment.lease_id, data)
    assert decided(commit).verdict == ACCEPTED and world.jobs.calls.count("replay") == 2
    asked = world.jobs.arguments["replay"]
    assert asked["last"] == asked["first"] + 1 and (asked["before"] is None) == (asked["first"] == 0)
    until(lambda: not any(world.run.blobs.has(sha256_of(data)) for data in (*KEPT.values(), *OTHERS.values())))
    assert sum("were repeated: its weights are 0.01" in line for line in world.said) == 2


def test_who_is_too_far_from_the_repetition_is_rejected_and_blamed(world: World) -> None:
    node = world.node("laptop")
    world.jobs.replays = [{"within": False, "distance": 0.9}]
    assignment, commit = hand_in(world, node, 1)
    for data in KEPT.values():
        if sha256_of(data) in commit().wanted:
            show(node, assignment.lease_id, data)
    receipt = decided(commit)
    assert receipt.verdict == REJECTED and "it was not trained as it says: steps" in receipt.reasons[0]
    (record,) = world.coordinator._desk.state.nodes()  # type: ignore[union-attr]
    assert record.rejected == 1
    assert commit().verdict == REJECTED, "the same lease hears the same again"
    until(lambda: not any(world.run.blobs.has(sha256_of(data)) for data in KEPT.values()))


def test_who_really_trained_the_same_bytes_is_not_refused_for_another_ones_lie(world: World) -> None:
    """Training is deterministic: an audit blames the node and not the bytes."""
    liar, honest = world.node("liar"), world.node("honest")
    world.jobs.replays = [{"within": False, "distance": 0.9}]
    for node, kept, verdict in ((liar, OTHERS, REJECTED), (honest, KEPT, ACCEPTED)):
        assignment, commit = hand_in(world, node, 1, kept)
        for data in kept.values():
            if sha256_of(data) in commit().wanted:
                show(node, assignment.lease_id, data)
        assert decided(commit).verdict == verdict
        if node is liar:
            again = commit
    assert again().verdict == REJECTED
    assert {node.name: node.rejected for node in world.coordinator._desk.state.nodes()} == {"liar": 1, "honest": 0}  # type: ignore[union-attr]


@pytest.mark.parametrize("checkpoints", [{}, {"1": "a" * 64}, {"1": "a" * 64, "2": "b"}, {"1": "a" * 64, "2": 3}, "none", None])
def test_a_manifest_without_its_checkpoints_is_refused(world: World, checkpoints: object) -> None:
    _, commit = hand_in(world, world.node("laptop"), 1, checkpoints=checkpoints)
    assert "does not name the checkpoints of the steps 1, 2" in refusal(commit)[2]


def test_who_hands_no_checkpoint_in_is_rejected_in_the_end(world: World) -> None:
    _, commit = hand_in(world, world.node("laptop"), 1)
    assert commit().wanted
    world.clock.now += 100_000
    receipt = decided(commit)
    assert receipt.verdict == REJECTED and "was asked for the checkpoints and did not hand them in" in receipt.reasons[0]


def test_checkpoints_are_there_until_the_verdict_is_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "RETRY_SECONDS", 0.01)
    node = world.node("laptop")
    assignment, commit = hand_in(world, node, 1)
    state = world.coordinator._desk.state  # type: ignore[union-attr]
    accept = state.accept

    def locked_once(*shard: int, **losses: float | None) -> bool:
        monkeypatch.setattr(state, "accept", accept)
        world.clock.now += 100_000  # The audit took long: its node is not waited for any more.
        raise DatabaseUnavailableError("The database is locked by a backup.")

    monkeypatch.setattr(state, "accept", locked_once)
    for data in KEPT.values():
        if sha256_of(data) in commit().wanted:
            show(node, assignment.lease_id, data)
    assert decided(commit).verdict == ACCEPTED and world.jobs.calls.count("replay") == 2
    until(lambda: not any(world.run.blobs.has(sha256_of(data)) for data in KEPT.values()))


def test_a_file_of_the_run_is_no_checkpoint_and_stays(world: World) -> None:
    node = world.node("laptop")
    assignment = node.lease(1)
    shared = assignment.expert.shared.sha256
    _, commit = hand_in(world, node, 1, checkpoints={"1": shared, "2": shared})
    receipt = decided(commit)
    assert receipt.verdict == REJECTED and "does not hold the tensors" in receipt.reasons[0]
    assert world.run.blobs.has(shared)


def test_what_an_audit_waits_with_is_needed_until_its_verdict(world: World) -> None:
    node = world.node("laptop")
    assignment, commit = hand_in(world, node, 1)
    wanted, desk = commit().wanted, world.coordinator._desk  # type: ignore[union-attr]
    assert all(desk.uploads._needed(sha256) for sha256 in wanted) and not desk.uploads._needed("0" * 64)
    for data in KEPT.values():
        if sha256_of(data) in wanted:
            show(node, assignment.lease_id, data)
    assert decided(commit).verdict == ACCEPTED
    assert not any(desk.uploads._needed(sha256) for sha256 in wanted)


def test_checkpoints_that_nobody_asked_for_are_not_taken(world: World) -> None:
    node = world.node("laptop")
    assignment = node.lease(1)
    data = checkpoint(step=2)
    sentence = "an unfinished one is not handed over"
    assert sentence in refusal(lambda: show(node, assignment.lease_id, data))[2]
    assert sentence in refusal(lambda: leave(node, assignment.lease_id, data))[2]
    foreign = world.node("desktop")
    _, commit = hand_in(world, node, 1)
    (wanted, *_) = commit().wanted
    opened = pb.OpenUploadRequest(lease_id=assignment.lease_id, sha256=wanted, size=10, checkpoint=True)
    with pytest.raises(grpc.RpcError):
        foreign.stub.OpenUpload(opened, metadata=foreign.metadata)


def test_the_draw_is_fair_cannot_be_foretold_and_does_not_change(tmp_path: Path) -> None:
    config = parse_config(CONFIG.model_dump() | {"fleet": {"audit": 0.25, "audit_parts": 3}})
    run = RunDirectory.open(tmp_path / "run", config)
    state = State(run.database, lease_seconds=40.0)

    def drawn(secret: bytes, kept: dict[int, bytes] = KEPT) -> list[int | None]:
        audits = Audits(run=run, config=config, state=state, credentials=Credentials(secret), clock=Clock())
        samples = [audits.sample(ShardRecord(
            id=number, partition=0, sha256="0" * 64, size=1, node_id="n", node_name="n", attempts=0, signature=b"",
            public_key=b"", manifest=json.dumps({"number": number, "checkpoints": said_of(kept)}).encode()))
            for number in range(2000)]  # fmt: skip
        return [None if sample is None else sample.first for sample in samples]

    once, again, elsewhere = drawn(bytes(32)), drawn(bytes(32)), drawn(b"x" * 32)
    assert once == again and once != elsewhere
    assert 400 < 2000 - once.count(None) < 600, "a quarter"
    assert all(once.count(first) > 100 for first in (0, 1, 2))
    assert drawn(bytes(32), {}) == drawn(bytes(32), {1: KEPT[1]}) == [None] * 2000, "committed before the run audited so"
    state.close()
