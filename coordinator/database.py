"""Opening the coordinator's database and running one transaction at a time on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import errno
from pathlib import Path
import threading
from typing import Any

from sqlalchemy import Engine, create_engine, event, select
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from coordinator.tables import SCHEMA_VERSION, Base, SchemaVersion
from forge.errors import StorageError, storage_error

#: Milliseconds that SQLite waits for another process (a backup, a curious shell) to let go of the file.
BUSY_MILLISECONDS = 30_000


class DatabaseUnavailableError(StorageError):
    """The database is locked by somebody else, or its disk is full: what was asked may be asked again later."""


class Database:
    """One database, its tables made when they are missing.

    Transactions that change something are run one after another: a single coordinator process owns its run, and a lock here
    is the same on every backend, where isolation levels and their retries are not. Who only reads waits for nobody.

    Args:
        location: a SQLite file, or any SQLAlchemy URL such as `postgresql+psycopg://...`.

    Raises:
        StorageError: it cannot be opened, or was made by another version.
    """

    def __init__(self, location: Path | str) -> None:
        self._name = str(location) if isinstance(location, Path) else location.partition("://")[0]
        self._engine = _engine(location)
        self._lock = threading.Lock()
        with self._errors():
            Base.metadata.create_all(self._engine)
        with self.transaction() as session:
            held = session.scalars(select(SchemaVersion.version)).one_or_none()
            if held is None:
                session.add(SchemaVersion(version=SCHEMA_VERSION))
            elif held != SCHEMA_VERSION:
                raise StorageError(f"The database {self._name} has version {held} and this coordinator works with "
                                   f"version {SCHEMA_VERSION}: install the version that made it.")  # fmt: skip

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
        except OperationalError as error:
            if "disk is full" in str(error.orig):
                full = OSError(errno.ENOSPC, str(error.orig))
                raise DatabaseUnavailableError(str(storage_error(self._name, full)), detail=str(error)) from error
            if "locked" in str(error.orig):
                raise DatabaseUnavailableError(f"Another program holds the run's database {self._name}: close what looks into "
                                               "it, such as a backup or a shell.", detail=str(error)) from error  # fmt: skip
            raise StorageError(f"The run's database {self._name} cannot be used ({error.orig}): check its disk and "
                               "run the same command again.", detail=str(error)) from error  # fmt: skip


def _engine(location: Path | str) -> Engine:
    if isinstance(location, Path):
        engine = create_engine(f"sqlite:///{location}", connect_args={"timeout": BUSY_MILLISECONDS / 1000})
    else:
        try:
            engine = create_engine(location)
        except (SQLAlchemyError, ImportError) as error:
            kind = location.partition("://")[0]
            raise StorageError(f"A database address of the kind {kind!r} cannot be used: {error}.") from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # The driver's own BEGIN comes too late to protect what was read before a write.
    for pragma in ("journal_mode=WAL", f"busy_timeout={BUSY_MILLISECONDS}", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Any) -> None:
    options = connection.get_execution_options()
    if options.get("reads"):
        connection.exec_driver_sql("BEGIN")
        return
    # FULL unless it is said otherwise: a receipt that was given must outlive a power cut.
    connection.exec_driver_sql(f"PRAGMA synchronous={'FULL' if options.get('durable', True) else 'NORMAL'}")
    connection.exec_driver_sql("BEGIN IMMEDIATE")
