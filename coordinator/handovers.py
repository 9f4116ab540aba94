"""Which checkpoint the next holder of a partition goes on from, and what becomes of who left a bad one.

A checkpoint is bound to the lease under which it was made, and so to the run, the partition and the node. It takes the place of
an earlier one of its partition only if it is further. When a shard that was made from it is judged bad, nobody goes on from it
any more, the one who did is not blamed, and the node that left it may leave no other one: one identity spoils one lease.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from coordinator.ledger import Ledger
from coordinator.records import CheckpointRecord
from coordinator.tables import Handover, Inheritance, Lease, Shard


class Handovers(Ledger):
    """What is known of checkpoints that were left. Every method is one transaction and may be called from any thread."""

    def may_hand_over(self, node_id: str) -> bool:
        """Whether nothing bad came of what this node left before."""
        with self._database.reading() as session:
            bad = select(Handover.id).where(Handover.node_id == node_id, Handover.spoiled).limit(1)
            return session.scalar(bad) is None

    def inherited(self, lease_id: str) -> CheckpointRecord | None:
        """The checkpoint that a lease goes on from."""
        with self._database.reading() as session:
            left = select(Handover).join(Inheritance, Inheritance.handover == Handover.id)
            found = session.scalars(left.where(Inheritance.lease_id == lease_id)).one_or_none()
            if found is None or found.slot is None:
                return None
            return CheckpointRecord(sha256=found.sha256, size=found.size, step=found.step)

    def checkpoint_size(self, sha256: str) -> int | None:
        """Bytes of a checkpoint that nodes may fetch; None when it is none."""
        with self._database.reading() as session:
            return session.scalar(select(Handover.size).where(Handover.sha256 == sha256, Handover.slot.is_not(None)).limit(1))

    def needs(self, sha256: str) -> bool:
        """Whether a blob is a shard that counts or may be handed in again, or a checkpoint that somebody goes on from."""
        return self.uses(sha256) or self.checkpoint_size(sha256) is not None

    def stale_checkpoints(self) -> list[str]:
        """sha256 of every checkpoint that nobody goes on from any more, and that is no shard either."""
        with self._database.reading() as session:
            needed = select(Handover.sha256).where(Handover.slot.is_not(None)).union(select(Shard.sha256))
            return list(session.scalars(select(Handover.sha256).where(Handover.sha256.not_in(needed)).distinct()))


def leave(session: Session, lease: Lease, checkpoint: CheckpointRecord) -> bool:
    """Have the next holder go on from a checkpoint; False when one that is as far is there already."""
    held = _current(session, lease.partition)
    if held is not None and held.step >= checkpoint.step:
        return False
    end(session, lease.partition)
    session.add(Handover(slot=lease.partition, sha256=checkpoint.sha256, size=checkpoint.size, step=checkpoint.step,
                         lease_id=lease.id, node_id=lease.node_id, spoiled=False))  # fmt: skip
    return True


def inherit(session: Session, lease: Lease) -> None:
    """Have a new lease go on from what was left for its partition."""
    held = _current(session, lease.partition)
    if held is not None:
        session.flush()
        session.add(Inheritance(lease_id=lease.id, handover=held.id))


def spoil(session: Session, lease_id: str) -> bool:
    """Note that a shard of this lease was judged bad; whether it went on from another node's checkpoint."""
    left = select(Handover).join(Inheritance, Inheritance.handover == Handover.id).where(Inheritance.lease_id == lease_id)
    found = session.scalars(left).one_or_none()
    if found is None:
        return False
    found.slot, found.spoiled = None, True
    return True


def disown(session: Session, node_id: str) -> None:
    """Nobody goes on from what this node left any more."""
    for left in session.scalars(select(Handover).where(Handover.node_id == node_id, Handover.slot.is_not(None))):
        left.slot = None


def end(session: Session, partition: int) -> None:
    """Nobody goes on from what was left for a partition any more."""
    held = _current(session, partition)
    if held is not None:
        held.slot = None
        session.flush()


def _current(session: Session, partition: int) -> Handover | None:
    return session.scalars(select(Handover).where(Handover.slot == partition)).one_or_none()
