"""A TCP proxy on this machine that can hold back what clients send, and lose it with their connections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
import socket
import threading

_NO_LIMIT = 1 << 62


class Proxy:
    """Forwards `address` to a target; after `limit` bytes from clients, all connections together, the rest is held back.

    What is held back never arrives: `cut` closes every connection, as the death of a machine does.
    """

    def __init__(self, host: str, port: int, limit: int) -> None:
        self._target, self._limit = (host, port), limit
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        self._cut = threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        #: Bytes from clients that the target was given, since the start or the last `cut`.
        self.passed = 0
        #: Set when the limit is reached.
        self.holding = threading.Event()
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def cut(self) -> None:
        """Close every connection; what new ones bring is not held back."""
        with self._lock:
            self._limit, self.passed = _NO_LIMIT, 0
            self._cut.set()
            for connection in self._connections:
                with suppress(OSError):  # closed by the other end
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()
            self._connections.clear()

    def close(self) -> None:
        """Stop forwarding."""
        self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread in `accept`, which closing alone does not
        self._server.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            try:
                target = socket.create_connection(self._target)
            except OSError:  # nobody listens there at the moment
                client.close()
                continue
            with self._lock:
                self._connections += [client, target]
            for direction in (self._upwards, self._downwards):
                threading.Thread(target=direction, args=(client, target), name="proxy", daemon=True).start()

    def _upwards(self, client: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                with self._lock:
                    taken = data[: self._limit - self.passed]
                    self.passed += len(taken)
                target.sendall(taken)
                if len(taken) < len(data):
                    self.holding.set()
                    self._cut.wait()
                    return
            target.shutdown(socket.SHUT_WR)

    def _downwards(self, client: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := target.recv(1 << 16):
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)


@contextmanager
def proxy(address: str, limit: int) -> Iterator[Proxy]:
    """A proxy for `HOST:PORT` until the block ends."""
    host, _, port = address.rpartition(":")
    running = Proxy(host, int(port), limit)
    try:
        yield running
    finally:
        running.close()
