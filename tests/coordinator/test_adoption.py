"""`serve` on a run directory that `forge run` filled goes on with its experts, and takes none that was dropped."""

from __future__ import annotations

from collections.abc import Callable
import json

from coordinator.state import LOCAL_NAME, LOCAL_NODE
from forge.checkpoint import assembly
from forge.checkpoint.provenance import keep, origin
from forge.checkpoint.verify import verify
from forge.files import RunDirectory, write_json
from forge.vocabulary import STAGES

from .conftest import World
from .fakes import CONFIG, make_shard, until


def fill(world: World, *partitions: int) -> dict[int, str]:
    """What `forge run` leaves when it is stopped after these experts."""
    run = RunDirectory.open(world.root, CONFIG)
    for stage in STAGES:
        if run.marker(stage) is None:
            world.jobs("stage", {"run_dir": str(world.root), "stage": stage}, lambda _: None)
    assembly.start(run)
    for partition in partitions:
        file = run.work / "shard"
        file.write_bytes(make_shard(run, partition))
        sha256 = run.blobs.adopt(file)
        manifest = json.dumps({"partition": partition, "sha256": sha256, "lease_id": "local", "tokens_seen": 1000,
                               "run_id": run.run_id, "config_fingerprint": CONFIG.fingerprint,
                               "shared_sha256": (run.marker("publish") or {})["shared"]["sha256"]}).encode()  # fmt: skip
        keep(run, origin(run.blobs.path(sha256), CONFIG, partition, manifest, sha256=sha256), {})
        assembly.accept(run, partition, sha256, {"node_name": LOCAL_NAME, "loss": 3.0, "shared_loss": 3.5, "tokens": 1000})
    write_json(run.reports / "evaluation.json", {"shared": None, "rows": [
        {"experts": number, "arrived": list(partitions[:number]), "final": False, "mean_perplexity": 90.0}
        for number in range(len(partitions) + 1)]})  # fmt: skip
    world.jobs.calls.clear()
    return assembly.arrived(run.model)


def test_what_forge_run_left_is_gone_on_with(make_world: Callable[[], World]) -> None:
    world = make_world()
    held = fill(world, 0, 1)
    assert sorted(held) == [0, 1]
    coordinator = world.start(exit_when_done=True)
    node = world.node("laptop")
    assignment = node.lease(0)
    assert assignment.expert.partition == 2
    shard = make_shard(world.run, 2)
    node.hand_in(assignment, shard, world.run_id)
    node.verdict(assignment, shard, world.run_id)
    assert node.ask().done.reason
    coordinator.wait()
    assert world.jobs.calls == ["validate", "evaluate", "evaluate"]
    assert {k: assembly.arrived(world.run.model)[k] for k in held} == held
    assert verify(world.run.model).problems == []
    names = [(part.id, part.node_name) for part in coordinator._desk.state.partitions()]
    assert names == [(0, LOCAL_NAME), (1, LOCAL_NAME), (2, "laptop")]


def test_a_finished_run_is_finished_for_the_coordinator_too(make_world: Callable[[], World]) -> None:
    world = make_world()
    held = fill(world, 0, 1, 2)
    for _ in range(2):
        world.start(exit_when_done=True).wait()
        world.stop()
    assert assembly.arrived(world.run.model) == held
    assert world.jobs.calls == ["evaluate"]


def test_forge_run_goes_on_with_what_nodes_left_and_serve_with_that(make_world: Callable[[], World]) -> None:
    world = make_world()
    world.start()
    node = world.node("laptop")
    first, shard = node.lease(0), make_shard(world.run, 0)
    node.hand_in(first, shard, world.run_id)
    node.verdict(first, shard, world.run_id)
    until(lambda: 0 in assembly.arrived(world.run.model))
    stale = node.lease(1)
    world.stop()
    fill(world, 1)  # As `forge run` does, which skips what has arrived.
    world.start()
    again = world.node("laptop")
    assert again.heartbeat(stale.lease_id) == 3  # ABANDON: the expert is there.
    assert again.lease().expert.partition == 2
    assert sorted(assembly.arrived(world.run.model)) == [0, 1]


def test_a_dropped_expert_is_not_adopted(make_world: Callable[[], World]) -> None:
    world = make_world()
    fill(world, 0, 1)
    world.start()
    world.node("laptop")
    assert world.coordinator is not None
    state = world.coordinator._desk.state
    assert state.revoke(LOCAL_NODE, drop_shards=True) == [0, 1]
    world.stop()  # Perhaps before they were taken out of the model.
    world.start()
    world.node("laptop")
    until(lambda: assembly.arrived(world.run.model) == {})
