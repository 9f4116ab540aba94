"""A coordinator that ends with its run does not leave a node behind that looks for it."""

from __future__ import annotations

import threading

import pytest

from coordinator.admin import INFO_FILE

from .conftest import World
from .fakes import make_shard, until


@pytest.mark.parametrize("killed", [True, False])
def test_the_nodes_of_a_coordinator_that_was_killed_are_waited_for_however_long_it_was_away(world: World, killed: bool) -> None:
    node, before = world.node("laptop"), world.coordinator
    assert before is not None
    for _ in range(3):
        work = node.lease()
        shard = make_shard(world.run, work.expert.partition)
        node.hand_in(work, shard, world.run_id)
        node.verdict(work, shard, world.run_id)
    until(lambda: before._assembler.done)
    left = (world.root / INFO_FILE).read_bytes()
    world.stop()
    if killed:
        (world.root / INFO_FILE).write_bytes(left)
    world.clock.now += 1000.0
    coordinator = world.start(exit_when_done=True)
    waits = threading.Thread(target=coordinator.wait)
    waits.start()
    until(coordinator._work.ended.is_set)
    waits.join(2.0)
    assert waits.is_alive() == killed
    if killed:
        assert world.node("laptop").ask().HasField("done")
    waits.join(15.0)
    assert not waits.is_alive()
