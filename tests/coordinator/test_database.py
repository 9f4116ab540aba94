from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
import sqlite3

import pytest
from sqlalchemy import func, select, text

from coordinator import database as database_module
from coordinator.database import Database, DatabaseUnavailableError
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


def test_a_database_that_somebody_else_holds_is_one_sentence_and_goes_on_afterwards(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(database_module, "BUSY_MILLISECONDS", 50)
    database = Database(tmp_path / "x.db")
    with sqlite3.connect(tmp_path / "x.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(DatabaseUnavailableError, match="Another program holds the run's database .*x.db: close"):
            with database.transaction() as session:
                session.add(node(1))
        other.execute("ROLLBACK")
    other.close()
    with database.transaction() as session:
        session.add(node(1))
    database.close()


def test_a_full_disk_under_the_database_is_one_sentence_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    database = Database(tmp_path / "x.db")
    with database.reading() as session:
        pages = session.scalar(text("PRAGMA page_count")) or 0
    with pytest.raises(DatabaseUnavailableError, match="is full: free some space"):
        with database.transaction() as session:
            session.execute(text(f"PRAGMA max_page_count = {pages}"))  # SQLite then says what it says on a full disk.
            for number in range(300):
                session.add(node(number))
    with database.transaction() as session:
        session.execute(text("PRAGMA max_page_count = 100000"))
        session.add(node(1))
    with database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Node)) == 1
    database.close()
