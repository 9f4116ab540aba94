"""What a command shows while it works: a quiet live view on a terminal, plain lines everywhere else, or JSON lines.

The view is redrawn in place below the lines. It never hides the cursor, so that a process that is killed leaves the terminal as
it was, and in a window too small for it one line is left. Colours follow NO_COLOR (no-color.org), as rich does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
import json
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live

LogFormat = Literal["text", "json"]
#: Columns and rows below which the view is one line.
LEAST_COLUMNS, LEAST_ROWS = 40, 8
#: Columns of the bar, at most.
BAR_COLUMNS = 60


@dataclass(frozen=True, kw_only=True)
class View:
    """What happens at one moment. Fields that are empty take no room."""

    title: str
    """Whose work it is, and which phase it is in."""
    done: float = 0.0
    """Share of the phase that is done, from 0 to 1."""
    facts: tuple[str, ...] = ()
    """Steps, loss, speed, memory against the promise; the important ones first."""
    left: str = ""
    """How long still, and why."""
    waits_for: str = ""
    """What it waits for, as a sentence."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As many lines as the window has room for."""
        from rich.text import Text

        small = options.max_width < LEAST_COLUMNS or console.height < LEAST_ROWS
        facts = " · ".join(self.facts)
        if small:
            yield Text(f"{self.title} {self.done:.0%} {facts}".rstrip(), no_wrap=True, overflow="ellipsis")
            return
        yield Text(self.title, style="bold", no_wrap=True, overflow="ellipsis")
        if self.done:
            columns = min(BAR_COLUMNS, options.max_width)
            full = round(min(self.done, 1.0) * columns)
            yield Text.assemble(("━" * full, "green"), ("┄" * (columns - full), "dim"))
        for text, style in ((facts, ""), (self.left, "dim"), (self.waits_for, "yellow")):
            if text:
                yield Text(text, style=style)


class Output:
    """Prints lines, and shows a view where that is possible; safe to use from several threads.

    Args:
        stream: where to print; standard output when None.
        live: whether `stream` is a terminal that can redraw; found out when None.
        log_format: json prints one object a line instead of a text: `ts` (UTC, ISO 8601), `event`, and facts.
        stamp: what a plain line begins with.
    """

    def __init__(self, stream: TextIO | None = None, *, live: bool | None = None, log_format: LogFormat = "text",
                 stamp: Callable[[], str] = str) -> None:  # fmt: skip
        self._stream = stream if stream is not None else sys.stdout
        self._stamp, self._lock = stamp, threading.Lock()
        self.json = log_format == "json"
        self._live: Live | None = None
        able = self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        if (able if live is None else live) and not self.json:
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream, highlight=False, emoji=False)  # :a: is a part of an address.
            self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False,
                              vertical_overflow="crop")  # fmt: skip

    @property
    def live(self) -> bool:
        """Whether `show` shows something."""
        return self._live is not None

    def __call__(self, text: str) -> None:
        """Print one line."""
        self.line(text)

    def line(self, text: str, event: str = "line") -> None:
        """Print one line; in JSON it is the `text` of that event."""
        if self.json:
            self.record(event, text=text)
            return
        with self._lock:
            if self._live is not None:
                self._live.console.print(f"{self._stamp()}{text}", markup=False, soft_wrap=True)
            else:
                print(f"{self._stamp()}{text}", file=self._stream, flush=True)

    def record(self, event: str, **facts: Any) -> None:
        """Print one JSON object; nothing in the other formats."""
        if self.json:
            at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            with self._lock:
                print(json.dumps({"ts": at, "event": event, **facts}), file=self._stream, flush=True)

    def show(self, view: View) -> None:
        """Draw the view anew."""
        if self._live is not None:
            with self._lock:
                if not self._live.is_started:
                    self._live.start()
                    self._live.console.show_cursor(True)
                self._live.update(view, refresh=True)

    def calm(self) -> None:
        """Take the view away."""
        if self._live is not None:
            with self._lock:
                self._live.stop()


class Pace:
    """How long a phase still takes at the pace that it had since it was first seen.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._phase, self._first, self._since = "", 0, 0.0

    def left(self, phase: str, step: int, steps: int) -> float | None:
        """Seconds; None while that cannot be told."""
        if phase != self._phase or step < self._first:
            self._phase, self._first, self._since = phase, step, self._clock()
        took = self._clock() - self._since
        return (steps - step) * took / (step - self._first) if self._first < step < steps and took > 0 else None


def duration(seconds: float) -> str:
    """Seconds for people: `2 h 5 min`, `3 min 12 s`, `40 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
