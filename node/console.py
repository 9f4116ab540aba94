"""What the owner sees: a live view on a terminal, a plain line every few seconds everywhere else. `status` shows the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
import time
from typing import TextIO

from forge.live import LogFormat, Output, Pace, View, duration
from forge.train.memory import format_size
from node.messages import Progress

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
        log_format: lines of text or of JSON.
        clock: seconds, for throttling and the time left.

    Attributes:
        doing: the latest progress, and the memory that goes with it; None before the first and after `idle`.
        waits_for: what is waited for; empty while work goes on.
        sentence: the latest progress in words.
    """

    def __init__(self, stream: TextIO | None = None, *, live: bool | None = None, log_format: LogFormat = "text",
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._out = Output(stream, live=live, log_format=log_format)
        self._clock, self._pace = clock, Pace(clock)
        self._said: dict[str, float] = {}
        self._last_progress, self._phase = float("-inf"), ""
        self.doing: tuple[Progress, Budget | None] | None = None
        self.waits_for = self.sentence = self._held = ""

    def line(self, text: str) -> None:
        """Print one line."""
        self._out.line(text)

    def wait(self, text: str) -> None:
        """Say what is waited for; the same sentence (numbers aside) is repeated every `REPEAT_SECONDS` at most."""
        key = "".join(c for c in text if not c.isdigit())
        now, self.waits_for = self._clock(), text
        if now - self._said.get(key, float("-inf")) >= REPEAT_SECONDS:
            self._said[key] = now
            self._out.line(text, "wait")
        self._out.show(View(title="standing by", waits_for=text))

    def hold(self, text: str) -> None:
        """Say once why the node stands still, however long that takes; that is no wait for anybody else."""
        self.waits_for = ""
        if text != self._held:
            self._held = text
            self.calm()
            self._out.line(text, "hold")

    def idle(self) -> None:
        """Nothing is worked on any more."""
        self.doing, self.sentence, self.waits_for = None, "", ""

    def progress(self, title: str, progress: Progress, budget: Budget | None = None) -> None:
        """Show how far the work is; `title` says whose."""
        now = self._clock()
        self.doing, self.waits_for, self._held = (progress, budget), "", ""
        phase = f"{title}: {progress.activity}"
        if self._phase != phase:
            self._phase, self._last_progress = phase, float("-inf")
        left = self._pace.left(phase, progress.step, progress.steps)
        share, facts = _facts(progress, budget)
        self.sentence = " · ".join([f"{phase}{share}", *facts, *([] if left is None else [f"{duration(left)} left"])])
        self._out.show(View(title=phase, done=progress.step / progress.steps if progress.steps else 0.0,
                            facts=tuple([share.strip(", "), *facts]), left=_reason(left, progress)))  # fmt: skip
        finished = progress.steps > 0 and progress.step >= progress.steps
        if self._out.live or (not finished and now - self._last_progress < PLAIN_SECONDS):
            return
        self._last_progress = now
        if self._out.json:
            self._out.record("progress", title=title, **asdict(progress), remaining_seconds=left,
                             predicted_bytes=budget and budget.predicted, allowed_bytes=budget and budget.allowed)  # fmt: skip
        else:
            self.line(self.sentence)

    def calm(self) -> None:
        """Take the live view away."""
        self._out.calm()


def _facts(progress: Progress, budget: Budget | None) -> tuple[str, list[str]]:
    """How far it is, and what else is known."""
    if progress.activity != "training":
        if not progress.steps:
            return "", []
        share = progress.step / progress.steps
        return f" {format_size(progress.step)} of {format_size(progress.steps)} ({share:.0%})", []
    facts = []
    if progress.loss:
        facts.append(f"loss {progress.loss:.3f}")
    if progress.tokens_per_second:
        facts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if budget is not None:
        facts.append(f"memory {format_size(progress.resident_bytes)} (predicted {format_size(budget.predicted)}, "
                     f"allowed {format_size(budget.allowed)})")  # fmt: skip
    return f", step {progress.step}/{progress.steps}", facts


def _reason(left: float | None, progress: Progress) -> str:
    if left is None:
        return ""
    what = f"{progress.steps - progress.step:,} steps" if progress.activity == "training" else format_size(
        progress.steps - progress.step)  # fmt: skip
    return f"{duration(left)} left: {what} to go at this pace"
