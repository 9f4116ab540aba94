"""The dashboard's server: uvicorn in a thread, on a socket of ours, with bounds on what a connection may cost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import contextlib
import ipaddress
import logging
import socket
import threading
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from coordinator.dashboard.app import EVENTS_PATH, MAX_CLIENTS, Pages
from coordinator.dashboard.invitation import Card
from coordinator.dashboard.prompt import PROMPT_PATH
from coordinator.jobs import RunJob
from coordinator.snapshot import Json
from forge.errors import NetworkError
from forge.system import allow_rebind
from forge.vocabulary import DASHBOARD_PORT

#: Connections at the same time, watching pages included. The coordinator's file descriptors are the nodes' first.
MAX_CONNECTIONS = MAX_CLIENTS + 32
#: Seconds that a connection gets for its whole request and answer when it is no stream.
REQUEST_SECONDS = 20.0
#: What may last; a question has a deadline of its own, its answer ends when the model has said so many tokens.
STREAMS = (EVENTS_PATH, PROMPT_PATH)
#: Seconds that a reader may let a full buffer (64 KiB and the event behind it) lie.
STALL_SECONDS = 20.0
#: Largest request head; a browser's has some 700 bytes.
MAX_HEAD_BYTES = 16 << 10
#: Seconds that pages get to hear that the coordinator stops.
STOP_SECONDS = 2.0

LOOPBACK = "127.0.0.1"
_LOCAL_NAMES = ("localhost", LOOPBACK, "::1")

_log = logging.getLogger(__name__)


class Dashboard:
    """One dashboard: it listens from the beginning and answers from `start` until `stop`.

    Args:
        listen: host and port; None takes the default address, and a free port when that one is in use.

    Raises:
        NetworkError: the address that was asked for cannot be listened on.
    """

    def __init__(self, listen: tuple[str, int] | None) -> None:
        self._socket, self._moved = _listen(listen)
        self._host = listen[0] if listen else LOOPBACK
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pages: Pages | None = None
        self._server: uvicorn.Server | None = None
        self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)
        self._began = threading.Event()
        self._card: Card | None = None

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._socket.getsockname()[1])

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return ipaddress.ip_address(self._socket.getsockname()[0].partition("%")[0]).is_loopback

    @property
    def greeting(self) -> list[str]:
        """What to tell whoever started the coordinator, in lines."""
        key = f"#{self._card.key}" if self._card is not None else ""
        lines = [f"to watch:  {self.url}{key}" + (f"  (port {DASHBOARD_PORT} is in use)" if self._moved else "")]
        if not self.loopback:
            lines.append(f"WARNING: anybody who reaches port {self.port} of this machine can read the dashboard and ask the "
                         "model")  # fmt: skip
        return lines

    @property
    def url(self) -> str:
        """Where a browser on this machine finds it."""
        local = {"0.0.0.0": LOOPBACK, "::": "[::1]"}
        return f"http://{local.get(self._host.strip('[]'), self._host)}:{self.port}/"

    def start(self, take: Callable[[], Json], run_job: RunJob, run_dir: str, invitation: str = "") -> None:
        """Begin to answer with the snapshots that `take` takes, and with what `run_job` has the model say.

        The line of an `invitation` is shown to who opens the address of the greeting, on this machine only.
        """
        self._card = Card(invitation) if invitation and self.loopback else None
        self._answers = take, run_job, run_dir, self._card
        self._thread.start()
        self._began.wait(10.0)

    def stop(self) -> None:
        """End every answer and close the socket; a second time does nothing."""
        loop, server = self._loop, self._server
        if loop is not None and server is not None and self._thread.is_alive():
            def end() -> None:
                assert self._pages is not None
                self._pages.closing.set()
                server.should_exit = True

            with contextlib.suppress(RuntimeError):  # The loop has just ended by itself.
                loop.call_soon_threadsafe(end)
            self._thread.join(STOP_SECONDS + 3.0)
        self._socket.close()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pages = Pages(*self._answers)
        names = {*_LOCAL_NAMES, self._host.strip("[]").lower()} if self.loopback else None
        self._server = uvicorn.Server(uvicorn.Config(
            self._pages.app(names), http=_Connection, ws="none", loop="asyncio", lifespan="off", log_config=None,
            access_log=False, server_header=False, proxy_headers=False, h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_graceful_shutdown=int(STOP_SECONDS)))  # fmt: skip
        self._began.set()
        await self._server.serve(sockets=[self._socket])


class _Connection(H11Protocol):
    """A connection that costs little however its other end behaves: it is cut when it is one too many, does not ask in
    time, or does not read.
    """

    _limit: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._limit = self.loop.call_later(REQUEST_SECONDS, self._time_is_up)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._limit, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def _time_is_up(self) -> None:
        streaming = self.cycle is not None and self.scope["path"] in STREAMS and not self.cycle.response_complete
        if not streaming:
            self.transport.abort()


def _listen(listen: tuple[str, int] | None) -> tuple[socket.socket, bool]:
    """A listening socket, and whether it is on another port than the default one because that was taken.

    Raises:
        NetworkError: the address that was asked for cannot be listened on.
    """
    if listen is not None:
        return _bind(*listen), False
    try:
        return _bind(LOOPBACK, DASHBOARD_PORT), False
    except NetworkError:
        return _bind(LOOPBACK, 0), True


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            allow_rebind(bound)
            bound.bind(address)
            bound.listen(64)
        except OSError:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:  # A name with an empty or an endless part is none.
        raise NetworkError(f"The dashboard cannot listen on {host}:{port}: another program uses the port, or the address "
                           "is not this machine's; choose another one with --dashboard, or --dashboard off.",
                           detail=str(error)) from error  # fmt: skip
    return bound


class _ToOurLog(logging.Handler):
    """uvicorn's errors go where the coordinator's do; what strangers send wrong, its warnings, goes nowhere."""

    def emit(self, record: logging.LogRecord) -> None:
        _log.handle(record)


logging.getLogger("uvicorn.error").addHandler(_ToOurLog(logging.ERROR))
