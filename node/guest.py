"""Whether the node may work now: the owner's rules, and what the owner has said since (pause, resume, finish)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
import threading
import time

from node.rules import Hold, Rules, Senses

#: Seconds for which an answer of the rules holds: looking costs some milliseconds.
RULE_SECONDS = 2.0


class Guest:
    """Asked by the agent before and during its work, told by the owner; safe to use from several threads.

    Args:
        rules: when the node may work.
        senses: what is known of the owner.
        now: the local time.
    """

    def __init__(self, rules: Rules, senses: Senses, now: Callable[[], datetime] = datetime.now) -> None:
        self._rules, self._senses, self._now = rules, senses, now
        self._pause: Hold | None = None
        self._rule: Hold | None = None
        self._looked = float("-inf")
        self._said = threading.Event()
        #: Whether the owner asked to hand the current expert in and leave.
        self.leaving = False
        #: Whether that expert is to be handed over as it is.
        self.hurrying = False

    def hold(self) -> Hold | None:
        """Why the node has to stand still; None when it may work."""
        if self.hurrying:
            return Hold(reason="its owner wants it to leave", goes_on="never", until=None)
        pause = self._pause
        if pause is not None and (pause.until is None or self._now() < pause.until):
            return pause
        if time.monotonic() - self._looked >= RULE_SECONDS:
            self._looked = time.monotonic()
            self._rule = self._rules.hold(self._now(), self._senses)
        return self._rule

    def pause(self, seconds: float | None) -> None:
        """Stand still for a while, or until `resume`."""
        until = None if seconds is None else self._now() + timedelta(seconds=seconds)
        goes_on = "with `forge-node resume`"
        if until is not None:
            day = "" if until.date() == self._now().date() else f" on {until:%Y-%m-%d}"
            goes_on = f"at {until:%H:%M}{day}, or {goes_on}"
        self._pause = Hold(reason="paused by its owner", goes_on=goes_on, until=until)
        self._said.set()

    def resume(self) -> None:
        """Take a pause back; the rules stay."""
        self._pause = None
        self._said.set()

    def finish(self, now: bool = False) -> None:
        """Hand the current expert in, or over at its next checkpoint, then leave; a pause would never let that happen."""
        self.leaving, self.hurrying = True, self.hurrying or now
        self.resume()

    def wait(self, seconds: float) -> None:
        """Sleep, or less when the owner says something."""
        end = time.monotonic() + seconds
        # In slices: on Windows Ctrl-C does not end a wait for an event.
        while (left := end - time.monotonic()) > 0 and not self._said.wait(min(left, 1.0)):
            pass
        self._said.clear()
