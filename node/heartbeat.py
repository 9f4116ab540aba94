"""The pulse of a lease: a thread that reports progress while the main thread downloads, trains or uploads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
import threading

from forge.errors import ForgeError, NetworkError, ProtocolError, RunMismatchError
from node.client import FleetClient
from node.messages import Order, Progress

#: Seconds between two heartbeats when a coordinator names none.
DEFAULT_SECONDS = 30.0


class Heartbeats:
    """Sends a heartbeat at once and then every `seconds`, until the block ends.

    `order` is the coordinator's latest; it never goes back from abandon or finish to continue. `on_order` is called when it
    changes, so that a step of training is not waited for in vain.

    Args:
        client: the connection.
        lease_id: the lease that is kept alive.
        seconds: the pause between two heartbeats.
        on_trouble: told in one sentence when a heartbeat was not answered; the work goes on meanwhile.
    """

    def __init__(self, client: FleetClient, lease_id: str, seconds: float, on_trouble: Callable[[str], None]) -> None:
        self._client, self._lease_id = client, lease_id
        self._seconds = seconds if seconds > 0 else DEFAULT_SECONDS
        self._on_trouble = on_trouble
        self._progress = Progress(activity="downloading")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeats", daemon=True)
        self.on_order: Callable[[], None] = lambda: None
        self.order = Order.CONTINUE
        self.reason = ""

    def update(self, progress: Progress) -> None:
        """What the next heartbeat reports."""
        self._progress = progress

    def stand_still(self) -> None:
        """Report a pause from the next heartbeat on, at the step that was reached."""
        before = self._progress if self._progress.activity != "downloading" else Progress(activity="")
        self._progress = replace(before, activity="paused", tokens_per_second=0.0, resident_bytes=0)

    def _beat(self) -> None:
        while True:
            try:
                order, reason = self._client.heartbeat(self._lease_id, self._progress)
                self._obey(order, reason)
            except NetworkError:
                self._on_trouble("the coordinator does not answer heartbeats; the work goes on and is reported later")
            except (ProtocolError, RunMismatchError) as error:
                self._obey(Order.ABANDON, str(error))
            except ForgeError as error:
                self._on_trouble(str(error))
            if self._over.wait(self._seconds):
                return

    def _obey(self, order: Order, reason: str) -> None:
        if order is Order.ABANDON or (order is Order.FINISH and self.order is Order.CONTINUE):
            self.order, self.reason = order, reason
            self.on_order()

    def __enter__(self) -> Heartbeats:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        # A heartbeat on its way may take its whole deadline; it is not worth waiting for.
        self._thread.join(timeout=1.0)
