from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
import sqlite3
import subprocess
import sys
from typing import Any

import pytest
from sqlalchemy import create_engine, func, inspect, select, text

from coordinator.database import Database, DatabaseUnavailableError
from coordinator.handlers import WAITING_CALLS_PER_SECOND, _nothing_open
from coordinator.records import Counts
from coordinator.state import State
from coordinator.tables import MIGRATIONS, SCHEMA_VERSION, Node
from forge.errors import StorageError
from forge.system import resident_bytes


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


def test_a_database_is_where_its_path_says_whatever_is_in_it(tmp_path: Path) -> None:
    directory = tmp_path / "a run?mode=ro&x#1 100%25 :memory:"
    directory.mkdir()
    Database(directory / "x.db").close()
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]
    with closing(sqlite3.connect(directory / "x.db")) as connection:
        assert connection.execute("SELECT version FROM schema_version").fetchall() == [(SCHEMA_VERSION,)]


def test_connections_do_not_each_keep_the_file_in_memory(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "x.db")) as other:
        other.execute("CREATE TABLE texts (text)")
        other.executemany("INSERT INTO texts VALUES (?)", [("x" * 1000,)] * 4000)
        other.commit()
    database, before = Database(tmp_path / "x.db"), resident_bytes()
    with ExitStack() as open_at_once:
        for _ in range(5):
            session = open_at_once.enter_context(database.reading())
            assert session.scalar(text("SELECT sum(length(text)) FROM texts")) == 4_000_000
        assert resident_bytes() - before < 5_000_000  # Less than the 2 MB that SQLite takes for each by itself.
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
    wait: Callable[[int], float] = lambda nodes: _nothing_open(Counts(leased=1, uploaded=1), nodes).retry_seconds  # noqa: E731
    assert wait(3) == wait(100) == 2.0
    assert 3000 / wait(3000) == WAITING_CALLS_PER_SECOND


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


# Versions and damage ----------------------------------------------------------------------------------------------------

DUMPS = sorted((Path(__file__).parent / "schemas").glob("*.sql"), key=lambda dump: dump.stem)


def restored(dump: Path, path: Path) -> Path:
    """A database as an older version left it, with nodes, leases, shards and an evaluation."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(dump.read_text(encoding="utf-8"))
    return path


def schema(path: Path) -> dict[str, Any]:
    """Tables, columns and keys, as SQLAlchemy finds them."""
    engine = create_engine(f"sqlite:///{path}")
    found = inspect(engine)
    tables = {table: ([(c["name"], str(c["type"]), c["nullable"]) for c in found.get_columns(table)],
                      found.get_pk_constraint(table)["constrained_columns"], sorted(map(str, found.get_foreign_keys(table))),
                      sorted(str(u["column_names"]) for u in found.get_unique_constraints(table)),
                      sorted(str(i["column_names"]) for i in found.get_indexes(table)))
              for table in found.get_table_names()}  # fmt: skip
    engine.dispose()  # Python 3.13 complains of a connection that is left open.
    return tables


@pytest.mark.parametrize("dump", DUMPS, ids=lambda dump: dump.stem)
def test_a_database_of_every_version_that_was_ever_committed_goes_on(dump: Path, tmp_path: Path) -> None:
    Database(tmp_path / "new.db").close()
    path = restored(dump, tmp_path / "old.db")
    state = State(path, lease_seconds=40.0, clock=lambda: 1_000_010.0)
    assert schema(path) == schema(tmp_path / "new.db")
    assert [part.state for part in state.partitions()] == ["accepted", "open", "leased"]
    assert [shard.node_id for shard in state.accepted_shards()] == ["a"]
    assert {node.name for node in state.nodes()} == {"node a", "node b", "node c"}
    assert state.evaluated(0)
    held = state.grant("c")
    assert held is not None and (held.partition, held.fresh) == (2, False)
    assert state.invite(bytes(32), name="", uses=1, seconds=60.0).state == "valid"
    state.close()


def test_the_newest_dump_is_of_this_version_and_every_version_has_its_step(tmp_path: Path) -> None:
    Database(tmp_path / "new.db").close()
    assert schema(restored(DUMPS[-1], tmp_path / "newest.db")) == schema(tmp_path / "new.db"), (
        "the tables were changed: add a version and a migration to coordinator/tables.py and a dump to schemas/")
    assert DUMPS[-1].stem == f"{SCHEMA_VERSION:02}"
    assert sorted(MIGRATIONS) == list(range(1, SCHEMA_VERSION))


#: Opens a database and kills itself right before its n-th statement; says how many there were when there are no more.
KILLED = """
import os, sys
from pathlib import Path
from sqlalchemy import Engine, event
from coordinator.database import Database
left = [int(sys.argv[2])]
@event.listens_for(Engine, "before_cursor_execute")
def count(connection, cursor, statement, parameters, context, executemany):
    if statement.lstrip().startswith(("CREATE", "DELETE", "INSERT", "ALTER", "UPDATE")):
        if left[0] == 0:
            os._exit(99)
        left[0] -= 1
Database(Path(sys.argv[1])).close()
"""


@pytest.mark.parametrize("dump", [DUMPS[0], None], ids=["old", "new"])
def test_a_coordinator_killed_in_the_middle_of_a_migration_goes_on(dump: Path | None, tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    if dump is not None:
        restored(dump, path)
    killed = 0
    for statements in range(0, 30, 2):
        ended = subprocess.run([sys.executable, "-c", KILLED, str(path), str(statements)], check=False)
        if ended.returncode == 0:
            break
        assert ended.returncode == 99
        killed += 1
        with closing(sqlite3.connect(path)) as connection:  # Nothing, or what was there: never half of it.
            held = connection.execute("SELECT name FROM sqlite_master WHERE name = 'invitations'").fetchall()
            assert held == []
            assert dump is None or connection.execute("SELECT version FROM schema_version").fetchall() == [(1,)]
    assert killed >= 2 and ended.returncode == 0
    state = State(path, lease_seconds=40.0)
    assert len(state.partitions()) == (0 if dump is None else 3)
    state.close()


def test_a_newer_database_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = restored(DUMPS[0], tmp_path / "x.db")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE schema_version SET version = 1000")
    before = schema(path)
    with pytest.raises(StorageError, match="has version 1000 and this coordinator works with versions up to .*: install"):
        Database(path)
    assert schema(path) == before


def test_what_holds_or_damages_the_file_is_one_sentence(tmp_path: Path) -> None:
    path = restored(DUMPS[-1], tmp_path / "x.db")
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StorageError, match="another program holds it.*close that and run the same command again"):
            Database(path, busy_seconds=0.05)
        other.rollback()
    database = Database(path, busy_seconds=0.05)
    with closing(sqlite3.connect(path)) as other:  # And later, while the run goes on.
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="another program holds it"), database.transaction() as session:
            session.add(node(9))
        other.rollback()
    with database.transaction() as session:
        session.add(node(9))
    database.close()
    path.write_bytes(b"not a database, and long enough to see it" * 100)
    with pytest.raises(StorageError, match="it is damaged: put a copy of it back"):
        Database(path)
