from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coordinator.quotas import Limits
from coordinator.serve import Coordinator
from coordinator.state import State
from forge.config import RunConfig
from forge.files import RunDirectory

from .fakes import CONFIG, LEASE_SECONDS, Clock, FakeJobs, FakeNode, until


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state(tmp_path: Path, clock: Clock) -> Iterator[State]:
    """Three partitions, and the nodes a, b and c."""
    state = State(tmp_path / "forge.db", lease_seconds=LEASE_SECONDS, clock=clock)
    state.open_partitions([{"partition": k, "tokens": 10, "shared_loss": 3.5} for k in range(3)])
    for node_id in "abc":
        state.register_node(node_id, node_id.encode() * 32, f"node {node_id}", {})
    yield state
    state.close()


class World:
    """One coordinator that can be stopped and started again, and nodes that talk to it."""

    def __init__(self, root: Path, clock: Clock) -> None:
        self.root, self.clock, self.jobs = root, clock, FakeJobs()
        self.said: list[str] = []
        self.coordinator: Coordinator | None = None
        self.nodes: list[FakeNode] = []

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.root)

    @property
    def run_id(self) -> str:
        return self.run.run_id

    def start(self, *, listen: str = "127.0.0.1:0", push: str | None = None, exit_when_done: bool = False,
              insecure: int = 0, dashboard: str | None = "off", limits: Limits | None = None,
              invite: int = 0, config: RunConfig = CONFIG) -> Coordinator:  # fmt: skip
        coordinator = Coordinator(config, self.root, listen, push=push, exit_when_done=exit_when_done, insecure=insecure,
                                  run_job=self.jobs, echo=self.said.append, clock=self.clock, limits=limits,
                                  dashboard=dashboard, invite=invite)  # fmt: skip
        coordinator.start()
        self.coordinator = coordinator
        return coordinator

    def stop(self) -> None:
        for node in self.nodes:
            node.channel.close()
        self.nodes.clear()
        if self.coordinator is not None:
            self.coordinator.stop()
            self.coordinator = None

    def node(self, name: str) -> FakeNode:
        """A node that has joined a coordinator which takes experts."""
        assert self.coordinator is not None
        node = FakeNode(self.coordinator.address, name, self.root)
        self.nodes.append(node)
        until(lambda: node.join().run.phase in ("experts", "evaluate", "done"))
        until(lambda: node.join().run.phase != "evaluate" or self.run.marker("publish") is None)
        return node


@pytest.fixture
def make_world(tmp_path: Path, clock: Clock) -> Iterator[Callable[[], World]]:
    worlds: list[World] = []

    def make() -> World:
        worlds.append(World(tmp_path / f"run{len(worlds)}", clock))
        return worlds[-1]

    yield make
    for world in worlds:
        world.stop()


@pytest.fixture
def world(make_world: Callable[[], World]) -> World:
    world = make_world()
    world.start()
    return world
