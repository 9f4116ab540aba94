"""Opening the coordinator's database and running one transaction at a time on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import errno
from pathlib import Path
import threading
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, delete, event, insert, inspect, select, text
from sqlalchemy.exc import DatabaseError, IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from coordinator.tables import MIGRATIONS, SCHEMA_VERSION, Base, SchemaVersion
from forge.errors import StorageError, storage_error

#: Seconds that SQLite waits for another process (a backup, a curious shell) to let go of the file.
BUSY_SECONDS = 30.0


class DatabaseUnavailableError(StorageError):
    """The database is locked by somebody else, or its disk is full: what was asked may be asked again later."""


class Database:
    """One database, its tables made when they are missing and brought up to date when they are old.

    Transactions that change something are run one after another: a single coordinator process owns its run, and a lock here
    is the same on every backend, where isolation levels and their retries are not. Who only reads waits for nobody.

    Args:
        location: a SQLite file, or any SQLAlchemy URL such as `postgresql+psycopg://...`.
        busy_seconds: how long to wait for another process that holds the SQLite file.

    Raises:
        StorageError: it cannot be opened, is no database, is held by another program, or was made by a newer version.
    """

    def __init__(self, location: Path | str, *, busy_seconds: float = BUSY_SECONDS) -> None:
        self._name = str(location) if isinstance(location, Path) else location.partition("://")[0]
        self._engine = _engine(location, busy_seconds)
        self._lock = threading.Lock()
        try:
            with self._errors(), self._engine.begin() as connection:
                self._bring_up_to_date(connection)
        except StorageError:
            self.close()
            raise

    def _bring_up_to_date(self, connection: Connection) -> None:
        """All in one transaction: who is killed in it finds the database as it was."""
        held = None
        if inspect(connection).has_table(SchemaVersion.__tablename__):
            held = connection.scalar(select(SchemaVersion.version))
        if held == SCHEMA_VERSION:
            return
        if held is not None and not 1 <= held < SCHEMA_VERSION:
            raise StorageError(f"The database {self._name} has version {held} and this coordinator works with versions up to "
                               f"{SCHEMA_VERSION}: install the version that made it, or a newer one.")  # fmt: skip
        for step in range(held or SCHEMA_VERSION, SCHEMA_VERSION):
            for statement in MIGRATIONS[step]:
                connection.execute(text(statement))
        Base.metadata.create_all(connection)
        connection.execute(delete(SchemaVersion))
        connection.execute(insert(SchemaVersion).values(version=SCHEMA_VERSION))

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[Session]:
        """One transaction: committed when the block ends, rolled back when it raises.

        Args:
            durable: whether a power cut right after it must not undo it. Otherwise SQLite does not wait for the disk (4 ms
                here, 12 ms for one in a hundred): for what the next heartbeat says again. A killed process undoes nothing.

        Raises:
            StorageError: the database is locked for good, its disk is full, or it cannot be reached.
        """
        engine = self._engine.execution_options(durable=durable)
        with self._lock, self._errors(), Session(engine) as session, session.begin():
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One view of the database as it was at its first statement, beside whatever is being written.

        Raises:
            StorageError: as of `transaction`.
        """
        with self._errors(), Session(self._engine.execution_options(reads=True)) as session, session.begin():
            yield session

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise  # A rule of the tables; who breaks one knows what it means.
        except DatabaseError as error:
            said = str(error.orig)
            if "disk is full" in said:
                full = storage_error(self._name, OSError(errno.ENOSPC, said))
                raise DatabaseUnavailableError(str(full), detail=str(error)) from error
            kind: type[StorageError] = StorageError
            then = "check its disk and run the same command again"
            if "locked" in said:
                kind = DatabaseUnavailableError
                then = "another program holds it, such as a backup or a shell: close that and run the same command again"
            elif "not a database" in said or "malformed" in said:
                then = "it is damaged: put a copy of it back, or start the run in another directory"
            raise kind(f"The run's database {self._name} cannot be used ({said}): {then}.",
                       detail=str(error)) from error  # fmt: skip


class Scratch(Database):
    """A database in memory for one thread. All is one transaction that nobody commits, and what was read once stays in memory:
    a heartbeat takes a hundredth of the time.
    """

    def __init__(self) -> None:
        super().__init__("sqlite://")
        self._session, self._held = Session(self._engine), set[object]()
        for when in ("pending_to_persistent", "loaded_as_persistent"):
            event.listen(self._session, when, lambda session, row: self._held.add(row))

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[Session]:
        """What `Database.transaction` is, except that nothing is undone when the block raises."""
        with self._errors():
            yield self._session

    reading = transaction

    def close(self) -> None:
        """Forget it."""
        self._held.clear()
        self._session.close()
        super().close()


def _engine(location: Path | str, busy_seconds: float) -> Engine:
    if isinstance(location, Path):
        engine = create_engine(URL.create("sqlite", database=str(location)))
    else:
        try:
            engine = create_engine(location)
        except (SQLAlchemyError, ImportError) as error:
            kind = location.partition("://")[0]
            raise StorageError(f"A database address of the kind {kind!r} cannot be used: {error}.") from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", lambda connection, _: _prepare_sqlite(connection, busy_seconds))
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, busy_seconds: float) -> None:
    connection.isolation_level = None  # The driver's own BEGIN comes too late to protect what was read before a write.
    # The kernel has the file in its cache already: each connection would keep up to 2 MB of it once more.
    for pragma in (f"busy_timeout={round(1000 * busy_seconds)}", "journal_mode=WAL", "foreign_keys=ON", "cache_size=-256"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Any) -> None:
    options = connection.get_execution_options()
    if options.get("reads"):
        connection.exec_driver_sql("BEGIN")
        return
    # FULL unless it is said otherwise: a receipt that was given must outlive a power cut.
    connection.exec_driver_sql(f"PRAGMA synchronous={'FULL' if options.get('durable', True) else 'NORMAL'}")
    connection.exec_driver_sql("BEGIN IMMEDIATE")
