"""What a gRPC connection can do wrong, and what of it is worth another try. No messages of the protocol here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
import threading
import time
from typing import Any

import grpc
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_delay,
    stop_never,
    wait_exponential,
    wait_random,
)

from forge.errors import BY_CODE, AccessError, ForgeError, NetworkError, ProtocolError
from forge.invitation import RETRY_HEADER, SERVER_NAME

#: Longest pause that a coordinator can ask for.
LONGEST_RETRY_SECONDS = 60.0
#: Characters of a sentence of the coordinator's that are shown, and sentences of one verdict.
MAX_SENTENCE, MAX_SENTENCES = 2000, 16

_TRANSIENT = frozenset({
    grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,  # by our watchdog, or because another thread replaced the channel
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long the client waits for what, in seconds; tests shorten it."""

    unary: float = 20.0
    """For the answer to one small question."""
    stream: float = 30.0
    """For the next bytes of a transfer."""
    first_connection: float = 10.0
    """For a coordinator that was never reached: it may just be starting, and the address may just be wrong."""
    goodbye: float = 3.0
    """For the answer to the last call of a node that is being stopped."""
    backoff: tuple[float, float] = (0.5, 15.0)
    """Before trying again: doubles from the first to the second, plus up to the first as jitter."""


class StalledError(Exception):
    """A stream was given up because no bytes moved, or because its channel was replaced."""


class Watchdog:
    """Cancels a stream that has shown no sign of life for `seconds`."""

    def __init__(self, call: Any, seconds: float) -> None:
        self._call, self._seconds = call, seconds
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stream-watchdog", daemon=True)

    def alive(self) -> None:
        """Bytes moved."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                self._call.cancel()
                return

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def open_channel(address: str, ca: bytes | None = None) -> grpc.Channel:
    """A channel that connects anew quickly after its coordinator was away.

    Args:
        address: `HOST:PORT`.
        ca: the one CA, in PEM, whose servers are trusted; None does not encrypt.
    """
    host = address.rpartition(":")[0]
    local = host in ("localhost", "[::1]") or host.startswith("127.")
    options: list[tuple[str, Any]] = [
        ("grpc.use_local_subchannel_pool", 1),  # a new channel must mean a new connection
        ("grpc.initial_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 5000),  # the default, two minutes, outlasts every restart of a coordinator
        ("grpc.enable_http_proxy", 0 if local else 1),
    ]
    if ca is None:
        return grpc.insecure_channel(address, options=options)
    options.append(("grpc.ssl_target_name_override", SERVER_NAME))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca), options=options)


def retrying(patience: Patience, limit: float | None, before_pause: Callable[[RetryCallState], None],
             sleep: Callable[[float], None]) -> Retrying:  # fmt: skip
    """Try until it works, `limit` seconds have passed, or the error is not a transient one."""
    first, longest = patience.backoff
    if limit is not None:
        longest = min(longest, limit / 5)  # several tries within the limit, and not far beyond it
    grows = wait_exponential(multiplier=first, max=longest) + wait_random(0, first)
    return Retrying(
        retry=retry_if_exception(is_transient),
        wait=lambda state: max(grows(state), retry_after(state.outcome.exception() if state.outcome else None)),
        stop=stop_never if limit is None else stop_after_delay(limit),
        before_sleep=before_pause, sleep=sleep, reraise=True)  # fmt: skip


def is_transient(error: BaseException) -> bool:
    """Whether the same call may well succeed a little later."""
    if isinstance(error, StalledError):
        return True
    if isinstance(error, ValueError):
        return "closed channel" in str(error)  # another thread replaced the channel at this very moment
    if not isinstance(error, grpc.RpcError):
        return False
    if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return asks_again(error)
    # A connection that is cut in the middle of a stream may surface as INTERNAL.
    return error.code() in _TRANSIENT or (error.code() == grpc.StatusCode.INTERNAL and "RST_STREAM" in details(error))


def asks_again(error: BaseException) -> bool:
    """Whether the coordinator itself answered that the call may be made again later."""
    if not isinstance(error, grpc.RpcError):
        return False
    if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:  # The status also of a message that is too large.
        return retry_after(error) > 0 or "Concurrent RPC" in details(error)
    return error.code() == grpc.StatusCode.ABORTED


def retry_after(error: BaseException | None) -> float:
    """Seconds after which the coordinator wants to be asked again, 0 when it said nothing."""
    trailing: Any = error.trailing_metadata() if isinstance(error, grpc.RpcError) else None
    try:
        seconds = float(dict(trailing or ()).get(RETRY_HEADER, 0))
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_SECONDS) if seconds == seconds else 0.0


def is_foreign(error: BaseException | None) -> bool:
    """Whether a connection failed because who answered is not the coordinator that this node knows."""
    said = details(error) if isinstance(error, grpc.RpcError) else ""
    return "CERTIFICATE_VERIFY_FAILED" in said or "WRONG_VERSION_NUMBER" in said


def may_be_dead(error: BaseException | None) -> bool:
    """Whether the connection was silent, so that it may be dead without either end having been told."""
    return isinstance(error, StalledError) or (isinstance(error, grpc.RpcError) and error.code() in (
        grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED))  # fmt: skip


def details(error: BaseException) -> str:
    """The sentence that travelled with a status."""
    return printable(str(error.details() or "")) if isinstance(error, grpc.RpcError) else str(error)


def printable(text: str) -> str:
    """A sentence of the coordinator's as it may be shown: of a bounded length, and without what drives a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:MAX_SENTENCE])


def why(error: BaseException | None) -> str:
    """A transient error in a few words for the owner."""
    if not isinstance(error, grpc.RpcError):
        return str(error)
    code = error.code()
    if code in (grpc.StatusCode.ABORTED, grpc.StatusCode.RESOURCE_EXHAUSTED):
        return details(error) or "it asks to try again"
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return "no answer in time"
    if code == grpc.StatusCode.CANCELLED:
        return "no bytes for too long"
    if is_foreign(error):
        return "what answers there is not the coordinator that this node joined"
    return "it cannot be reached" if "onnect" in details(error) else "the connection was cut"


def first_error(error: BaseException, address: str, tried: float) -> ForgeError | None:
    """Why a coordinator that never answered before could not be joined in `tried` seconds; None leaves it to `forge_error`."""
    said = details(error)
    if asks_again(error):
        return NetworkError(f"The coordinator at {address} cannot take this node (tried for {tried:.0f} s): {said}; run the "
                            "same command again later.")  # fmt: skip
    if is_foreign(error):
        return AccessError(f"The certificate of the coordinator at {address} is not valid: check the clocks of both "
                           "machines, and the address.", detail=said)  # fmt: skip
    if is_transient(error):
        return NetworkError(f"No coordinator answers at {address} (tried for {tried:.0f} s): start one there with "
                            "`forge-coordinator serve`, or check the address.", detail=said)  # fmt: skip
    return None


def forge_error(error: BaseException, address: str, what: str) -> ForgeError:
    """The error that the coordinator named in `forge-error-code`, or what the status means.

    Args:
        error: what gRPC raised.
        address: of the coordinator.
        what: what it was asked, such as "for work".
    """
    if is_transient(error) or not isinstance(error, grpc.RpcError):
        return NetworkError(f"The coordinator at {address} did not answer when asked {what}: {why(error)}.",
                            detail=details(error))  # fmt: skip
    trailing: Any = error.trailing_metadata() or ()
    named = dict(trailing).get("forge-error-code")
    said = details(error)
    if named is not None:
        code = named.decode() if isinstance(named, bytes) else str(named)
        return BY_CODE.get(code, ForgeError)(said or f"The coordinator at {address} refused when asked {what}.")
    status = error.code()
    if status == grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolError(f"What answers at {address} is not a coordinator of this version: check the address, or "
                             "update the older of the two.", detail=said)  # fmt: skip
    if status in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL):
        return ForgeError(f"The coordinator at {address} failed when asked {what}: its log says why.", detail=said)
    return ProtocolError(f"The coordinator at {address} refused when asked {what}: {said or status.name}.")
