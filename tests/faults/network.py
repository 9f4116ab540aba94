"""A node behind a bad line: slow, late, stalling, cut, losing replies, leading elsewhere; nothing is tuned for it.

    python -m tests.faults.network [--only WORDS]

The line is a TCP relay between the real processes of the sweep, so a lost packet shows as what TCP makes of it, a pause.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
import os
from pathlib import Path
import queue
import random
import socket
import sys
import tempfile
import threading
import time

from forge.vocabulary import CHUNK_BYTES
from tests.faults.sweep import Outcome, check_end, follow, free_address, hand_over, prepare
from tests.faults.work import choose_size

#: Bytes of a shard of twelve chunks (its header is some hundreds more), and of the three of a run.
SHARD = 12 * CHUNK_BYTES
UPLOADED = 3 * SHARD
#: Pieces of 16 KiB that are on their way at a time: on a line with a delay enough for 6 MB/s at 0.3 s, on a short one a few. What
#: is on its way when a line is cut is lost, whatever the two ends do.
IN_FLIGHT, IN_FLIGHT_SHORT = 128, 4
#: Seconds that TCP waits before it sends a lost packet again, about (RFC 6298: at least 0.2 on Linux).
RETRANSMISSION = 0.3
#: Every call that a node makes.
CALLS = ["Commit", "FetchBlob", "Heartbeat", "Join", "Lease", "OpenUpload", "Release", "Upload"]


@dataclass
class Line:
    """A relay. What it does to the bytes is decided anew for every piece of at most 16 KiB; none overtakes another.

    Args:
        target: where the coordinator listens.
    """

    target: str
    delay: float = 0.0
    """Seconds, each way."""
    rate: float = 0.0
    """Bytes a second of each connection and direction; 0 has no limit."""
    loss: float = 0.0
    """Share of the pieces that come after a retransmission."""
    cuts: list[int] = field(default_factory=list)
    """Bytes from the node, since the start, at which every connection is cut."""
    stalls: list[int] = field(default_factory=list)
    """Bytes from the node at which its connection falls silent for good without being closed."""
    port: int = 0
    """Where the node finds it; 0 takes a free one."""
    upwards: int = 0
    faults: int = 0

    def __post_init__(self) -> None:
        self._lock, self._open = threading.Lock(), list[socket.socket]()
        self._sockets, self._threads = list[socket.socket](), list[threading.Thread]()
        self._random = random.Random(0)
        self._server = socket.create_server(("127.0.0.1", self.port))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._begin(self._accept)

    def _begin(self, task: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=task, args=arguments, daemon=True))
        self._threads[-1].start()

    def close(self) -> None:
        """Stop relaying."""
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._cut(self._sockets)
        for thread in self._threads:
            thread.join(10.0)
        for connection in self._sockets:
            connection.close()

    def _cut(self, connections: list[socket.socket]) -> None:
        with self._lock:
            for connection in connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def _accept(self) -> None:
        host, _, port = self.target.rpartition(":")
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            try:
                target = socket.create_connection((host, int(port)))
            except OSError:  # The coordinator does not listen yet.
                client.close()
                continue
            with self._lock:
                self._open += [client, target]
                self._sockets += [client, target]
            for source, sink, up in ((client, target, True), (target, client, False)):
                self._begin(self._relay, source, sink, up)

    def _relay(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        """Take pieces as they come and have them delivered when they are due."""
        pieces: queue.Queue[tuple[float, bytes]] = queue.Queue(IN_FLIGHT if self.delay else IN_FLIGHT_SHORT)
        self._begin(self._deliver, pieces, sink)
        with suppress(OSError):
            while data := source.recv(16 << 10):
                if up and self._fault(len(data), source):
                    break
                pieces.put((time.monotonic() + self.delay, data))
        pieces.put((0.0, b""))

    def _deliver(self, pieces: queue.Queue[tuple[float, bytes]], sink: socket.socket) -> None:
        broken = False
        while piece := pieces.get():
            due, data = piece
            if not data:
                break
            if broken:
                continue  # Taken all the same, so that whoever puts them never waits for good.
            time.sleep(max(0.0, due - time.monotonic()) + (len(data) / self.rate if self.rate else 0.0))
            if self.loss and self._random.random() < self.loss:
                self.faults += 1
                time.sleep(RETRANSMISSION)
            try:
                sink.sendall(data)
            except OSError:
                broken = True
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _fault(self, count: int, source: socket.socket) -> bool:
        """Whether this piece is where the connection ends or falls silent."""
        with self._lock:
            self.upwards += count
            due = [plan for plan in (self.cuts, self.stalls) if plan and self.upwards >= plan[0]]
            for plan in due:
                plan.pop(0)
                self.faults += 1
        if due and due[0] is self.cuts:
            self._cut(self._open)
        while due and due[0] is self.stalls and source.fileno() >= 0:
            if not source.recv(16 << 10):  # swallowed until the node gives up
                break
        return bool(due)


@contextmanager
def line(target: str, **faults: object) -> Iterator[Line]:
    """A line that lasts as long as the block."""
    laid = Line(target, **faults)  # type: ignore[arg-type]
    try:
        yield laid
    finally:
        laid.close()


def through_a_line(large: bool = True, patience: float = 900.0, chunks: float = 1.0,
                   **faults: object) -> tuple[Outcome, int, str]:  # fmt: skip
    """A whole run behind a line: its outcome, the faults that happened, and a remark.

    Args:
        large: whether the shards have twelve chunks.
        patience: seconds for it.
        chunks: that may be sent twice for a cut, on the average.
        faults: as of `Line`.
    """
    outcome = Outcome("", "")
    with tempfile.TemporaryDirectory() as name, _environment(FAULTS_LARGE="1" if large else None):
        root, listen = Path(name), free_address()
        with line(listen, **faults) as laid:
            prepare(root, listen, [laid.address])
            follow(root, outcome, patience)
            if not outcome.wrong:
                check_end(root, outcome)
            twice = laid.upwards - UPLOADED
            if "cuts" in faults and twice > (laid.faults + 1) * chunks * CHUNK_BYTES:
                outcome.wrong.append(f"{twice:,} bytes were sent twice in {laid.faults} cuts")
            share = f", {twice / laid.faults / CHUNK_BYTES:.2f} of a chunk a cut" if "cuts" in faults and laid.faults else ""
            remark = f"{twice / 2**20:.2f} MiB beside the shards{share}" if large else ""
            return outcome, laid.faults, remark


def lost_replies() -> tuple[Outcome, int, str]:
    """Every call is carried out, and every second time its reply does not arrive; one node hands over, another one goes on."""
    outcome = Outcome("", "", leaves=True)
    with tempfile.TemporaryDirectory() as name, _environment(FAULTS_LOSE="1"):
        root, listen = Path(name), free_address()
        prepare(root, listen, [listen], uses=2)
        hand_over(root, outcome)
        if not outcome.wrong:
            check_end(root, outcome, nodes=2)
        lost = [point for point in (root / "coordinator.log").read_text().splitlines() if "loses its reply" in point]
        calls = sorted({point.split()[0] for point in lost})
        if calls != CALLS:
            outcome.wrong.append(f"replies were lost of {', '.join(calls)} only")
        return outcome, len(lost), ", ".join(calls)


def another_address() -> tuple[Outcome, int, str]:
    """The coordinator dies and comes back at the other address that the invitation names."""
    outcome = Outcome("coordinator", "Commit has its answer 2")
    with tempfile.TemporaryDirectory() as name:
        root, listen, later = Path(name), free_address(), free_address()
        prepare(root, listen, [listen, later])
        moved = threading.Thread(target=_move, args=(root, later))
        moved.start()
        follow(root, outcome, 300.0)
        moved.join()
        if not outcome.wrong:
            check_end(root, outcome)
        return outcome, 1, ""


def _move(root: Path, later: str) -> None:
    """Once the coordinator runs, the next one listens elsewhere."""
    while not (root / "run" / "coordinator.json").is_file():
        time.sleep(0.05)
    (root / "listen").write_text(later)


@contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    choose_size("FAULTS_LARGE" in os.environ)
    try:
        yield
    finally:
        _set(before)
        choose_size("FAULTS_LARGE" in os.environ)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


#: Bytes from the node before the first upload: calls, handshakes and acknowledgements of three downloads.
_CALLS = 20_000
#: A tenth of each of the three uploads.
_TENTHS = [_CALLS + number * SHARD // 10 for number in range(1, 30)]


def _anywhere(seed: int, count: int = 40) -> list[int]:
    """Bytes from the node, sorted, at `count` places of the whole run."""
    return sorted(random.Random(seed).sample(range(2_000, UPLOADED), count))


FAULTS: dict[str, Callable[[], tuple[Outcome, int, str]]] = {
    "300 ms later, each way": lambda: through_a_line(delay=0.3),
    "50 kB/s, each way": lambda: through_a_line(large=False, rate=50_000.0),
    "5 % of the pieces late by a retransmission": lambda: through_a_line(loss=0.05),
    "a stall in the middle of each upload": lambda: through_a_line(
        stalls=[_CALLS + SHARD * number // 2 for number in (1, 3, 5)]),
    "a cut at each tenth of the uploads": lambda: through_a_line(cuts=list(_TENTHS)),
    **{f"40 cuts anywhere ({seed})": lambda seed=seed: through_a_line(cuts=_anywhere(seed)) for seed in range(5)},  # type: ignore[misc]
    "every second reply of every call lost": lost_replies,
    "the coordinator moves to its other address": another_address,
}  # fmt: skip


def main() -> int:
    """Every fault, a table, and what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only the lines whose name holds these words")
    only = parser.parse_args().only
    print("| the line | faults | | lost, doubled or stuck | seconds |\n|---|---|---|---|---|")
    bad = total = 0
    for name, make in FAULTS.items():
        if only not in name:
            continue
        begun = time.monotonic()
        outcome, faults, remark = make()
        bad, total = bad + bool(outcome.wrong), total + faults
        print(f"| {name} | {faults} | {remark} | {'; '.join(outcome.wrong) or 'nothing'} | {time.monotonic() - begun:.0f} |",
              flush=True)  # fmt: skip
    print(f"| **all** | **{total}** | | **{bad}** | |")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
