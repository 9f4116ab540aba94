"""How long a run still takes, as far as anybody can tell, and the reasoning in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import heapq
import statistics

from coordinator.activity import Snapshot, duration
from coordinator.records import TRAINING, PartitionRecord
from forge.config import RunConfig
from forge.vocabulary import STAGES

#: Tokens a second below which a reported pace is no pace: what a node says is not to be trusted with a division.
SLOWEST = 1e-2
#: What comes after the stages of the coordinator, in words.
_AFTERWARDS = "after that come {}, whose time is known when nodes train"


@dataclass(frozen=True)
class Estimate:
    """How long still: `seconds` is None while it cannot be told; `until` names what is over then."""

    seconds: float | None
    until: str
    because: str


def estimate(now: Snapshot, config: RunConfig, partitions: Sequence[PartitionRecord],
             evaluation_seconds: float | None = None) -> Estimate:  # fmt: skip
    """How long until the phase, or with experts in training the last expert, is finished.

    Args:
        now: what the coordinator does.
        config: the run's config.
        partitions: every partition with who works on it.
        evaluation_seconds: how long the newest evaluation took; None before there was one.
    """
    if now.phase == "done":
        return Estimate(0.0, "the end", "Every expert has arrived and the model is evaluated: nothing is left to do.")
    if now.phase == "experts":
        return _experts(config, partitions, evaluation_seconds)
    return _stage(now, config, partitions)


def _stage(now: Snapshot, config: RunConfig, partitions: Sequence[PartitionRecord]) -> Estimate:
    until = "the end of this phase"
    if now.remaining is None:
        pace = "This phase does not say how far it is yet"
    else:
        speed = f" at {now.tokens_per_second:,.0f} tokens/s" if now.tokens_per_second else ""
        pace = f"Step {now.step:,} of {now.steps:,}{speed}: {duration(now.remaining)} at this pace"
    if now.phase in STAGES:
        rest = list(STAGES[STAGES.index(now.phase) + 1 :])
        experts = f"{', '.join(rest)} and {_count(config.model.n_experts, 'expert')}" if rest else "the experts"
        pace += "; " + _AFTERWARDS.format(experts)
    elif any(partition.state != "accepted" for partition in partitions) or not partitions:
        pace += "; " + _AFTERWARDS.format("the experts")
    return Estimate(now.remaining, until, pace + ".")


def _experts(config: RunConfig, partitions: Sequence[PartitionRecord], evaluation: float | None) -> Estimate:
    states = [partition.state for partition in partitions]
    waiting, pending = states.count("open"), states.count("uploaded")
    leased = [partition for partition in partitions if partition.state == "leased"]
    known = [left for partition in leased if (left := _seconds_left(partition, config)) is not None]
    words = [f"{states.count('accepted')} of {_count(len(states), 'expert')} {_are(states.count('accepted'))} accepted"]
    if pending:
        words.append(f"{_count(pending, 'shard')} {_are(pending)} in validation or {'waits' if pending == 1 else 'wait'} for it")
    if leased:
        words.append(_in_training(leased, known))
    if waiting:
        words.append(f"{_count(waiting, 'expert')} {_are(waiting)} open" + (
            ", and a node takes the next one as soon as it is free" if leased else
            " and no node is at work, so the time cannot be told"))  # fmt: skip
    training = _training_seconds(leased, known, waiting, config)
    seconds = None
    if training is not None and evaluation is not None:
        words.append(f"evaluating the model takes {duration(evaluation)} after each, validation comes on top")
        # Evaluations are made one after another, while other experts are still in training.
        seconds = max(training, (len(leased) + waiting + pending - 1) * evaluation) + evaluation
    elif training:
        words.append("validation and evaluation come on top")
        seconds = training
    return Estimate(seconds, "the last expert", "; ".join(words) + ".")


def _training_seconds(leased: Sequence[PartitionRecord], known: Sequence[float], waiting: int,
                      config: RunConfig) -> float | None:  # fmt: skip
    """Until every expert is trained, by the nodes at work now; None while that cannot be told."""
    each = _seconds_each(leased, config)
    if (leased or waiting) and not known or (waiting and each is None):
        return None
    return _makespan(known, each or 0.0, waiting)


def _in_training(leased: Sequence[PartitionRecord], known: Sequence[float]) -> str:
    what = f"{_count(len(leased), 'expert')} {_are(len(leased))} with {_count(len(leased), 'node')}"
    if not known:
        return f"{what} without a pace yet"
    silent = len(leased) - len(known)
    unknown = f", {silent} of them without a pace yet" if silent else ""
    return f"{what}{unknown}, the slowest with {duration(max(known))} to go at its pace"


def _seconds_left(partition: PartitionRecord, config: RunConfig) -> float | None:
    """Of a training node's own expert, from the pace that it reported; None before that."""
    progress = partition.progress
    speed, steps = float(progress.get("tokens_per_second") or 0.0), int(progress.get("steps") or 0)
    if progress.get("activity") == "uploading":
        return 0.0
    if progress.get("activity") != TRAINING or speed < SLOWEST or not steps:
        return None
    return max(0, steps - int(progress["step"])) * config.step_tokens("expert") / speed


def _seconds_each(leased: Sequence[PartitionRecord], config: RunConfig) -> float | None:
    """A whole expert at the median pace of the nodes at work; None before one reported a pace."""
    speeds = [float(partition.progress.get("tokens_per_second") or 0.0) for partition in leased]
    speeds = [speed for speed in speeds if speed >= SLOWEST]
    return config.steps("expert") * config.step_tokens("expert") / statistics.median(speeds) if speeds else None


def _makespan(free_in: Sequence[float], each: float, waiting: int) -> float:
    """Seconds until all is done when every node takes the next open expert as soon as it is free."""
    free = list(free_in)
    heapq.heapify(free)
    for _ in range(waiting if free else 0):
        heapq.heappush(free, heapq.heappop(free) + each)
    return max(free, default=0.0)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"
