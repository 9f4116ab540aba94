"""Churn on paper: simulated nodes on the real lease state machine, with a clock that jumps from event to event.

Nothing here knows a rule of the protocol: every lease, expiry, backup, late shard and verdict is what `State` makes of the calls.
The nodes are made up: speeds are log-normal, some are stragglers, and each leaves after a random time (exponential, so that a
share `churn` of them is gone after the time in which a usual node trains one expert), in one of four ways.

    crash    gone without a word; another machine joins later
    sleep    the lid is closed; it goes on from its checkpoint when it is opened again
    offline  the line is gone; it trains on, and hands in late
    leave    the owner stops it: its checkpoint goes to the next node with the lease; another machine joins later
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
import heapq
import itertools
import math
import random
from statistics import fmean

from coordinator.database import Scratch
from coordinator.records import TRAINING, CheckpointRecord, LeaseRecord
from coordinator.state import State

#: The spread of speeds (standard deviation of their logarithm), and how much slower a straggler is.
SPREAD, SLOWER = 0.4, 10.0
#: Heartbeats of a lease that are simulated in its life: real nodes send four, of which three may be lost.
BEATS = 1.25
#: Steps of an expert, as heartbeats report them.
STEPS = 1000
WAYS = ("crash", "sleep", "offline", "leave")
#: What is counted: leases that expired, backups that were granted, shards that came late and were welcome all the same, shards
#: that came when another one was there, checkpoints that went to the next node, shards that were rejected, and how nodes went.
COUNTED = ("expired", "backups", "late", "turned_away", "handed_over", "rejected", *WAYS)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is simulated; times in hours."""

    nodes: int
    experts: int
    churn: float
    seed: int = 0
    expert_hours: float = 4.0
    """In which a usual node trains one expert."""
    lease_hours: float = 0.5
    away_hours: float = 2.0
    """Mean time for which a node sleeps or is offline, and until another one joins for one that left."""
    verdict_hours: float = 1 / 60
    """The coordinator's time for one shard; one at a time."""
    stragglers: float = 0.05
    rejections: float = 0.02


@dataclass(frozen=True)
class _Checkpoint:
    """How much of an expert is trained, in 0..1, and the node-hours that went into it."""

    done: float = 0.0
    hours: float = 0.0


@dataclass(eq=False)
class _Node:
    """A machine. While it is `busy` it trains on from the checkpoint of its lease, since `since`."""

    id: str
    speed: float
    lease: LeaseRecord | None = None
    since: float = 0.0
    online: bool = True
    busy: bool = False
    kept: dict[int, _Checkpoint] = field(default_factory=dict)
    """Checkpoints on its disk, by partition."""
    shift: int = 0
    """Counts its changes, so that an event that was planned before one is known to be stale."""


class Simulation:
    """One run from the first lease to the last accepted shard.

    Args:
        scenario: what is simulated.
    """

    def __init__(self, scenario: Scenario) -> None:
        self._of, self._random, self._now = scenario, random.Random(scenario.seed), 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._state = State(Scratch(), lease_seconds=scenario.lease_hours, clock=lambda: self._now)
        self._state.open_partitions([{"partition": k, "tokens": 1} for k in range(scenario.experts)])
        self._nodes: list[_Node] = []
        self._waiting: list[_Node] = []
        self._judging = self._looking = False
        self._names = itertools.count()
        self._counts: Counter[str] = Counter()
        self._accepted = 0
        self._trained = self._worth = 0.0  # node-hours: all, and those of which an accepted shard is made
        self._hours: dict[str, float] = {}  # of every shard
        self._left: dict[str, _Checkpoint] = {}

    def run(self) -> dict[str, float]:
        """Simulate; what came of it. Times in hours."""
        for _ in range(self._of.nodes):
            self._arrive()
        while self._events and self._accepted < self._of.experts:
            self._now, _, happen = heapq.heappop(self._events)
            happen()
        for node in self._nodes:
            self._pause(node)
        self._counts["expired"] = self._state.lease_ends().get("expired", 0) + self._counts["late"]
        accepted = self._state.counts().accepted
        self._state.close()
        ideal = self._ideal()
        return {"hours": self._now, "ideal_hours": ideal, "trained_node_hours": self._trained, "accepted": accepted,
                "wasted_node_hours": self._trained - self._worth, **{what: self._counts[what] for what in COUNTED}}  # fmt: skip

    # --- what happens to a node -------------------------------------------------------------------------------------

    def _arrive(self) -> None:
        node = _Node(f"{next(self._names):06d}", self._random.lognormvariate(0.0, SPREAD))
        if self._random.random() < self._of.stragglers:
            node.speed /= SLOWER
        self._nodes.append(node)
        self._state.register_node(node.id, node.id.encode(), node.id, {})
        self._plan_leaving(node)
        self._ask(node)

    def _ask(self, node: _Node) -> None:
        node.lease, node.busy = None, False
        lease = self._state.grant(node.id, sorted(node.kept))
        if lease is None:
            self._waiting.append(node)
            return self._look_at_expiry()
        self._counts["backups"] += lease.fresh and lease.backup
        self._train(node, lease)

    def _train(self, node: _Node, lease: LeaseRecord) -> None:
        node.lease, node.busy, node.since = lease, True, self._now
        shift = node.shift = node.shift + 1
        left = self._state.inherited(lease.id)
        begun = node.kept.setdefault(lease.partition, self._left[left.sha256] if left is not None else _Checkpoint())
        self._at((1.0 - begun.done) * self._of.expert_hours / node.speed, lambda: self._finish(node, shift))
        self._at(0.0, lambda: self._beat(node, shift))

    def _beat(self, node: _Node, shift: int) -> None:
        if shift != node.shift or not node.online or node.lease is None:
            return
        done = node.kept[node.lease.partition].done + (self._now - node.since) * node.speed / self._of.expert_hours
        progress = {"activity": TRAINING, "step": int(done * STEPS), "steps": STEPS}
        order, _ = self._state.heartbeat(node.lease.id, node.id, progress)
        if order == "abandon":
            self._pause(node)
            return self._ask(node)
        self._at(self._of.lease_hours / BEATS, lambda: self._beat(node, shift))

    def _finish(self, node: _Node, shift: int) -> None:
        if shift != node.shift or node.lease is None:
            return
        self._pause(node)
        node.kept[node.lease.partition] = _Checkpoint(1.0, node.kept[node.lease.partition].hours)
        if node.online:
            self._hand_in(node, node.lease)

    def _hand_in(self, node: _Node, lease: LeaseRecord) -> None:
        late = self._state.lease(lease.id, node.id).ended is not None
        sha256 = f"{next(self._names):064x}"
        self._hours[sha256] = node.kept.pop(lease.partition).hours
        receipt = self._state.submit(lease.id, node.id, sha256=sha256, size=1, manifest=b"{}", signature=b"")
        if receipt.reasons:  # Somebody's shard came first; that one may still be rejected, which is not simulated.
            self._counts["turned_away"] += 1
        else:
            self._counts["late"] += late
            self._judge_soon()
        self._ask(node)

    def _pause(self, node: _Node) -> None:
        """Stop training at a checkpoint."""
        if not node.busy or node.lease is None:
            return
        hours, before = self._now - node.since, node.kept[node.lease.partition]
        self._trained += hours
        node.kept[node.lease.partition] = _Checkpoint(
            min(1.0, before.done + hours * node.speed / self._of.expert_hours), before.hours + hours)
        node.busy, node.shift = False, node.shift + 1

    # --- leaving and coming back ------------------------------------------------------------------------------------

    def _plan_leaving(self, node: _Node) -> None:
        if self._of.churn > 0:
            self._at(self._random.expovariate(-math.log1p(-self._of.churn) / self._of.expert_hours), lambda: self._leave(node))

    def _leave(self, node: _Node) -> None:
        way = self._random.choice(WAYS)
        self._counts[way] += 1
        if node in self._waiting:
            self._waiting.remove(node)
        away = self._random.expovariate(1 / self._of.away_hours)
        node.online = False
        if way == "offline":
            return self._at(away, lambda: self._return(node))
        self._pause(node)
        if way == "sleep":
            return self._at(away, lambda: self._return(node))
        if way == "leave" and node.lease is not None:
            self._hand_over(node, node.lease)
            self._wake()
        self._at(away, self._arrive)

    def _hand_over(self, node: _Node, lease: LeaseRecord) -> None:
        checkpoint, sha256 = node.kept[lease.partition], f"{next(self._names):064x}"
        step = int(checkpoint.done * STEPS)
        self._left[sha256] = checkpoint
        left = CheckpointRecord(sha256=sha256, size=1, step=step) if 0 < step < STEPS else None
        self._counts["handed_over"] += self._state.release(lease.id, node.id, left)

    def _return(self, node: _Node) -> None:
        node.online = True
        self._plan_leaving(node)
        lease = node.lease
        if lease is None:
            return self._ask(node)
        if node.kept[lease.partition].done >= 1.0:  # Finished while nobody could be told.
            return self._hand_in(node, lease)
        if not node.busy:
            order, _ = self._state.heartbeat(lease.id, node.id, {})
            return self._train(node, lease) if order != "abandon" else self._ask(node)
        self._beat(node, node.shift)

    # --- the coordinator --------------------------------------------------------------------------------------------

    def _judge_soon(self) -> None:
        if not self._judging:
            self._judging = True
            self._at(self._of.verdict_hours, self._judge)

    def _judge(self) -> None:
        self._judging = False
        shard = self._state.next_pending()
        assert shard is not None
        if self._random.random() < self._of.rejections:
            self._counts["rejected"] += 1
            self._state.reject(shard.id, ["bad"])
        else:
            self._state.accept(shard.id, loss=None, shared_loss=None)
            self._accepted += 1
            self._worth += self._hours[shard.sha256]
        if self._state.next_pending() is not None:
            self._judge_soon()
        self._wake()

    def _wake(self) -> None:
        """Whoever waits asks again: something may be open, or need a backup."""
        waiting, self._waiting = self._waiting, []
        for position, node in enumerate(waiting):
            self._ask(node)
            if node.lease is None:  # Nor is there anything for the others.
                self._waiting += waiting[position + 1 :]
                break

    def _look_at_expiry(self) -> None:
        """Somebody waits: look again when the next lease expires."""
        if self._looking:
            return
        self._looking = True

        def look() -> None:
            self._looking = False
            self._wake()

        self._at(max(self._state.counts().next_expiry or 0.0, self._of.lease_hours / 4) + 1e-6, look)

    def _at(self, hours: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + hours, next(self._order), happen))

    def _ideal(self) -> float:
        """Hours in which the first nodes train everything if none leaves, nothing is rejected and each expert goes to who is
        done with it first.
        """
        free = [(self._of.expert_hours / node.speed, node.speed) for node in self._nodes[: self._of.nodes]]
        heapq.heapify(free)
        end = 0.0
        for _ in range(self._of.experts):
            end, speed = heapq.heappop(free)
            heapq.heappush(free, (end + self._of.expert_hours / speed, speed))
        return end


def table(base: Scenario, churns: Sequence[float], seeds: int) -> list[dict[str, float]]:
    """The mean over `seeds` runs, for every churn."""
    rows = []
    for churn in churns:
        runs = [Simulation(replace(base, churn=churn, seed=base.seed + number)).run() for number in range(seeds)]
        rows.append({"churn": churn, **{what: fmean(run[what] for run in runs) for what in runs[0]}})
    return rows


def describe(rows: Sequence[dict[str, float]]) -> str:
    """The table as Markdown."""
    lines = ["| churn | hours, ideal | hours | node-hours | of them wasted | leases expired | backups | late, welcome "
             "| turned away | handed over | rejected | accepted |", "|---" * 12 + "|"]  # fmt: skip
    for row in rows:
        share = row["wasted_node_hours"] / row["trained_node_hours"]
        cells = [f"{row['churn']:.1f}", f"{row['ideal_hours']:.1f}", f"{row['hours']:.1f}", f"{row['trained_node_hours']:.0f}",
                 f"{row['wasted_node_hours']:.0f} ({share:.0%})"]  # fmt: skip
        cells += [f"{row[what]:.0f}" for what in (*COUNTED[:6], "accepted")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
