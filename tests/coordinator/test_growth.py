"""A coordinator that lives for weeks keeps nothing of who is gone and of what is done: counted, not timed."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine, event

from coordinator.blobs import Uploads
from coordinator.invite import revoke_node
from coordinator.quotas import Limits, Quotas

from .conftest import World
from .fakes import Clock, make_shard, until

#: Attributes that are not the coordinator's own memory: the tests', and what time empties (see below).
OUTSIDE = ("_run_job", "_job", "_echo", "quotas")


def held(thing: Any, seen: set[int]) -> int:
    """Elements of all containers that an object of ours holds, however deep."""
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, dict):
        return len(thing) + sum(held(value, seen) for value in thing.values())
    if isinstance(thing, list | set | tuple):
        return len(thing) + sum(held(value, seen) for value in thing)
    if type(thing).__module__.startswith("coordinator"):
        return sum(held(value, seen) for name, value in vars(thing).items() if name not in OUTSIDE)
    return 0


def one_run(world: World, number: int) -> None:
    """A new node trains everything, and is then revoked with all of it."""
    node, coordinator = world.node(f"node {number}"), world.coordinator
    assert coordinator is not None
    for _ in range(3):
        work = until(lambda: node.ask().assignment if node.ask().HasField("assignment") else None)
        shard = make_shard(world.run, work.expert.partition, seed=number)
        node.heartbeat(work.lease_id, activity="training", step=1, steps=2, loss=3.0)
        node.hand_in(work, shard, world.run_id)
        node.verdict(work, shard, world.run_id)
    assert until(lambda: node.ask().HasField("done"))
    until(lambda: coordinator._assembler.done)
    revoke_node(world.root, node.name, drop_shards=True)
    until(lambda: not coordinator._assembler.done)
    coordinator.snapshot()


@pytest.mark.slow
def test_nothing_is_kept_of_nodes_and_runs_that_are_over(world: World) -> None:
    statements: list[set[str]] = [set(), set()]
    now = statements[0]
    listener = lambda connection, cursor, statement, *more: now.add(statement)  # noqa: E731
    event.listen(Engine, "before_cursor_execute", listener)
    try:
        for number in range(3):
            one_run(world, number)
        before = held(world.coordinator, set())
        now = statements[1]
        for number in range(3, 9):
            one_run(world, number)
    finally:
        event.remove(Engine, "before_cursor_execute", listener)
    assert held(world.coordinator, set()) <= before
    # Each is compiled and kept once for every connection: none may depend on how much there is.
    assert not statements[1] - statements[0]


def test_what_is_walked_is_really_there(world: World) -> None:
    node = world.node("laptop")
    work = node.lease()
    before, data = held(world.coordinator, set()), b"x" * 100
    node.open(work.lease_id, data)
    uploads: Uploads = world.coordinator._desk.uploads  # type: ignore[union-attr]
    assert len(uploads._of_lease) == len(uploads._open) == 1 and held(world.coordinator, set()) > before
    node.send(work.lease_id, data)
    assert len(uploads._of_lease) == 1 and not uploads._open, "what a lease uploaded is known until it uploads something else"
    uploads.forget_all()
    assert not uploads._of_lease


def test_a_node_that_was_quiet_for_long_enough_has_no_bucket() -> None:
    clock = Clock()
    quotas = Quotas(Limits(calls_per_second=10.0, burst=50.0), clock)
    for number in range(100):
        quotas.call(f"node {number}")
    clock.now += 5.1
    quotas.call("another")
    assert set(quotas._buckets) == {"another"}
