"""How fast files of a run may travel: a token bucket around chunks."""

from __future__ import annotations

from collections.abc import Callable
import time

#: Longest sleep between two signs of life, so that a watchdog does not take a slow line for a dead one.
_SLICE_SECONDS = 1.0


class Throttle:
    """A bucket that fills with `rate` bytes a second and holds one second's worth; a chunk may leave it in debt.

    Args:
        rate: bytes a second; None does not limit.
        clock: seconds.
        sleep: pauses for that many seconds.
    """

    def __init__(self, rate: int | None = None, clock: Callable[[], float] = time.monotonic,
                 sleep: Callable[[float], None] = time.sleep) -> None:  # fmt: skip
        self._rate, self._clock, self._sleep = rate, clock, sleep
        self._held, self._filled = 0.0, clock()

    def chunk(self, largest: int) -> int:
        """Bytes to send at a time, at most `largest`: no more than one second's worth, so that a slow line flows evenly."""
        return largest if self._rate is None else max(1, min(largest, self._rate))

    def take(self, size: int, alive: Callable[[], None] = lambda: None) -> None:
        """Wait until `size` bytes may travel; `alive` is called at least every second."""
        if self._rate is None:
            return
        self._fill()
        self._held -= size
        while self._held < 0:
            alive()
            self._sleep(min(-self._held / self._rate, _SLICE_SECONDS))
            self._fill()
        alive()

    def _fill(self) -> None:
        assert self._rate is not None
        now = self._clock()
        self._held = min(self._held + (now - self._filled) * self._rate, float(self._rate))
        self._filled = now
