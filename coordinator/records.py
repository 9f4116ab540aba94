"""Plain values that leave the state: what a caller may keep after the transaction has ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

#: What a node does while its progress is in steps of training; in other activities it is in bytes.
TRAINING = "training"

Verdict = Literal["pending", "accepted", "rejected"]
PartitionState = Literal["open", "leased", "uploaded", "accepted"]


@dataclass(frozen=True, kw_only=True)
class NodeRecord:
    """A machine that joined."""

    id: str
    name: str
    public_key: bytes
    machine: dict[str, Any]
    seen_at: float
    accepted: int = 0
    rejected: int = 0
    invitation: str = ""
    """Id of the one it came with."""
    revoked: bool = False


@dataclass(frozen=True, kw_only=True)
class InvitationRecord:
    """An invitation without its secret; `state` is valid, used up, expired or revoked."""

    id: str
    name: str
    uses: int
    used: int
    state: str
    expires_at: float


@dataclass(frozen=True, kw_only=True)
class LeaseRecord:
    """A node's claim on a partition; `ended` is None while it is active."""

    id: str
    partition: int
    node_id: str
    expires_at: float
    ended: str | None
    fresh: bool = False
    """Whether it was granted just now."""
    backup: bool = False
    """Whether another node holds the partition, and is slower than this one will be, as far as anybody can tell."""


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """An unfinished expert: `size` in bytes, `step` the next one of its training."""

    sha256: str
    size: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """The verdict on a shard, and why."""

    sha256: str
    partition: int
    verdict: Verdict
    reasons: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()
    """sha256 of the checkpoints that its node has to hand in before the verdict (coordinator/audits.py)."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """A committed shard with who made it."""

    id: int
    partition: int
    sha256: str
    size: int
    node_id: str
    node_name: str
    attempts: int
    manifest: bytes
    signature: bytes
    public_key: bytes
    received_at: float = 0.0
    """When it was committed, in seconds since the epoch."""
    loss: float | None = None
    shared_loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class LocalExpert:
    """An expert of the assembled model that was trained on this machine; losses in nats a token, as its validation found them."""

    partition: int
    sha256: str
    size: int
    manifest: bytes
    loss: float | None
    shared_loss: float | None
    made_at: float
    """Seconds since the epoch."""


@dataclass(frozen=True, kw_only=True)
class PartitionRecord:
    """A partition as a status page shows it."""

    id: int
    state: PartitionState
    tokens: int
    shared_loss: float | None
    loss: float | None
    node_name: str
    node_id: str = ""
    decided_at: float | None = None
    """When its shard was accepted, in seconds since the epoch."""
    progress: dict[str, Any] = field(default_factory=dict)
    last_rejection: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many partitions are in which state, and when the next lease would expire (seconds from now)."""

    open: int = 0
    leased: int = 0
    uploaded: int = 0
    accepted: int = 0
    next_expiry: float | None = None

    @property
    def total(self) -> int:
        """All partitions."""
        return self.open + self.leased + self.uploaded + self.accepted

    @property
    def complete(self) -> bool:
        """Whether every partition is accepted."""
        return self.total > 0 and self.accepted == self.total
