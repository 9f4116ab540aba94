"""The tables of the coordinator's database: SQLite by default, any SQLAlchemy URL possible."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Double, ForeignKey, LargeBinary, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

#: Version of these tables. An older database is brought up to it, a newer one is refused.
SCHEMA_VERSION = 3
#: Version -> the SQL that makes a database of it one of the next. New tables need none: those that are missing are made.
#: Who changes a table adds a version here and its dump to tests/coordinator/schemas/.
MIGRATIONS: dict[int, tuple[str, ...]] = {1: (), 2: ()}


class Base(DeclarativeBase):
    """Base of every table."""

    # Double is what SQLAlchemy 2.1 takes for float by itself; 2.0, the newest for Python 3.10, takes another name.
    type_annotation_map = {dict[str, Any]: JSON, list[str]: JSON, float: Double}


class SchemaVersion(Base):
    """One row: which version of the tables this database holds."""

    __tablename__ = "schema_version"

    version: Mapped[int] = mapped_column(primary_key=True)


class Node(Base):
    """A machine that joined, known by its public key."""

    __tablename__ = "nodes"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    public_key: Mapped[bytes] = mapped_column(LargeBinary(32))
    name: Mapped[str] = mapped_column(String(64))
    machine: Mapped[dict[str, Any]]
    joined_at: Mapped[float]
    seen_at: Mapped[float]


class Invitation(Base):
    """A secret that lets machines in, a number of times. The secret itself is nowhere: only its sha256 is kept, which is
    enough for 256 random bits.
    """

    __tablename__ = "invitations"

    id: Mapped[str] = mapped_column(String(8), primary_key=True)
    """The first digits of the sha256."""
    sha256: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(64))
    uses: Mapped[int]
    used: Mapped[int]
    created_at: Mapped[float]
    expires_at: Mapped[float]
    revoked_at: Mapped[float | None]


class Admission(Base):
    """With which invitation a node came."""

    __tablename__ = "admissions"

    node_id: Mapped[str] = mapped_column(ForeignKey("nodes.id"), primary_key=True)
    invitation: Mapped[str] = mapped_column(ForeignKey("invitations.id"))


class Revocation(Base):
    """A node that may not come back."""

    __tablename__ = "revocations"

    node_id: Mapped[str] = mapped_column(ForeignKey("nodes.id"), primary_key=True)
    revoked_at: Mapped[float]


class Partition(Base):
    """One unit of work. `state` changes in `coordinator.state` only."""

    __tablename__ = "partitions"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    state: Mapped[str] = mapped_column(String(16), default="open")
    tokens: Mapped[int]
    shared_loss: Mapped[float | None]
    last_rejection: Mapped[list[str]]


class Lease(Base):
    """A node's claim on a partition. While it is active, `active_node` and `active_partition` repeat its node and
    partition: their unique constraints are what allows one active lease a node and one a partition. A backup lease has no
    `active_partition`, until the lease that it backs up has ended.
    """

    __tablename__ = "leases"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    partition: Mapped[int] = mapped_column(ForeignKey("partitions.id"), index=True)
    node_id: Mapped[str] = mapped_column(ForeignKey("nodes.id"), index=True)
    granted_at: Mapped[float]
    expires_at: Mapped[float]
    ended: Mapped[str | None] = mapped_column(String(16))
    """None while active, else expired, released, committed, rejected, misled (by the checkpoint
    that it went on from), undecided, superseded or revoked."""
    active_node: Mapped[str | None] = mapped_column(String(16), unique=True)
    active_partition: Mapped[int | None] = mapped_column(unique=True)
    progress: Mapped[dict[str, Any]]


class Handover(Base):
    """A checkpoint that a node left for the next one. `slot` is its partition for as long as it is the one to go on from."""

    __tablename__ = "handovers"

    id: Mapped[int] = mapped_column(primary_key=True)
    slot: Mapped[int | None] = mapped_column(ForeignKey("partitions.id"), unique=True)
    sha256: Mapped[str] = mapped_column(String(64))
    size: Mapped[int]
    step: Mapped[int]
    lease_id: Mapped[str] = mapped_column(ForeignKey("leases.id"))
    node_id: Mapped[str] = mapped_column(ForeignKey("nodes.id"), index=True)
    spoiled: Mapped[bool]
    """Whether a shard that was made from it was judged bad: its node leaves no other one."""


class Inheritance(Base):
    """From which checkpoint a lease went on."""

    __tablename__ = "inheritances"

    lease_id: Mapped[str] = mapped_column(ForeignKey("leases.id"), primary_key=True)
    handover: Mapped[int] = mapped_column(ForeignKey("handovers.id"))


class Shard(Base):
    """A committed shard and its verdict. While it is pending or accepted, `slot` is its partition: the unique
    constraint is what allows one such shard a partition, and so what makes acceptance happen once.
    """

    __tablename__ = "shards"
    __table_args__ = (UniqueConstraint("partition", "sha256"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    partition: Mapped[int] = mapped_column(ForeignKey("partitions.id"))
    slot: Mapped[int | None] = mapped_column(unique=True)
    sha256: Mapped[str] = mapped_column(String(64))
    size: Mapped[int]
    lease_id: Mapped[str] = mapped_column(ForeignKey("leases.id"))
    node_id: Mapped[str] = mapped_column(ForeignKey("nodes.id"))
    manifest: Mapped[bytes] = mapped_column(LargeBinary)
    signature: Mapped[bytes] = mapped_column(LargeBinary)
    verdict: Mapped[str] = mapped_column(String(16))
    """pending, accepted or rejected."""
    judged: Mapped[bool]
    """Whether the verdict is about the shard; False when it could not be validated and may be handed in again."""
    reasons: Mapped[list[str]]
    attempts: Mapped[int]
    loss: Mapped[float | None]
    shared_loss: Mapped[float | None]
    received_at: Mapped[float]
    decided_at: Mapped[float | None]


class Evaluation(Base):
    """How good the assembled model was after so many experts."""

    __tablename__ = "evaluations"
    __table_args__ = (UniqueConstraint("experts", "final"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    experts: Mapped[int]
    final: Mapped[bool]
    row: Mapped[dict[str, Any]]
    evaluated_at: Mapped[float]
