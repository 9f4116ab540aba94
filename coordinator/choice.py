"""Which partition a node is given: an open one, else a backup of one whose holder would keep everybody waiting."""

from __future__ import annotations

from collections.abc import Sequence
import math
from statistics import median
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from coordinator.records import TRAINING
from coordinator.tables import Lease, Partition, Shard

#: Rejections of one node's shards of one partition after which another node must train it: training is deterministic,
#: so a third copy of the same shard would tell nothing new.
MAX_REJECTIONS = 3
#: So many times what an expert took is too long, whatever its node says of its progress.
OVERDUE = 3.0


def choose(session: Session, node_id: str, preferred: Sequence[int]) -> int | None:
    """An open partition for this node: a preferred one, then one that it has had no shard rejected of, then by number."""
    rejections = _rejections(session, node_id)
    free = session.scalars(select(Partition.id).where(Partition.state == "open"))
    allowed = [partition for partition in free if rejections.get(partition, 0) < MAX_REJECTIONS]
    return min(allowed, default=None, key=lambda partition: (
        partition not in preferred, rejections.get(partition, 0), partition))  # fmt: skip


def behind(session: Session, now: float) -> list[int]:
    """The partitions that a node which begins now would probably finish before their holder does, the latest of them first.

    A holder is behind when the rest takes it longer, at the pace that its heartbeats tell, than a usual expert takes; or when it
    has had the lease for `OVERDUE` times as long. The usual expert is the median of those that were accepted and of those that
    are on their way, at their pace: the first to be accepted are the fastest, and a node that begins now is not.
    """
    took = select(Shard.received_at - Lease.granted_at).join(Lease, Lease.id == Shard.lease_id)
    # An expert that was adopted took no time that is known.
    times = session.scalars(took.where(Shard.verdict == "accepted", Shard.received_at > Lease.granted_at)).all()
    if not times:
        return []
    rows = session.execute(select(Lease.partition, Lease.active_partition, Lease.granted_at, Lease.progress)
                           .join(Partition, Partition.id == Lease.partition)
                           .where(Lease.ended.is_(None), Partition.state == "leased")).all()  # fmt: skip
    on_their_way = [_whole(row.progress, now - row.granted_at) for row in rows]
    usual = median([*times, *(seconds for seconds in on_their_way if seconds is not None)])
    backed_up = {row.partition for row in rows if row.active_partition is None}
    late = {row.partition: _remaining(row.progress, now - row.granted_at, usual) for row in rows}
    return sorted((partition for partition in late.keys() - backed_up if late[partition] > usual),
                  key=lambda partition: (-late[partition], partition))  # fmt: skip


def first_for(session: Session, node_id: str, partitions: Sequence[int]) -> int | None:
    """The first of these partitions that this node may train."""
    rejections = _rejections(session, node_id)
    return next((partition for partition in partitions if rejections.get(partition, 0) < MAX_REJECTIONS), None)


def may_train(session: Session, node_id: str, partition: int) -> bool:
    """Whether this node has not had too many shards of this partition rejected."""
    return _rejections(session, node_id).get(partition, 0) < MAX_REJECTIONS


def _rejections(session: Session, node_id: str) -> dict[int, int]:
    """How many shards of which partitions this node has had rejected."""
    rejected = select(Lease.partition, func.count()).where(Lease.node_id == node_id, Lease.ended == "rejected")
    return {partition: times for partition, times in session.execute(rejected.group_by(Lease.partition))}


def _whole(progress: dict[str, Any], elapsed: float) -> float | None:
    """Seconds that an expert takes in all at the pace that its node reports; None before it has one."""
    step, steps = progress.get("step", 0), progress.get("steps", 0)
    if progress.get("activity") not in (TRAINING, "paused") or not 0 < step <= steps:
        return None
    return float(elapsed * steps / step)


def _remaining(progress: dict[str, Any], elapsed: float, usual: float) -> float:
    """Seconds until a node is done at the pace that it reports; for ever when it has had far too long."""
    if elapsed > OVERDUE * usual:
        return math.inf
    whole = _whole(progress, elapsed)
    return elapsed if whole is None else whole - elapsed  # It has not begun, as far as anybody knows.
