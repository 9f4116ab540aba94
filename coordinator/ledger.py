"""What the coordinator remembers without judging it: evaluations, and views of nodes, partitions and shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import func, select

from coordinator.guests import Guests, node_record
from coordinator.records import NodeRecord, PartitionRecord, PartitionState, ShardRecord
from coordinator.tables import Admission, Evaluation, Lease, Node, Partition, Revocation, Shard

Point = TypeVar("Point")


class Ledger(Guests):
    """The part of the state without transitions. Every method is one transaction and may be called from any thread."""

    def next_pending(self) -> ShardRecord | None:
        """The oldest shard that waits for its verdict."""
        with self._database.reading() as session:
            pending = select(Shard, Node).join(Node, Node.id == Shard.node_id).where(Shard.verdict == "pending")
            row = session.execute(pending.order_by(Shard.received_at, Shard.id).limit(1)).one_or_none()
            return None if row is None else _record(*row)

    def pending_shards(self, lease_id: str | None = None) -> list[ShardRecord]:
        """Every shard that waits for its verdict, the oldest first, or the one of a lease."""
        with self._database.reading() as session:
            pending = select(Shard, Node).join(Node, Node.id == Shard.node_id).where(Shard.verdict == "pending")
            if lease_id is not None:
                pending = pending.where(Shard.lease_id == lease_id)
            return [_record(*row) for row in session.execute(pending.order_by(Shard.received_at, Shard.id))]

    def accepted_shards(self) -> list[ShardRecord]:
        """The accepted shards, in the order of their acceptance."""
        with self._database.reading() as session:
            accepted = select(Shard, Node).join(Node, Node.id == Shard.node_id).where(Shard.verdict == "accepted")
            return [_record(*row) for row in session.execute(accepted.order_by(Shard.decided_at, Shard.id))]

    def uses(self, sha256: str) -> bool:
        """Whether a shard with these bytes is accepted, waits for its verdict, or may be handed in again."""
        with self._database.reading() as session:
            wanted = (Shard.verdict != "rejected") | Shard.judged.is_(False)
            needed = select(Shard.id).where(Shard.sha256 == sha256, wanted).limit(1)
            return session.scalars(needed).first() is not None

    def record_evaluation(self, experts: int, row: dict[str, Any], *, final: bool = False) -> None:
        """Keep an evaluation of the assembled model with so many experts; a second one replaces the first."""
        with self._database.transaction() as session:
            same = select(Evaluation).where(Evaluation.experts == experts, Evaluation.final.is_(final))
            held = session.scalars(same).one_or_none()
            if held is None:
                session.add(Evaluation(experts=experts, final=final, row=row, evaluated_at=self._clock()))
            else:
                held.row, held.evaluated_at = row, self._clock()

    def evaluated(self, experts: int, *, final: bool = False) -> bool:
        """Whether the assembled model with so many experts has been evaluated."""
        with self._database.reading() as session:
            same = select(Evaluation.id).where(Evaluation.experts == experts, Evaluation.final.is_(final))
            return session.scalar(same) is not None

    def evaluation_stamp(self) -> tuple[int, float]:
        """Changes whenever an evaluation is recorded: how many there are, and when the newest was."""
        with self._database.reading() as session:
            number, newest = session.execute(select(func.count(), func.max(Evaluation.evaluated_at))).one()
            return int(number), float(newest or 0.0)

    def read_evaluations(self, read: Callable[[int, bool, float, dict[str, Any]], Point]) -> list[Point]:
        """What `read` makes of the experts, whether it is the final one, the time (seconds since the epoch) and the row
        of every evaluation, by number of experts. Rows are large: only one is in memory at a time.
        """
        with self._database.reading() as session:
            columns = select(Evaluation.experts, Evaluation.final, Evaluation.evaluated_at, Evaluation.row)
            rows = session.execute(columns.order_by(Evaluation.experts, Evaluation.final).execution_options(yield_per=1))
            return [read(*row) for row in rows]

    def evaluations(self) -> list[dict[str, Any]]:
        """All evaluations by number of experts, each with `experts` and `final` in it."""
        with self._database.reading() as session:
            rows = session.scalars(select(Evaluation).order_by(Evaluation.experts, Evaluation.final))
            return [{**row.row, "experts": row.experts, "final": row.final} for row in rows]

    def partitions(self) -> list[PartitionRecord]:
        """Every partition with who works or worked on it."""
        with self._database.reading() as session:
            columns = select(Shard.slot, Shard.node_id, Shard.loss, Shard.decided_at).where(Shard.slot.is_not(None))
            shards = {shard.slot: shard for shard in session.execute(columns)}
            held = select(Lease.active_partition, Lease.node_id, Lease.progress).where(Lease.active_partition.is_not(None))
            leases = {lease.active_partition: lease for lease in session.execute(held)}
            workers = select(Shard.node_id).where(Shard.slot.is_not(None)).union(
                select(Lease.node_id).where(Lease.active_partition.is_not(None)))  # fmt: skip
            names = {node_id: name for node_id, name in session.execute(
                select(Node.id, Node.name).where(Node.id.in_(workers)))}  # fmt: skip
            return [_view(row, shards.get(row.id), leases.get(row.id), names)
                    for row in session.execute(select(*Partition.__table__.columns).order_by(Partition.id))]  # fmt: skip

    def lease_ends(self) -> dict[str, int]:
        """How many leases ended in which way."""
        with self._database.reading() as session:
            ended = select(Lease.ended, func.count()).where(Lease.ended.is_not(None)).group_by(Lease.ended)
            return {str(how): number for how, number in session.execute(ended)}

    def count_nodes(self) -> int:
        """How many nodes ever joined."""
        with self._database.reading() as session:
            return session.scalar(select(func.count()).select_from(Node)) or 0

    def nodes(self, newest: int | None = None) -> list[NodeRecord]:
        """Every node with how many of its shards were accepted and rejected, or those heard of last."""
        with self._database.reading() as session:
            order = Node.joined_at if newest is None else Node.seen_at.desc()
            listed = select(Node).order_by(order, Node.id).limit(newest)
            # The others are not even looked at; and not by a list of ids: each length would be a statement that SQLite keeps.
            ids = listed.with_only_columns(Node.id)
            good = select(Shard.node_id, func.count()).where(Shard.verdict == "accepted", Shard.node_id.in_(ids))
            bad = select(Lease.node_id, func.count()).where(Lease.ended == "rejected", Lease.node_id.in_(ids))
            accepted = {node_id: shards for node_id, shards in session.execute(good.group_by(Shard.node_id))}
            rejected = {node_id: shards for node_id, shards in session.execute(bad.group_by(Lease.node_id))}
            admissions = select(Admission.node_id, Admission.invitation).where(Admission.node_id.in_(ids))
            came = {node_id: invitation for node_id, invitation in session.execute(admissions)}
            revoked = set(session.scalars(select(Revocation.node_id).where(Revocation.node_id.in_(ids))))
            return [node_record(node, accepted=accepted.get(node.id, 0), rejected=rejected.get(node.id, 0),
                                invitation=came.get(node.id, ""), revoked=node.id in revoked)
                    for node in session.scalars(listed)]  # fmt: skip


def _record(shard: Shard, node: Node) -> ShardRecord:
    return ShardRecord(
        id=shard.id, partition=shard.partition, sha256=shard.sha256, size=shard.size, node_id=node.id,
        node_name=node.name, attempts=shard.attempts, manifest=shard.manifest, signature=shard.signature,
        public_key=node.public_key, received_at=shard.received_at, loss=shard.loss, shared_loss=shard.shared_loss)  # fmt: skip


def _view(row: Any, shard: Any, lease: Any, names: dict[str, str]) -> PartitionRecord:
    claim = shard if shard is not None else lease
    node_id = "" if claim is None else str(claim.node_id)
    state: PartitionState = row.state
    return PartitionRecord(
        id=row.id, state=state, tokens=row.tokens, shared_loss=row.shared_loss,
        loss=None if shard is None else shard.loss, decided_at=None if shard is None else shard.decided_at,
        last_rejection=tuple(row.last_rejection), node_id=node_id, node_name=names.get(node_id, ""),
        progress={} if lease is None else lease.progress)  # fmt: skip
