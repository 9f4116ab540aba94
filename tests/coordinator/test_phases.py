"""What the coordinator's working thread does beside its phases."""

from __future__ import annotations

from collections.abc import Callable
import os
from pathlib import Path
import threading
import time

import pytest

from coordinator import phases
from coordinator.blobs import UNCOMMITTED_SECONDS
from coordinator.database import DatabaseUnavailableError
from coordinator.state import State
from forge.checkpoint import assembly

from .conftest import World
from .fakes import make_shard, sha256_of, until


def age(blobs: Path) -> set[str]:
    """Make every blob older than an upload may lie uncommitted; their names."""
    past = time.time() - UNCOMMITTED_SECONDS - 60
    files = [path for path in blobs.iterdir() if path.is_file()]
    for path in files:
        os.utime(path, (past, past))
    return {path.name for path in files}


def test_a_shard_that_nobody_commits_is_forgotten_and_can_be_sent_again(world: World) -> None:
    node, other = world.node("laptop"), world.node("desktop")
    accepted, shard = node.lease(0), make_shard(world.run, 0)
    node.hand_in(accepted, shard, world.run_id)
    node.verdict(accepted, shard, world.run_id)
    until(lambda: 0 in assembly.arrived(world.run.model))
    left, lost = node.lease(1), make_shard(world.run, 1)
    assert node.open(left.lease_id, lost).offset == 0
    assert node.send(left.lease_id, lost) == len(lost)
    back, kept = other.lease(2), make_shard(world.run, 2)
    other.open(back.lease_id, kept)
    other.send(back.lease_id, kept)
    assert world.coordinator is not None
    work, blobs = world.coordinator._work, world.run.blobs.directory
    work.tidy()
    held = age(blobs)
    assert {sha256_of(lost), sha256_of(kept), sha256_of(shard)} <= held
    assert other.open(back.lease_id, kept).offset == len(kept)  # Its node is back, and finds it.
    work.tidy()
    assert held - {path.name for path in blobs.iterdir() if path.is_file()} == {sha256_of(lost)}
    other.commit(back, kept, world.run_id)
    age(blobs)
    work.tidy()
    assert world.run.blobs.has(sha256_of(kept))
    assert node.hand_in(left, lost, world.run_id)  # Sent again.
    assert node.verdict(left, lost, world.run_id).verdict


@pytest.mark.parametrize("what", ["open_partitions", "accepted_shards", "record_evaluation", "counts"])
def test_a_database_that_is_locked_as_the_run_opens_is_waited_for(make_world: Callable[[], World], what: str,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(phases, "RETRY_SECONDS", 0.01)
    does = getattr(State, what)

    def locked_once(*arguments: object, **options: object) -> object:
        if threading.current_thread().name != "work":
            return does(*arguments, **options)
        monkeypatch.setattr(State, what, does)
        raise DatabaseUnavailableError("The database is locked by a backup.")

    monkeypatch.setattr(State, what, locked_once)
    world = make_world()
    world.start()
    assert world.node("laptop").lease(1).expert.partition == 1
    assert any("is locked by a backup. Trying again" in line for line in world.said)
    assert sum("nodes can train experts now" in line for line in world.said) == 1
