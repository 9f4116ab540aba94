"""Requests and answers as plain values: what the handlers see of the wire."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.records import NodeRecord, PartitionRecord, Receipt
from coordinator.state import Order


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine a node runs on, as the node measured it."""

    hostname: str = ""
    platform: str = ""
    cores: int = 0
    memory_bytes: int = 0
    ram_limit_bytes: int = 0
    device: str = ""
    version: str = ""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a piece of work is."""

    step: int = 0
    steps: int = 0
    loss: float = 0.0
    tokens_per_second: float = 0.0
    resident_bytes: int = 0
    activity: str = ""


@dataclass(frozen=True, kw_only=True)
class JoinRequest:
    """A node introduces itself."""

    protocol_version: int
    public_key: bytes
    name: str
    machine: Machine = field(default_factory=Machine)
    proven_key: bytes
    """The key that the proof in the headers was made with."""
    secret: bytes | None = field(default=None, repr=False)
    """Of its invitation."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run is, and how far it got."""

    run_id: str
    name: str
    config_fingerprint: str
    config_json: str
    phase: str


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The node's id and credential."""

    node_id: str
    credential: str
    run: RunSummary


@dataclass(frozen=True, kw_only=True)
class LeaseRequest:
    """A node asks for work."""

    machine: Machine = field(default_factory=Machine)
    preferred_partitions: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Nothing yet: what is waited for, and when to ask again."""

    reason: str
    retry_seconds: float


@dataclass(frozen=True, kw_only=True)
class Done:
    """Nothing is left to do in this run."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A file of the run."""

    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Train one expert on one partition."""

    lease_id: str
    partition: int
    partition_tokens: int
    shared: Blob
    shared_ffn: Blob
    train_tokens: Blob
    heartbeat_seconds: float
    checkpoint: Blob | None = None


@dataclass(frozen=True, kw_only=True)
class HeartbeatRequest:
    """A node is alive and this far."""

    lease_id: str
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True, kw_only=True)
class HeartbeatAnswer:
    """What the node should do, and why."""

    order: Order
    reason: str


@dataclass(frozen=True, kw_only=True)
class OpenUploadRequest:
    """A node announces a shard, or a checkpoint."""

    lease_id: str
    sha256: str
    size: int
    checkpoint: bool = False


@dataclass(frozen=True, kw_only=True)
class UploadOpened:
    """The offset to go on from; the receipt when there is nothing to send."""

    offset: int
    receipt: Receipt | None = None


@dataclass(frozen=True, kw_only=True)
class CommitRequest:
    """A node hands an uploaded shard in."""

    lease_id: str
    sha256: str
    manifest: bytes
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class Status:
    """The whole state of the run at one moment."""

    run: RunSummary
    activity: str
    progress: Progress
    partitions: tuple[PartitionRecord, ...]
    nodes: tuple[NodeRecord, ...]
    idle_seconds: tuple[float, ...]
    evaluations: tuple[tuple[int, float, float], ...]
    """Experts, mean perplexity, pooled perplexity."""
