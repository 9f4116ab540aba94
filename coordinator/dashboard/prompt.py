"""The prompt box: the assembled model continues a text, in a child process, one answer at a time.

A question is `POST /prompt` with `{"prompt": TEXT, "seed": NUMBER}`. The answer is a stream of JSON lines: `text` and
`expert` (the one that spoke it) of every piece as it comes, and at last `tokens` and `left_out` (tokens of the prompt for
which the context had no room), or `error` (a sentence).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
import json
import threading
from typing import Any

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from coordinator.jobs import RunJob, Stopped
from coordinator.snapshot import Json
from forge.errors import ForgeError
from forge.strict_json import read_strict

PROMPT_PATH = "/prompt"
#: Longest text to continue, in characters; how much of it the model sees is up to its context.
MAX_CHARACTERS = 4000
#: Largest body: every character may be a pair of escapes.
MAX_BODY_BYTES = 12 * MAX_CHARACTERS + 100
#: Seconds that a body may take to come.
BODY_SECONDS = 10.0
#: Seconds for which a question waits for the one before it: an answer that nobody reads any more ends at its next word, which
#: may be its first, once the child has imported torch.
WAIT_SECONDS = 10.0
#: Seeds are below this, which every reader of JSON keeps exactly.
SEEDS = 1 << 53


class Refusal(Exception):  # noqa: N818 - an answer, not a fault
    """A question that is not answered; its arguments are the status and a sentence."""


class _Abandoned(Exception):  # noqa: N818 - it ends a job
    """Nobody listens any more."""


class Prompts:
    """The endpoint.

    Args:
        run_job: has the model speak.
        run_dir: the run directory.
        look: the newest snapshot.
        closing: set when the coordinator is being stopped.
    """

    def __init__(self, run_job: RunJob, run_dir: str, look: Callable[[], Awaitable[Json]], closing: asyncio.Event) -> None:
        self._run_job, self._run_dir, self._look, self._closing = run_job, run_dir, look, closing
        self._one = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one question."""
        try:
            question = await _question(Request(scope, receive))
            if not any(expert["shows"] == "accepted" for expert in (await self._look())["experts"]):
                raise Refusal(409, "No shard has been accepted yet: the model can be asked when the first one is.")
            try:
                with anyio.fail_after(WAIT_SECONDS):
                    await self._one.acquire()
            except TimeoutError:
                raise Refusal(503, "The model answers somebody else: ask again in a moment.") from None
        except Refusal as refusal:
            status, sentence = refusal.args
            return await _refuse(status, sentence)(scope, receive, send)
        except ClientDisconnect:
            return None
        try:
            await self._answer(question, receive, send)
        finally:
            self._one.release()

    async def _answer(self, question: Json, receive: Receive, send: Send) -> None:
        """Say what the job says until it ends; when nobody listens, end it."""
        loop, over = asyncio.get_running_loop(), threading.Event()
        lines: asyncio.Queue[Json | None] = asyncio.Queue()  # A line a token: bounded by what the job may write.

        def hear(event: Json) -> None:
            if over.is_set():
                raise _Abandoned
            if piece := event.get("piece"):
                loop.call_soon_threadsafe(lines.put_nowait, {"text": piece["text"], "expert": piece["expert"]})

        job = asyncio.ensure_future(asyncio.to_thread(self._speak, question, hear))
        ends = [job, asyncio.ensure_future(disconnected(receive)), asyncio.ensure_future(self._closing.wait())]
        for end in ends:
            end.add_done_callback(lambda _: lines.put_nowait(None))
        try:
            head = [(b"content-type", b"application/x-ndjson"), (b"x-accel-buffering", b"no")]
            await send({"type": "http.response.start", "status": 200, "headers": head})
            while (line := await lines.get()) is not None:
                await send({"type": "http.response.body", "body": _line(line), "more_body": True})
            last = _line(job.result()) if job.done() else b""
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            over.set()
            for end in ends[1:]:
                end.cancel()
            await job

    def _speak(self, question: Json, hear: Callable[[Json], None]) -> Json:
        """The last line of the answer."""
        try:
            result = self._run_job("generate", {"run_dir": self._run_dir, **question}, hear)
        except ForgeError as error:
            return {"error": str(error)}
        except (Stopped, _Abandoned):
            return {"error": "The answer was stopped."}
        return {"tokens": result["tokens"], "left_out": result["left_out"]}


async def _question(request: Request) -> Json:
    """What is asked.

    Raises:
        Refusal: it is no question, or too long.
    """
    body = b""
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise _too_long()
    except TimeoutError:
        raise Refusal(408, f"The question did not come within {BODY_SECONDS:.0f} seconds: ask again.") from None
    try:
        asked = read_strict(body)
        prompt, seed = asked["prompt"], asked.get("seed", 0)
        prompt.encode()  # Half of a surrogate pair is JSON and no text.
        good = type(prompt) is str and type(seed) is int and 0 <= seed < SEEDS
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        good = False
    if not good:
        raise Refusal(400, 'A question is JSON such as {"prompt": "The history of", "seed": 0}, its seed a whole number.')
    if len(prompt) > MAX_CHARACTERS:
        raise _too_long()
    return {"prompt": prompt, "seed": seed}


def _too_long() -> Refusal:
    return Refusal(413, f"The text is too long: give at most {MAX_CHARACTERS:,} characters.")


def _refuse(status: int, sentence: str) -> Response:
    return PlainTextResponse(f"{sentence}\n", status, {"retry-after": "10"} if status == 503 else None)


def _line(value: Any) -> bytes:
    return (json.dumps(value, separators=(",", ":"), allow_nan=False) + "\n").encode()


async def disconnected(receive: Receive) -> None:
    """Wait until a request's other end is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
