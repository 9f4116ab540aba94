"""How much one node may ask for: calls in a second and at one time, and bytes on their way. Leases are bounded in the state.

The numbers are far above what a node of ours does. A node that meets one is told when to come again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
import threading
import time

from forge.errors import ProtocolError


class QuotaError(ProtocolError):
    """A node asks for too much at once.

    Args:
        message: the sentence.
        retry_seconds: when the same call may be made again.
    """

    def __init__(self, message: str, retry_seconds: float) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one node may have."""

    calls_per_second: float = 50.0
    """In the long run. A node that trains makes a call every few seconds, one that waits or transfers a few a second."""
    burst: float = 500.0
    """Calls that may come at once after a quiet time."""
    calls: int = 8
    """Answered at one time: each holds one of the server's threads, also while its message is waited for. A node of ours makes
    two, and for half a minute as many again, after its connection broke in silence."""
    joins: int = 64
    """Answered at one time of all nodes that are not known yet and come with one invitation: they may start all at once."""
    bytes_in_flight: int = 1 << 30
    """Of all transfers that run at one time; a single one may be larger. A node of ours has one, and for half a minute
    a second one, after its connection broke in silence."""
    own_transfers: int = 4
    """That run at one time."""
    transfers: int = 128
    """That run at one time, of all nodes together: each holds one of the server's threads."""
    retry_seconds: float = 5.0
    """When a call or a transfer that was too much at one time may be tried again."""


class Quotas:
    """What every node has left. In memory: a coordinator that starts anew begins with full buckets.

    Args:
        limits: of each node.
        clock: monotonic seconds.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}  # calls left, and when that was counted; who is not in it has all
        self._looked_at = clock()
        self._answered: Counter[str] = Counter()
        self._flying: dict[str, tuple[int, int]] = {}  # transfers and their bytes
        self._transfers = 0

    def call(self, node_id: str) -> None:
        """Count a call of a node that is known (a stranger would fill the memory with names).

        Raises:
            QuotaError: there were too many.
        """
        limits, now = self._limits, self._clock()
        with self._lock:
            left, then = self._buckets.get(node_id, (limits.burst, now))
            left = min(limits.burst, left + (now - then) * limits.calls_per_second)
            self._buckets[node_id] = (left - 1 if left >= 1 else left, now)
            self._forget_full(now)
        if left < 1:
            raise QuotaError(f"This node makes more than {limits.calls_per_second:,.0f} calls a second.",
                             max(1.0, (1 - left) / limits.calls_per_second))  # fmt: skip

    def _forget_full(self, now: float) -> None:
        """Nodes come and go for weeks: who has been quiet for so long that the bucket is full again needs none."""
        full = self._limits.burst / self._limits.calls_per_second
        if now - self._looked_at > full:
            self._looked_at = now
            self._buckets = {node: held for node, held in self._buckets.items() if now - held[1] < full}

    @contextmanager
    def answering(self, who: str, joins: bool = False) -> Iterator[None]:
        """Count a call while it is answered.

        Args:
            who: the node, or the invitation that it joins with.
            joins: whether it is the invitation.

        Raises:
            QuotaError: too many others are answered.
        """
        most = self._limits.joins if joins else self._limits.calls
        with self._lock:
            if self._answered[who] >= most:
                raise QuotaError(f"This {'invitation' if joins else 'node'} has {most} calls that are not answered yet.",
                                 self._limits.retry_seconds)  # fmt: skip
            self._answered[who] += 1
        try:
            yield
        finally:
            with self._lock:
                self._answered[who] -= 1
                if not self._answered[who]:
                    del self._answered[who]

    @contextmanager
    def transfer(self, node_id: str, size: int) -> Iterator[None]:
        """Count the bytes of a transfer while it runs.

        Raises:
            QuotaError: other transfers of the node run, and with this one it would be too much; or too many run of all nodes.
        """
        with self._lock:
            if self._transfers >= self._limits.transfers:
                raise QuotaError(f"The coordinator is busy with {self._transfers} transfers.", self._limits.retry_seconds)
            number, flying = self._flying.get(node_id, (0, 0))
            if number >= self._limits.own_transfers:
                raise QuotaError(f"This node has {number} transfers under way.", self._limits.retry_seconds)
            if flying and flying + size > self._limits.bytes_in_flight:
                raise QuotaError(f"This node has {flying:,} bytes on their way, and {size:,} more are over the limit of "
                                 f"{self._limits.bytes_in_flight:,}.", self._limits.retry_seconds)  # fmt: skip
            self._flying[node_id] = (number + 1, flying + size)
            self._transfers += 1
        try:
            yield
        finally:
            with self._lock:
                self._transfers -= 1
                number, flying = self._flying.pop(node_id)
                if number > 1:
                    self._flying[node_id] = (number - 1, flying - size)
