"""What the owner sees: a live line on a terminal, a plain line every few seconds everywhere else. `status` shows the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
import sys
import threading
import time
from typing import TYPE_CHECKING, TextIO

from forge.train.memory import format_size
from node.messages import Progress

if TYPE_CHECKING:
    from rich.status import Status

#: Seconds between two progress lines where there is no terminal.
PLAIN_SECONDS = 5.0
#: Seconds after which the same sentence about a wait is printed again.
REPEAT_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Memory of the training process in bytes: what was predicted, what the owner allows."""

    predicted: int
    allowed: int


class Console:
    """Prints lines, waits and progress; safe to use from several threads.

    Args:
        stream: where to print; standard output when None.
        live: whether `stream` is a terminal; found out when None.
        clock: seconds, for throttling and the time left.

    Attributes:
        doing: the latest progress, and the memory that goes with it; None before the first and after `idle`.
        waits_for: what is waited for; empty while work goes on.
        sentence: the latest progress in words.
    """

    def __init__(self, stream: TextIO | None = None, *, live: bool | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._stream = stream if stream is not None else sys.stdout
        self._clock = clock
        self._lock = threading.Lock()
        self._said: dict[str, float] = {}
        self._last_progress = float("-inf")
        self._phase: tuple[str, int, float] = ("", 0, 0.0)  # title, first step seen, when
        self._status: Status | None = None
        self.doing: tuple[Progress, Budget | None] | None = None
        self.waits_for = self.sentence = self._held = ""
        if live if live is not None else self._stream.isatty():
            from rich.console import Console as RichConsole

            self._status = RichConsole(file=self._stream, highlight=False).status("")

    def line(self, text: str) -> None:
        """Print one line."""
        with self._lock:
            if self._status is not None:
                self._status.console.print(text, markup=False, soft_wrap=True)
            else:
                print(text, file=self._stream, flush=True)

    def wait(self, text: str) -> None:
        """Say what is waited for; the same sentence (numbers aside) is repeated every `REPEAT_SECONDS` at most."""
        key = "".join(c for c in text if not c.isdigit())
        now, self.waits_for = self._clock(), text
        if now - self._said.get(key, float("-inf")) >= REPEAT_SECONDS:
            self._said[key] = now
            self.line(text)

    def hold(self, text: str) -> None:
        """Say once why the node stands still, however long that takes; that is no wait for anybody else."""
        self.waits_for = ""
        if text != self._held:
            self._held = text
            self.calm()
            self.line(text)

    def idle(self) -> None:
        """Nothing is worked on any more."""
        self.doing, self.sentence, self.waits_for = None, "", ""

    def progress(self, title: str, progress: Progress, budget: Budget | None = None) -> None:
        """Show how far the work is; `title` says whose."""
        now = self._clock()
        self.doing, self.waits_for, self._held = (progress, budget), "", ""
        if self._phase[0] != f"{title} {progress.activity}":
            self._phase = (f"{title} {progress.activity}", progress.step, now)
            self._last_progress = float("-inf")
        self.sentence = text = self._describe(title, progress, budget, now)
        finished = progress.steps > 0 and progress.step >= progress.steps
        if self._status is None and not finished and now - self._last_progress < PLAIN_SECONDS:
            return
        self._last_progress = now
        if self._status is None:
            self.line(text)
        else:
            with self._lock:
                self._status.update(text.replace("[", r"\["))
                self._status.start()

    def calm(self) -> None:
        """Take the live line away."""
        if self._status is not None:
            with self._lock:
                self._status.stop()

    def _describe(self, title: str, progress: Progress, budget: Budget | None, now: float) -> str:
        if progress.activity != "training":
            share = progress.step / progress.steps if progress.steps else 0.0
            return (f"{title}: {progress.activity} {format_size(progress.step)} of {format_size(progress.steps)} "
                    f"({share:.0%})")  # fmt: skip
        parts = [f"{title}: training, step {progress.step}/{progress.steps}"]
        if progress.loss:
            parts.append(f"loss {progress.loss:.3f}")
        if progress.tokens_per_second:
            parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
        if budget is not None:
            parts.append(f"memory {format_size(progress.resident_bytes)} (predicted {format_size(budget.predicted)}, "
                         f"allowed {format_size(budget.allowed)})")  # fmt: skip
        _, first, since = self._phase
        if first < progress.step < progress.steps and now > since:
            pace = (now - since) / (progress.step - first)
            parts.append(f"{_duration((progress.steps - progress.step) * pace)} left")
        return " · ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
