"""What a node and a coordinator say to each other, as plain values.

Only `node/client.py` knows how these travel; the rest of the node sees nothing but these classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A file of the run, named by the sha256 (hex) of its content; `size` in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run is and how far it got. `config_json` is the resolved config."""

    run_id: str
    name: str
    config_fingerprint: str
    config_json: str
    phase: str


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The coordinator's answer to joining."""

    node_id: str
    run: RunSummary


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A lease on one partition, and the files that its expert is trained from.

    `heartbeat_seconds` is how often the coordinator wants to hear of it.
    """

    lease_id: str
    partition: int
    partition_tokens: int
    shared: Blob
    shared_ffn: Blob
    train_tokens: Blob
    heartbeat_seconds: float
    checkpoint: Blob | None = None
    """Where another node left off."""

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """Everything to download, smallest reuse last."""
        return (self.shared, self.shared_ffn, self.train_tokens)


@dataclass(frozen=True, kw_only=True)
class Wait:
    """There is no work at this moment; ask again in `retry_seconds`."""

    reason: str
    retry_seconds: float


@dataclass(frozen=True, kw_only=True)
class Done:
    """Nothing is left to do in this run."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the work on a lease is. `activity` is downloading, training, uploading or paused, or empty while nothing is known;
    the owner alone is shown `starting to train`. Sizes in bytes.
    """

    activity: str
    step: int = 0
    steps: int = 0
    loss: float = 0.0
    tokens_per_second: float = 0.0
    resident_bytes: int = 0


class Order(Enum):
    """What the coordinator wants done with the lease, told in answer to a heartbeat."""

    CONTINUE = "continue"
    FINISH = "finish"
    ABANDON = "abandon"


class Verdict(Enum):
    """What became of a shard."""

    PENDING = "pending"
    ACCEPTED = "accepted"
    REJECTED = "rejected"


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """The coordinator's word on one shard."""

    sha256: str
    partition: int
    verdict: Verdict
    reasons: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()
    """sha256 of the checkpoints of this training that the coordinator wants to see."""
