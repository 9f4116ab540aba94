from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sqlalchemy import func, select, text

from coordinator.database import Database
from coordinator.handlers import WAITING_CALLS_PER_SECOND, _nothing_open
from coordinator.records import Counts
from coordinator.tables import Node


def node(number: int) -> Node:
    return Node(id=str(number), public_key=b"", name="n", machine={}, joined_at=0.0, seen_at=0.0)


def test_who_reads_waits_for_nobody_and_sees_what_was_committed(tmp_path: Path) -> None:
    database = Database(tmp_path / "x.db")
    count = select(func.count()).select_from(Node)
    with database.transaction() as writing:
        writing.add(node(1))
        writing.flush()
        with database.reading() as session:  # The other one holds the lock of the file and of this process.
            assert session.scalar(count) == 0
    with database.reading() as session:
        assert session.scalar(count) == 1
    database.close()


def test_only_what_the_next_heartbeat_says_again_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    database = Database(tmp_path / "x.db")
    modes = []
    for durable in (True, False, True):
        with database.transaction(durable=durable) as session:
            modes.append(session.scalar(text("PRAGMA synchronous")))
    assert modes == [2, 1, 2]  # FULL, NORMAL, FULL
    database.close()


def test_a_large_fleet_without_work_asks_at_a_bounded_rate() -> None:
    wait: Callable[[int], float] = lambda nodes: _nothing_open(Counts(leased=1, uploaded=1), False, nodes).retry_seconds  # noqa: E731
    assert wait(3) == wait(100) == 2.0
    assert 3000 / wait(3000) == WAITING_CALLS_PER_SECOND
