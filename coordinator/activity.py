"""What the coordinator does right now, for people and for waiting nodes. In memory: files and database say the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
import threading
import time
from typing import Any

#: What each phase does, to be read after "the coordinator is".
SENTENCES = {
    "prepare": "preparing the data",
    "shared": "training the shared components",
    "partition": "partitioning the corpus",
    "router": "fitting the router",
    "publish": "publishing the run",
    "experts": "taking experts",
    "evaluate": "evaluating the assembled model",
    "done": "done",
}
#: Seconds after which a node asks again while nobody can say how long the phase takes.
UNKNOWN_WAIT_SECONDS = 3.0
#: Bounds, in seconds, of the pause that a waiting node is told.
SHORTEST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 15.0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The activity at one moment; `remaining` is in seconds, None while it cannot be told."""

    phase: str = "prepare"
    message: str = ""
    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    resident_bytes: int = 0
    predicted_bytes: int = 0
    remaining: float | None = None

    @property
    def sentence(self) -> str:
        """Such as `training the shared components: step 120 of 400, about 3 min`."""
        parts = [f"step {self.step:,} of {self.steps:,}"] if self.steps else []
        if self.remaining is not None:
            parts.append(f"about {duration(self.remaining)}")
        if self.message:
            parts.append(self.message)
        what = SENTENCES.get(self.phase, self.phase)
        return f"{what}: {', '.join(parts)}" if parts else what

    @property
    def retry_seconds(self) -> float:
        """When it is worth asking again: an eighth of what remains, within bounds."""
        if self.remaining is None:
            return UNKNOWN_WAIT_SECONDS
        return min(max(self.remaining / 8, SHORTEST_WAIT_SECONDS), LONGEST_WAIT_SECONDS)


class Activity:
    """The current snapshot, written by the worker threads and read by the handlers.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._now = Snapshot()
        self._first: tuple[float, int] | None = None

    def snapshot(self) -> Snapshot:
        """What happens now."""
        with self._lock:
            return self._now

    def enter(self, phase: str, predicted_bytes: int = 0) -> None:
        """A new phase begins; its job is predicted to need so much memory, where it has one."""
        with self._lock:
            self._now, self._first = Snapshot(phase=phase, predicted_bytes=predicted_bytes), None

    def say(self, message: str, predicted_bytes: int = 0) -> None:
        """Set the words that follow the phase, and the memory that the job that they are about needs; empty words clear both."""
        with self._lock:
            self._now, self._first = Snapshot(phase=self._now.phase, message=message, predicted_bytes=predicted_bytes), None

    def progress(self, event: dict[str, Any]) -> None:
        """Take over a job's progress event."""
        step, steps = int(event.get("step") or 0), int(event.get("steps") or 0)
        with self._lock:
            if self._first is None or step < self._first[1] or steps != self._now.steps:
                self._first = (self._clock(), step)
            since, done = self._clock() - self._first[0], step - self._first[1]
            planned = (event.get("plan") or {}).get("peak_bytes")
            remaining = since / done * (steps - step) if done > 0 and steps else None
            self._now = replace(
                self._now, step=step, steps=steps, loss=event.get("loss"), remaining=remaining,
                tokens_per_second=event.get("tokens_per_second"), message=event.get("message") or self._now.message,
                resident_bytes=int(event.get("resident_bytes") or 0),
                predicted_bytes=planned or self._now.predicted_bytes)  # fmt: skip


def duration(seconds: float) -> str:
    """Seconds in words: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
