"""The owner's word to a node that runs: pause, resume, finish, status, over a local socket in its data directory.

The agent listens on a Unix socket, or on a loopback port where the system or the file system has none, or the path is too
long for one. `DATA_DIR/control.json`, readable by its owner only, says where, and holds a secret that every request has to
name: whoever may read it may command the node. One request and one answer, a line of JSON each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
import hmac
import json
from pathlib import Path
import secrets
import socket
import threading
from typing import TYPE_CHECKING, Any

from forge.errors import AccessError, NetworkError, storage_errors
from forge.system import connect_here, listen_here

if TYPE_CHECKING:
    from node.guest import Guest

CONTROL_FILE, SOCKET_FILE = "control.json", "node.sock"
#: Seconds for a request or an answer: both ends are on one machine, and neither computes anything for it.
ANSWER_SECONDS = 10.0
#: Longest line that either end reads.
_MAX_BYTES = 64 << 10


@contextmanager
def listening(data_dir: Path, guest: Guest, facts: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """Answer the owner in a thread until the block ends. The caller holds the data directory.

    Args:
        data_dir: the node's data directory.
        guest: told what the owner says.
        facts: what `status` shows.

    Raises:
        StorageError: the directory cannot be written.
    """
    from forge.files import replace_private  # Its imports take a third of a second, and who asks does not need them.

    secret, path = secrets.token_hex(32), data_dir / SOCKET_FILE
    with storage_errors(data_dir):
        server = listen_here(path)  # The lock says that no other agent runs.
        where = server.getsockname()
        replace_private(data_dir / CONTROL_FILE, json.dumps({"at": where, "secret": secret}).encode())
    threading.Thread(target=_serve, args=(server, secret, guest, facts), name="control", daemon=True).start()
    try:
        yield
    finally:
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # Closing alone does not end the wait for a connection.
        server.close()
        for file in (data_dir / CONTROL_FILE, path):
            with suppress(OSError):
                file.unlink()


def ask(data_dir: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Say something to the node of a data directory.

    Args:
        data_dir: the node's data directory.
        request: `do` is pause (with `seconds`, or None), resume, finish (with `now`) or status.

    Returns:
        What the node knows after it, as of `status`.

    Raises:
        NetworkError: no node runs there, or it does not answer.
        AccessError: it is another user's.
    """
    try:
        book = json.loads((data_dir / CONTROL_FILE).read_text(encoding="utf-8"))
        answer = _exchange(book["at"], {**request, "secret": book["secret"]})
    except PermissionError as error:
        raise AccessError(f"The node in {data_dir} belongs to another user of this machine: only its owner may command it.",
                          detail=str(error)) from error  # fmt: skip
    except TimeoutError as error:
        raise NetworkError(f"The node in {data_dir} does not answer: look at what it prints, or end its process and start it "
                           "again with `forge-node join`.") from error  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NetworkError(f"No node runs in {data_dir}: start one with `forge-node join`, or name its directory with "
                           "--data-dir.", detail=str(error)) from error  # fmt: skip
    return answer


def describe(answer: dict[str, Any]) -> str:
    """The answer for people, a line a fact."""
    run, hold = answer["run"], answer["hold"]
    lines = [f"{answer['node']}, node of the run {run['name']!r} at {answer['coordinator']}" if run else
             f"{answer['node']}, on its way to the coordinator at {answer['coordinator']}"]  # fmt: skip
    working = f"partition {answer['partition']}" if answer["partition"] is not None else ""
    lines += [text for text in (answer["sentence"] or working,) if text]
    if hold is not None and not answer["leaving"]:
        lines.append(f"paused: {hold['reason']}; goes on {hold['goes_on']}")
    elif answer["waits_for"]:
        lines.append(answer["waits_for"])
    if answer["leaving"]:
        lines.append("leaves when the current expert is handed " + ("over" if hold is not None else "in"))
    lines.append(f"shards accepted: {answer['accepted']}, rejected: {answer['rejected']}")
    return "\n".join(lines)


def _exchange(at: Any, request: dict[str, Any]) -> dict[str, Any]:
    with connect_here(at if isinstance(at, str) else (at[0], at[1]), ANSWER_SECONDS) as client:
        client.sendall(json.dumps(request).encode() + b"\n")
        return dict(json.loads(_line(client)))


def _serve(server: socket.socket, secret: str, guest: Guest, facts: Callable[[], dict[str, Any]]) -> None:
    while True:
        try:
            client, _ = server.accept()
        except OSError:
            return  # Closed: the agent leaves.
        threading.Thread(target=_answer, args=(client, secret, guest, facts), daemon=True).start()


def _answer(client: socket.socket, secret: str, guest: Guest, facts: Callable[[], dict[str, Any]]) -> None:
    with client, suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        client.settimeout(ANSWER_SECONDS)
        request = json.loads(_line(client))
        if not hmac.compare_digest(str(request["secret"]).encode(), secret.encode()):
            return
        do = request["do"]
        if do == "pause":
            seconds = request.get("seconds")
            guest.pause(None if seconds is None else float(seconds))
        elif do == "resume":
            guest.resume()
        elif do == "finish":
            guest.finish(bool(request.get("now")))
        hold = guest.hold()
        until = hold.until.isoformat(timespec="seconds") if hold is not None and hold.until is not None else None
        answer = {**facts(), "hold": hold and {"reason": hold.reason, "goes_on": hold.goes_on, "until": until},
                  "leaving": guest.leaving}  # fmt: skip
        client.sendall(json.dumps(answer).encode() + b"\n")


def _line(connection: socket.socket) -> bytes:
    """Read up to the end of a line; an empty or endless one is no answer."""
    held = b""
    while not held.endswith(b"\n"):
        data = connection.recv(_MAX_BYTES)
        if not data or len(held) > _MAX_BYTES:
            raise ValueError("the connection was closed")
        held += data
    return held
