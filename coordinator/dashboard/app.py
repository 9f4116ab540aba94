"""What the dashboard answers: the page, its events, `/healthz`, `/metrics`, and questions to the model. Nothing changes a run.

A page of another site may reach a loopback address through the reader's own browser, so the names that a request may
use for this machine are checked (DNS rebinding), and so is where a request for events or for an answer comes from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from importlib import resources
import logging
import math
import time
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.dashboard import metrics
from coordinator.dashboard.feed import Feed
from coordinator.dashboard.invitation import INVITATION_PATH, Card
from coordinator.dashboard.prompt import PROMPT_PATH, Prompts, disconnected
from coordinator.jobs import RunJob
from coordinator.snapshot import Json
from forge.errors import ForgeError

EVENTS_PATH = "/events"
#: Path -> file of this package and its type.
FILES = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css"),
         "/page.js": ("page.js", "text/javascript"), "/prompt.js": ("prompt.js", "text/javascript"),
         "/invite.js": ("invite.js", "text/javascript")}  # fmt: skip
#: What a page may do: take script and style from where it came from, and read events and answers there.
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
          "form-action 'none'; frame-ancestors 'none'")  # fmt: skip
#: Pages that may watch at the same time; each costs a task and at most one event of memory.
MAX_CLIENTS = 32
#: Seconds between two looks at the run while somebody watches.
LOOK_SECONDS = 0.5
#: Seconds after which a page hears something although nothing changed, so that it can tell a quiet run from a dead line.
QUIET_SECONDS = 10.0
#: Milliseconds after which a page whose line broke comes back.
RETRY_MILLISECONDS = 1000

_log = logging.getLogger(__name__)


class Pages:
    """The endpoints.

    Args:
        take: takes a snapshot of the run; called in a thread.
        run_job: has the model speak; called in a thread.
        run_dir: the run directory.
        card: the invitation to show to the operator; None has none.
        clock: monotonic seconds.
    """

    def __init__(self, take: Callable[[], Json], run_job: RunJob, run_dir: str, card: Card | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._take, self._card, self._clock = take, card, clock
        self._feed = Feed()
        self._looking = asyncio.Lock()
        self._look_again_at = -math.inf
        self._snapshot: Json | None = None
        self._clients = 0
        #: Set when the coordinator is being stopped: the streams end, so that the server can.
        self.closing = asyncio.Event()
        self._prompts = Prompts(run_job, run_dir, self._look, self.closing)

    def app(self, allowed_hosts: Iterable[str] | None) -> ASGIApp:
        """The ASGI application.

        Args:
            allowed_hosts: names that a request may address; None accepts any.
        """
        files = [Route(path, _file(*file)) for path, file in FILES.items()]
        routes = [*files, Route("/healthz", self._health), Route("/metrics", self._metrics),
                  Route(EVENTS_PATH, _Own(self._events), methods=["GET"]),
                  Route(PROMPT_PATH, _Own(self._prompts), methods=["POST"])]  # fmt: skip
        if self._card is not None:
            routes.append(Route(INVITATION_PATH, self._card.answer))
        return Guard(Starlette(routes=routes), None if allowed_hosts is None else frozenset(allowed_hosts))

    async def _health(self, request: Request) -> Response:
        snapshot = await self._look()
        return JSONResponse({"phase": snapshot["phase"]["phase"]})

    async def _metrics(self, request: Request) -> Response:
        return Response(metrics.exposition(await self._look()), headers={"content-type": metrics.CONTENT_TYPE})

    async def _look(self) -> Json:
        """The newest snapshot, at most `LOOK_SECONDS` old, or ten times what it took to take; an older one while the database
        cannot be read.
        """
        async with self._looking:
            if self._snapshot is None or self._clock() >= self._look_again_at:
                began = self._clock()
                try:
                    self._snapshot = await asyncio.to_thread(self._take)
                    self._feed.update(self._snapshot)
                except ForgeError as error:
                    if self._snapshot is None:
                        raise
                    _log.warning("the dashboard shows an older state: %s", error)
                self._look_again_at = self._clock() + max(LOOK_SECONDS, 9 * (self._clock() - began))
            return self._snapshot

    async def _events(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._clients >= MAX_CLIENTS:
            answer = PlainTextResponse(f"{MAX_CLIENTS} pages watch already: close one.\n", 503, {"retry-after": "10"})
            return await answer(scope, receive, send)
        after = Headers(scope=scope).get("last-event-id") or QueryParams(scope["query_string"]).get("after", "")
        self._clients += 1
        gone = asyncio.ensure_future(disconnected(receive))
        closing = asyncio.ensure_future(self.closing.wait())
        try:
            await self._stream(send, after, {gone, closing})
        finally:
            self._clients -= 1
            gone.cancel()
            closing.cancel()

    async def _stream(self, send: Send, after: str, over: set[asyncio.Future[Any]]) -> None:
        head = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        body = f"retry: {RETRY_MILLISECONDS}\n\n".encode()
        said_at = -QUIET_SECONDS
        while not any(future.done() for future in over):
            await self._look()
            if self._feed.newest != after or self._clock() - said_at >= QUIET_SECONDS:
                body += self._feed.event(after)
                after, said_at = self._feed.newest, self._clock()
                # Waits while the reader is slow; what changes meanwhile is in the next event.
                await send({"type": "http.response.body", "body": body, "more_body": True})
                body = b""
            await asyncio.wait(over, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _file(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")

    async def answer(request: Request) -> Response:
        return Response(text, media_type=kind)

    return answer


class _Own:
    """An ASGI function as a route's application, for pages of this dashboard and programs that are no browsers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _same_origin(Headers(scope=scope)):
            return await PlainTextResponse("A page of another site may not ask for this.\n", 403)(scope, receive, send)
        await self._app(scope, receive, send)


class Guard:
    """Refuses foreign host names, and gives every answer the headers of a page that trusts nobody.

    Args:
        app: what answers.
        allowed_hosts: names that a request may address; None accepts any.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: frozenset[str] | None) -> None:
        self._app, self._allowed = app, allowed_hosts
        self._headers = {
            "content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
            "x-frame-options": "DENY", "cross-origin-resource-policy": "same-origin",
            "cross-origin-opener-policy": "same-origin", "cache-control": "no-store",
            "connection": "close",  # One request a connection: an idle one holds no place.
        }  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        host = host_name(Headers(scope=scope).get("host", ""))
        if self._allowed is not None and host not in self._allowed:
            refusal = PlainTextResponse("This dashboard is not known by that name: open it as http://127.0.0.1:PORT/, or "
                                        "http://localhost:PORT/.\n", 421)  # fmt: skip
            return await refusal(scope, receive, guarded)
        await self._app(scope, receive, guarded)


def host_name(header: str) -> str:
    """The name in a Host header, without its port: `[::1]:80` is `::1`."""
    name, colon, port = header.strip().lower().rpartition(":")
    if not colon or not port.isdecimal():
        name = header.strip().lower()
    return name.removeprefix("[").removesuffix("]").rstrip(".")


def _same_origin(headers: Headers) -> bool:
    """Whether a request is this page's own, or of a program that is no browser."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
        return False
    return headers.get("sec-fetch-site", "none") in ("same-origin", "none")

