"""What the coordinator knows, and the state machine of a partition: the one place where its transitions happen.

States: `open`, `leased`, `uploaded` (a shard waits for its verdict), `accepted` (final). Each rule is one transaction;
asking twice gives the same answer.

    G  grant    open     -> leased     to a node without an active lease; a node with one gets that one again, renewed
    B  back up  leased   -> leased     nothing is open, and the holder will take longer than a node that begins now: the node
                                       gets a second lease on the partition, and the first sound shard counts
    H  renew    leased   -> leased     a heartbeat moves the expiry
    V  revive   open     -> leased     a heartbeat of an expired lease whose partition nobody took
    E  expire   leased   -> open       no heartbeat until the expiry; applied before every rule that looks at leases
                leased   -> leased     the same, while a backup lease is active: it takes the other's place
    R  release  as E                   the node gives the lease back, and may leave a checkpoint (see coordinator/handovers.py)
    C  commit   leased   -> uploaded   a complete, signed shard of the node that holds or held a lease
                open     -> uploaded   the same, late: the lease had expired or was released
    A  accept   uploaded -> accepted   the shard was judged good; other leases on the partition end (superseded)
    L  adopt    any      -> accepted   the expert was trained and judged on this machine (see coordinator/adoption.py)
    J  reject   uploaded -> open       the shard was judged bad, with reasons
                uploaded -> leased     the same, while another node holds an active lease on the partition
    X  revoke   as E                   the node was revoked, and nobody goes on from what it left
                uploaded -> open       the same, while its shard waits (leased, while another node holds a lease)
    D  drop     accepted -> open       the node was revoked and its accepted shards are not wanted any more

A late shard (C from a lease that another node has meanwhile) is welcome unless a shard of the partition is pending or
accepted; the other lease stays active until A. A shard handed in while another one is pending is answered `pending`
without a transition, so that its node asks again and learns what became of the other one. A node whose shards of one
partition were judged bad `MAX_REJECTIONS` times is not given that partition again, nor is another shard of it taken from
that node under a lease that it had before; and a lease whose shard was judged bad takes no other one. Unique constraints
(coordinator/tables.py) hold the database to it: one active lease a node, one a partition besides its backup, one pending or
accepted shard a partition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import math
from pathlib import Path
import time
from typing import Any, Literal
import uuid

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from coordinator import handovers
from coordinator.choice import behind, choose, first_for, may_train
from coordinator.database import Database
from coordinator.handovers import Handovers
from coordinator.records import CheckpointRecord, Counts, LeaseRecord, LocalExpert, Receipt, Verdict
from coordinator.tables import Evaluation, Lease, Node, Partition, Revocation, Shard
from forge.errors import ProtocolError

#: Heartbeats in the life of a lease: three may be lost.
BEATS = 4
#: Who the experts are credited to that this machine trained itself. It has no key, so it never calls.
LOCAL_NODE, LOCAL_NAME = "local", "this machine"

ELSEWHERE = "another node's shard of this partition was accepted first"
SENT_AWAY = "its node was revoked"
IN_FRONT = "another shard of this partition is being validated first"

Order = Literal["continue", "abandon"]


class State(Handovers):
    """The coordinator's memory. Every method is one transaction and may be called from any thread.

    Args:
        location: SQLite file, SQLAlchemy URL, or a database that is open.
        lease_seconds: how long a lease lives without a heartbeat.
        clock: seconds since the epoch.

    Raises:
        StorageError: from every method, when the database cannot be used.
    """

    def __init__(self, location: Path | str | Database, *, lease_seconds: float, clock: Callable[[], float] = time.time) -> None:
        super().__init__(location, clock)
        self._lease_seconds = lease_seconds
        self._nobody_behind_until = self._none_expires_until = 0.0

    # --- partitions and leases --------------------------------------------------------------------------------------

    def open_partitions(self, facts: Iterable[dict[str, Any]]) -> None:
        """Create the partitions of a published run that are not there yet.

        Args:
            facts: dicts with `partition`, `tokens` and, where it was measured, `shared_loss`.
        """
        with self._database.transaction() as session:
            for fact in facts:
                if session.get(Partition, fact["partition"]) is None:
                    session.add(Partition(id=fact["partition"], state="open", tokens=fact["tokens"],
                                          shared_loss=fact.get("shared_loss"), last_rejection=[]))  # fmt: skip

    # --- leases -----------------------------------------------------------------------------------------------------

    def grant(self, node_id: str, preferred: Sequence[int] = ()) -> LeaseRecord | None:
        """Rules G and B. None when nothing is open for this node and nothing needs a backup.

        Preferred partitions come first, then those that this node has had no shard rejected of, then by number.
        """
        now = self._clock()
        with self._database.transaction() as session:
            self._expire(session, now)
            lease = session.scalars(select(Lease).where(Lease.active_node == node_id)).one_or_none()
            fresh = lease is None
            if lease is None:
                chosen = choose(session, node_id, preferred)
                alone = chosen is not None
                if chosen is None:
                    chosen = self._straggler(session, node_id, now)
                if chosen is None:
                    return None
                if alone:
                    _partition(session, chosen).state = "leased"
                lease = Lease(id=uuid.uuid4().hex, partition=chosen, node_id=node_id, granted_at=now, ended=None, progress={},
                              expires_at=now, active_node=node_id, active_partition=chosen if alone else None)  # fmt: skip
                session.add(lease)
                handovers.inherit(session, lease)
            lease.expires_at = now + self._lease_seconds
            return _lease(lease, fresh=fresh)

    def lease(self, lease_id: str, node_id: str) -> LeaseRecord:
        """The lease of that id; `ProtocolError` when there is none, or it is another node's."""
        with self._database.reading() as session:
            return _lease(_own(session, lease_id, node_id))

    def heartbeat(self, lease_id: str, node_id: str, progress: dict[str, Any]) -> tuple[Order, str]:
        """Rules H and V: keep a lease and note its progress; what the node should do, and why."""
        now = self._clock()
        with self._database.transaction(durable=False) as session:  # A coordinator that starts renews every lease.
            self._expire(session, now)
            lease = session.get(Lease, lease_id)
            if lease is None or lease.node_id != node_id:
                return "abandon", "this run has no such lease"
            if lease.ended == "expired":
                self._revive(session, lease)
            if lease.ended == "committed" and _partition(session, lease.partition).state == "uploaded":
                return "continue", "the shard waits for its verdict"
            if lease.ended is not None:
                return "abandon", _why_ended(session, lease)
            lease.expires_at = now + self._lease_seconds
            lease.progress = progress
            return "continue", ""

    def release(self, lease_id: str, node_id: str, checkpoint: CheckpointRecord | None = None) -> bool:
        """Rule R; whether the next holder goes on from the checkpoint."""
        with self._database.transaction() as session:
            lease = session.get(Lease, lease_id)
            if lease is None or lease.node_id != node_id or lease.ended is not None:
                return False
            _end(session, lease, "released")
            return checkpoint is not None and handovers.leave(session, lease, checkpoint)

    def extend_leases(self) -> None:
        """Renew every active lease: for the time in which no coordinator was there to hear heartbeats."""
        with self._database.transaction() as session:
            for lease in session.scalars(select(Lease).where(Lease.ended.is_(None))):
                lease.expires_at = max(lease.expires_at, self._clock() + self._lease_seconds)

    # --- shards -----------------------------------------------------------------------------------------------------

    def receipt(self, lease_id: str, node_id: str, sha256: str) -> Receipt | None:
        """What is known of a shard: its verdict, or that another one was accepted; None when it may be handed in.

        Raises:
            ProtocolError: it may not: the lease is unknown or another node's, or too much of it was judged bad.
        """
        with self._database.transaction() as session:
            return self._receipt(session, _own(session, lease_id, node_id), sha256)

    def submit(self, lease_id: str, node_id: str, *, sha256: str, size: int, manifest: bytes,
               signature: bytes) -> Receipt:  # fmt: skip
        """Rule C: hand in a complete shard whose signature was checked.

        Raises:
            ProtocolError: as of `receipt`.
        """
        with self._database.transaction() as session:
            lease = _own(session, lease_id, node_id)
            known = self._receipt(session, lease, sha256)
            if known is not None:
                return known
            if session.scalar(select(Shard.id).where(Shard.slot == lease.partition)) is not None:
                _end(session, lease, "committed")
                return Receipt(sha256=sha256, partition=lease.partition, verdict="pending", reasons=(IN_FRONT,))
            shard = _shard(session, lease.partition, sha256)
            if shard is None:
                shard = Shard(partition=lease.partition, sha256=sha256)
                session.add(shard)
            shard.slot, shard.size, shard.lease_id, shard.node_id = lease.partition, size, lease_id, node_id
            shard.manifest, shard.signature, shard.verdict, shard.judged = manifest, signature, "pending", False
            shard.reasons, shard.attempts, shard.received_at = [], 0, self._clock()
            _partition(session, lease.partition).state = "uploaded"
            _end(session, lease, "committed")
            return _receipt(shard)

    def count_attempt(self, shard_id: int) -> int:
        """Note that validation of a shard ended without a verdict; how often that has happened."""
        with self._database.transaction() as session:
            shard = session.get_one(Shard, shard_id)
            shard.attempts += 1
            return shard.attempts

    def accept(self, shard_id: int, *, loss: float | None, shared_loss: float | None) -> bool:
        """Rule A. Whether the shard is accepted now: False when it had been rejected before."""
        with self._database.transaction() as session:
            shard = session.get_one(Shard, shard_id)
            if shard.verdict != "pending":
                return shard.verdict == "accepted"
            shard.verdict, shard.judged, shard.decided_at = "accepted", True, self._clock()
            shard.loss, shard.shared_loss = loss, shared_loss
            _settle(session, shard.partition)
            return True

    def adopt(self, expert: LocalExpert) -> bool:
        """Rule L. False when this very expert was in the run before, and so was dropped from it."""
        with self._database.transaction() as session:
            if _shard(session, expert.partition, expert.sha256) is not None:
                return False
            at = expert.made_at
            if session.get(Node, LOCAL_NODE) is None:
                session.add(Node(id=LOCAL_NODE, public_key=b"", name=LOCAL_NAME, machine={}, joined_at=at, seen_at=at))
            held = session.scalars(select(Shard).where(Shard.slot == expert.partition)).one_or_none()
            if held is not None:
                self._refuse(session, held, [ELSEWHERE], judged=False)
            lease = Lease(id=uuid.uuid4().hex, partition=expert.partition, node_id=LOCAL_NODE, granted_at=at, expires_at=at,
                          ended="committed", progress={})  # fmt: skip
            session.add(lease)
            session.flush()
            session.add(Shard(
                partition=expert.partition, slot=expert.partition, sha256=expert.sha256, size=expert.size, lease_id=lease.id,
                node_id=LOCAL_NODE, manifest=expert.manifest, signature=b"", verdict="accepted", judged=True, reasons=[],
                attempts=0, loss=expert.loss, shared_loss=expert.shared_loss, received_at=at, decided_at=at))  # fmt: skip
            _settle(session, expert.partition)
            return True

    def reject(self, shard_id: int, reasons: Sequence[str], *, judged: bool = True, again: bool = False) -> None:
        """Rule J. The same shard may be handed in again with `judged=False` (not its fault) and `again` (its node's, not its)."""
        with self._database.transaction() as session:
            shard = session.get_one(Shard, shard_id)
            if shard.verdict != "pending":
                return
            self._refuse(session, shard, reasons, judged=judged)
            shard.judged = judged and not again

    def counts(self) -> Counts:
        """How many partitions are in which state."""
        now = self._clock()
        with self._database.transaction(durable=False) as session:
            self._expire(session, now)
            held = {state: n for state, n in session.execute(
                select(Partition.state, func.count()).group_by(Partition.state)).all()}  # fmt: skip
            expiry = session.scalar(select(func.min(Lease.expires_at)).where(Lease.ended.is_(None)))
            return Counts(**held, next_expiry=None if expiry is None else max(0.0, expiry - now))

    def revoke(self, node_id: str, *, drop_shards: bool = False) -> list[int]:
        """Rules X and, with `drop_shards`, D: a node may not come back; the partitions that are open again by D.

        The same bytes may be handed in again by another node: what was wrong is who made them. Evaluations of models
        that held a dropped shard go with it.
        """
        with self._database.transaction() as session:
            if session.get(Revocation, node_id) is None:
                session.add(Revocation(node_id=node_id, revoked_at=self._clock()))
            accepted = session.scalars(select(Shard).where(Shard.verdict == "accepted").order_by(Shard.decided_at, Shard.id))
            order = [(shard.id, shard.node_id) for shard in accepted]
            dropped = []
            for shard in session.scalars(select(Shard).where(Shard.node_id == node_id, Shard.slot.is_not(None))).all():
                if shard.verdict == "accepted":
                    if not drop_shards:
                        continue
                    dropped.append(shard.partition)
                self._refuse(session, shard, [SENT_AWAY], judged=False)
            for lease in session.scalars(select(Lease).where(Lease.active_node == node_id)).all():
                _end(session, lease, "revoked")
            handovers.disown(session, node_id)
            if dropped:
                # The n-th accepted shard is in every model of n experts and more.
                first = next(n for n, (_, owner) in enumerate(order, start=1) if owner == node_id)
                session.execute(delete(Evaluation).where(Evaluation.experts >= first))
            return sorted(dropped)

    # --- steps of the rules -----------------------------------------------------------------------------------------

    def _expire(self, session: Session, now: float) -> None:
        """Rule E. An expiry only ever moves on, so that nobody has to look before the first of them is due."""
        if now <= self._none_expires_until:
            return
        overdue = select(Lease).where(Lease.ended.is_(None), Lease.expires_at < now)
        for lease in session.scalars(overdue).all():
            _end(session, lease, "expired")
        first = session.scalar(select(func.min(Lease.expires_at)).where(Lease.ended.is_(None)))
        self._none_expires_until = min(now + self._lease_seconds, math.inf if first is None else first)

    def _refuse(self, session: Session, shard: Shard, reasons: Sequence[str], *, judged: bool) -> None:
        shard.verdict, shard.judged, shard.decided_at = "rejected", judged, self._clock()
        shard.slot, shard.reasons = None, list(reasons)
        partition = _partition(session, shard.partition)
        partition.last_rejection = list(reasons)
        active = session.scalar(select(Lease.id).where(Lease.active_partition == shard.partition))
        partition.state = "open" if active is None else "leased"
        _end(session, session.get_one(Lease, shard.lease_id), _blame(session, shard.lease_id) if judged else "undecided")

    def _revive(self, session: Session, lease: Lease) -> None:
        """Rule V, where it applies."""
        partition = _partition(session, lease.partition)
        busy = session.scalar(select(Lease.id).where(Lease.active_node == lease.node_id))
        if partition.state == "open" and busy is None:
            partition.state, lease.ended = "leased", None
            lease.active_node, lease.active_partition = lease.node_id, lease.partition

    def _straggler(self, session: Session, node_id: str, now: float) -> int | None:
        if now < self._nobody_behind_until:  # Every node that waits asks, and heartbeats come once in that time.
            return None
        late = behind(session, now)
        if not late:
            self._nobody_behind_until = now + self._lease_seconds / BEATS
        return first_for(session, node_id, late)

    def _receipt(self, session: Session, lease: Lease, sha256: str) -> Receipt | None:
        shard = _shard(session, lease.partition, sha256)
        judged_bad = lease.ended in ("rejected", "misled")
        if shard is not None and judged_bad:
            why = tuple(shard.reasons) or (ELSEWHERE,)
            return Receipt(sha256=sha256, partition=lease.partition, verdict="rejected", reasons=why)
        if shard is not None and (shard.verdict != "rejected" or shard.judged):
            # The same bytes again, perhaps from another node (training is deterministic): so is the verdict.
            _end(session, lease, "committed" if shard.verdict != "rejected" else _blame(session, lease.id))
            return _receipt(shard)
        if _partition(session, lease.partition).state == "accepted":
            return Receipt(sha256=sha256, partition=lease.partition, verdict="rejected", reasons=(ELSEWHERE,))
        if judged_bad or not may_train(session, lease.node_id, lease.partition):
            raise ProtocolError("What this node handed in of this partition was rejected, and another shard of it is not taken "
                                "under this lease: ask for a new one.")  # fmt: skip
        return None


def _own(session: Session, lease_id: str, node_id: str) -> Lease:
    lease = session.get(Lease, lease_id)
    if lease is None or lease.node_id != node_id:
        raise ProtocolError("This run has no such lease of this node: ask for a new one.")
    return lease


def _settle(session: Session, partition: int) -> None:
    """A partition has its expert."""
    _partition(session, partition).state = "accepted"
    handovers.end(session, partition)
    for lease in session.scalars(_active(partition)).all():
        _end(session, lease, "superseded")


def _end(session: Session, lease: Lease, how: str) -> None:
    """End a lease; its partition is open again if the lease was what held it. Ended leases keep their first end,
    except that what happened to the shard is the stronger word.
    """
    active, first = lease.ended is None, lease.active_partition is not None
    if not active and how not in ("committed", "rejected", "misled", "undecided"):
        return
    lease.ended, lease.active_node, lease.active_partition = how, None, None
    if not first:
        return
    session.flush()  # Its place is free before another one takes it.
    partition, backup = _partition(session, lease.partition), session.scalars(_active(lease.partition)).first()
    if backup is not None and partition.state != "accepted":
        backup.active_partition = lease.partition
    elif partition.state == "leased":
        partition.state = "open"


def _blame(session: Session, lease_id: str) -> str:
    """How a lease ends whose shard was judged bad: by the fault of its node, or of the checkpoint that it went on from."""
    return "misled" if handovers.spoil(session, lease_id) else "rejected"


def _active(partition: int) -> Any:
    """The leases on a partition that have not ended: one, and perhaps its backup."""
    return select(Lease).where(Lease.partition == partition, Lease.ended.is_(None))


def _why_ended(session: Session, lease: Lease) -> str:
    if lease.ended in ("rejected", "misled", "undecided"):
        return "its shard was rejected: " + "; ".join(_partition(session, lease.partition).last_rejection)
    if lease.ended == "committed":
        return "its shard has its verdict"
    if lease.ended == "released":
        return "the lease was given back"
    if _partition(session, lease.partition).state == "accepted":
        return ELSEWHERE
    return "the lease expired and its partition was given to another node"


def _partition(session: Session, partition: int) -> Partition:
    return session.get_one(Partition, partition)


def _shard(session: Session, partition: int, sha256: str) -> Shard | None:
    same = select(Shard).where(Shard.partition == partition, Shard.sha256 == sha256)
    return session.scalars(same).one_or_none()


def _lease(lease: Lease, *, fresh: bool = False) -> LeaseRecord:
    return LeaseRecord(id=lease.id, partition=lease.partition, node_id=lease.node_id, expires_at=lease.expires_at,
                       ended=lease.ended, fresh=fresh, backup=lease.ended is None and lease.active_partition is None)  # fmt: skip


def _receipt(shard: Shard) -> Receipt:
    verdict: Verdict = shard.verdict  # type: ignore[assignment]
    return Receipt(sha256=shard.sha256, partition=shard.partition, verdict=verdict, reasons=tuple(shard.reasons))
