from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from node.client import FleetClient
from node.connection import Patience
from node.identity import Identity
from node.link import Link
from node.machine import MachineProfile
from node.throttle import Throttle

from .fakes import FakeCoordinator

MACHINE = MachineProfile(
    hostname="here", platform="test", cores=2, memory_bytes=1 << 33, free_bytes=1 << 32, device="cpu")  # fmt: skip


@pytest.fixture
def coordinator() -> Iterator[FakeCoordinator]:
    fake = FakeCoordinator()
    yield fake
    fake.stop()


@pytest.fixture
def said() -> list[str]:
    """What the client told the owner about its waits."""
    return []


@pytest.fixture
def connect(said: list[str]) -> Iterator[Callable[..., FleetClient]]:
    clients: list[FleetClient] = []

    def make(address: str, identity: Identity | None = None, stream: float = 10.0, unary: float = 10.0,
             rate: int | None = None) -> FleetClient:  # fmt: skip
        clients.append(FleetClient(
            Link(address, insecure=1), identity=identity or Identity(bytes(32)), name="tester", ram_bytes=1 << 33,
            on_wait=said.append, upload=Throttle(rate), download=Throttle(rate),
            patience=Patience(unary=unary, stream=stream, first_connection=0.5, goodbye=1.0,
                              backoff=(0.02, 0.1))))  # fmt: skip
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def machine() -> MachineProfile:
    return MACHINE
