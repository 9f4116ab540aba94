"""Fault points: every change of state that a process makes, named and numbered, at which it can be made to die.

Nothing in the product knows of them. What changes the state of files, database and connections goes through a few functions
of the standard library, SQLAlchemy and gRPC; `install` puts a point before and after each of their calls. A point's name
says what is about to happen or has happened, to which file, and for the how-manieth time: `after replace model/router.safetensors
1`. A process that is told a point kills itself there with SIGKILL, or finds its disk full there, once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
import errno
import os
from pathlib import Path
import re
import signal
import threading
from typing import Any

import grpc
import sqlalchemy
from sqlalchemy import event
from sqlalchemy.orm import Session

#: Calls of `os` that change what is on the disk; pathlib, shutil and tempfile go through them too.
CALLS = ("replace", "rename", "link", "unlink", "mkdir", "rmdir", "fsync", "truncate", "ftruncate")
#: Of the gRPC calls, those that are made by the clock and not by what happened before.
BY_THE_CLOCK = frozenset({"Heartbeat"})

_lock = threading.RLock()
_transaction = threading.local()
_counts: Counter[str] = Counter()
_root, _log, _deadly, _full = "", -1, "", False
#: Stands in the log where a disk was full.
FULL = "the disk is full"


def install(root: Path, log: Path, deadly: str, full: bool = False) -> None:
    """Put points around every change of state of this process.

    Args:
        root: paths below it are named relative to it, others are no points.
        log: gets the name of every point that was passed, a line each.
        deadly: the point at which to die; empty for none.
        full: whether the disk is full there instead.
    """
    global _root, _log, _deadly, _full
    _root, _deadly, _full = str(root.resolve()), deadly, full
    _log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for name in CALLS:
        setattr(os, name, _around_file(name, getattr(os, name)))
    event.listen(sqlalchemy.Engine, "after_cursor_execute", _executed)
    event.listen(sqlalchemy.Engine, "commit", lambda connection: _committing("before"))
    event.listen(Session, "after_commit", lambda session: _committing("after"))


def passed(name: str) -> None:
    """A point is reached: write it down, and die if it is the one."""
    with _lock:
        _counts[name] += 1
        point = f"{name} {_counts[name]}"
        os.write(_log, f"{point}\n".encode())
        if point == _deadly and _full:
            os.write(_log, f"{FULL}\n".encode())
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        if point == _deadly:
            os.kill(os.getpid(), signal.SIGKILL)


def around(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a point before and one after it."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        passed(f"before {name}")
        result = call(*arguments, **named)
        passed(f"after {name}")
        return result

    return wrapped


def _executed(connection: Any, cursor: Any, statement: str, *more: Any) -> None:
    if not statement.lstrip().upper().startswith(("SELECT", "PRAGMA")):
        _transaction.wrote = True


def _committing(when: str) -> None:
    """A transaction that only read changes nothing and is no point."""
    if getattr(_transaction, "wrote", False):
        _transaction.wrote = when == "before"
        passed(f"{when} commit of the database")


def _around_file(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **named: Any) -> Any:
        # With the name that the file will have: the one before is temporary.
        path = _path(arguments[1] if name in ("replace", "rename", "link") else arguments[0], named)
        idle = os.path.isdir(path) if name == "mkdir" else name in ("unlink", "rmdir") and not os.path.lexists(path)
        if idle or not path.startswith(_root):
            return call(*arguments, **named)
        # Hashes, ids and the random part of a temporary file's name differ from run to run.
        where = re.sub(r"[0-9a-f]{8,}", "*", os.path.relpath(path, _root))
        passed(f"before {name} {where}")
        result = call(*arguments, **named)
        passed(f"after {name} {where}")
        return result

    return wrapped


def _path(path: Any, named: dict[str, Any]) -> str:
    if isinstance(path, int):
        path = str(os.readlink(f"/proc/self/fd/{path}"))
    elif named.get("dir_fd") is not None:  # shutil.rmtree
        path = os.path.join(os.readlink(f"/proc/self/fd/{named['dir_fd']}"), os.fspath(path))
    return str(os.path.abspath(os.fspath(path)))


class ServerPoints(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """Points when a call has come, when its answer is made, and when the answer is sent.

    Args:
        lose: whether every second reply of each call is lost.
    """

    def __init__(self, lose: bool = False) -> None:
        self._lose = lose
        self._answers: Counter[str] = Counter()

    def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = continuation(details)
        name = details.method.rpartition("/")[2]
        if handler is None or "Fleet" not in details.method or (name in BY_THE_CLOCK and not self._lose):
            return handler

        def called(inner: Callable[..., Any]) -> Callable[..., Any]:
            def behaviour(request: Any, context: grpc.ServicerContext) -> Any:
                passed(f"{name} has come")
                context.add_callback(lambda: passed(f"{name} is over"))
                answer = inner(request, context)
                passed(f"{name} has its answer")
                self._answers[name] += 1
                if self._lose and self._answers[name] % 2:
                    passed(f"{name} loses its reply")
                    context.abort(grpc.StatusCode.UNAVAILABLE, "the reply is lost")
                return answer

            return behaviour

        kinds = {(False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
                 (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
                 (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler)}  # fmt: skip
        kind, make = kinds[handler.request_streaming, handler.response_streaming]
        return make(called(getattr(handler, kind)), handler.request_deserializer, handler.response_serializer)


class ClientPoints(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
                   grpc.StreamUnaryClientInterceptor):  # type: ignore[type-arg]  # fmt: skip
    """Points before a call is made and when its answer is here."""

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        name = details.method.rpartition("/")[2]
        if name in BY_THE_CLOCK:
            return continuation(details, request)
        passed(f"before the call {name}")
        call = continuation(details, request)
        call.code()  # waits for the answer
        passed(f"after the call {name}")
        return call

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        passed(f"before the call {details.method.rpartition('/')[2]}")
        return continuation(details, request)

    def intercept_stream_unary(self, continuation: Any, details: Any, requests: Any) -> Any:
        name = details.method.rpartition("/")[2]
        passed(f"before the call {name}")

        def counted() -> Any:
            for request in requests:
                passed(f"before a chunk of {name}")
                yield request

        return continuation(details, counted())
