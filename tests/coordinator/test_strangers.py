"""What somebody without an invitation costs a coordinator process: connections, a few kB each, for a bounded time."""

from __future__ import annotations

from collections.abc import Iterator
import json
from pathlib import Path
import socket
import ssl
import subprocess
import sys

import pytest

from coordinator.authority import ca_certificate
from forge.invitation import SERVER_NAME
from forge.system import resident_bytes_of

from .fakes import FakeNode, until

CONNECTIONS = 500
#: Resident bytes a connection: a TLS session and gRPC's buffers, with room for what the allocator rounds up.
MOST_BYTES = 100 << 10


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path, tuple[str, int]]]:
    """A process, its run directory and its address."""
    process = subprocess.Popen([sys.executable, "-m", "tests.coordinator.process", str(tmp_path / "run")])
    try:
        book = tmp_path / "run" / "coordinator.json"
        until(book.is_file, seconds=120)
        host, _, port = json.loads(book.read_text())["address"].rpartition(":")
        FakeNode(f"{host}:{port}", "warm", tmp_path / "run").join()
        yield process, tmp_path / "run", (host, int(port))
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("speaks", [False, True], ids=["silent", "encrypted"])
def test_many_connections_of_strangers_are_small_and_those_that_say_nothing_end(
        coordinator: tuple[subprocess.Popen[bytes], Path, tuple[str, int]], speaks: bool) -> None:  # fmt: skip
    process, root, address = coordinator
    context = ssl.create_default_context(cadata=ca_certificate(root).decode())
    context.set_alpn_protocols(["h2"])
    before, held = resident_bytes_of(process.pid), []
    try:
        for _ in range(CONNECTIONS):
            line = socket.create_connection(address, timeout=60)
            held.append(context.wrap_socket(line, server_hostname=SERVER_NAME) if speaks else line)
        each = (resident_bytes_of(process.pid) - before) / CONNECTIONS
        print(f"{each / 1024:.1f} KiB a connection, {'encrypted' if speaks else 'silent'}")
        assert each < MOST_BYTES
        assert FakeNode(f"{address[0]}:{address[1]}", "friend", root).join().run.name == "tiny", "others are answered meanwhile"
        if not speaks:  # What was begun in ten seconds and not ended is cut.
            until(lambda: all(_ended(line) for line in held), seconds=40)
    finally:
        for line in held:
            line.close()


def _ended(line: socket.socket) -> bool:
    line.settimeout(0.0)
    try:
        while data := line.recv(1 << 16):  # The server's first frame, if it sent one.
            assert len(data) < 1 << 16
        return True
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    except OSError:
        return True
