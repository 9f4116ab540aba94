"""Where a coordinator listens, and how other machines reach it."""

from __future__ import annotations

from contextlib import suppress
import ipaddress
import socket

import grpc

from coordinator.authority import own_addresses
from forge.errors import ConfigError, NetworkError
from forge.system import allow_rebind

#: Addresses in an invitation, at most: people copy it.
MAX_ADDRESSES = 4


def parse_listen(listen: str, option: str = "--listen") -> tuple[str, int]:
    """Split `HOST:PORT`.

    Raises:
        ConfigError: it does not look like that.
    """
    host, colon, port = listen.rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 1 << 16):
        raise ConfigError(f"{option} {listen!r} must look like HOST:PORT, such as 127.0.0.1:7433.")
    return host, int(port)


def check_free(host: str, port: int) -> None:
    """Find out that a port is taken before anything is written; `bind` is what really takes it.

    Raises:
        NetworkError: it is.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with suppress(socket.gaierror), socket.socket(family) as probe:
        allow_rebind(probe)
        try:
            probe.bind((host.strip("[]"), port))
        except socket.gaierror:
            raise
        except OSError as error:
            raise _taken(host, port, str(error)) from error


def bind(server: grpc.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    """Have a server listen; the port that it has then.

    Raises:
        NetworkError: the port is in use, or the address is another machine's.
    """
    detail: str | None = None
    try:
        where = f"{host}:{port}"
        bound = server.add_insecure_port(where) if credentials is None else server.add_secure_port(where, credentials)
    except RuntimeError as error:
        bound, detail = 0, str(error)
    if not bound:
        raise _taken(host, port, detail)
    return int(bound)


def _taken(host: str, port: int, detail: str | None) -> NetworkError:
    return NetworkError(f"Cannot listen on {host}:{port}: another program uses the port, or the address is not this "
                        "machine's; choose another one with --listen.", detail=detail)  # fmt: skip


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def invitation_addresses(host: str, port: int) -> list[str]:
    """Where other machines reach a coordinator: the address that it listens on, or, for one that stands for all of this
    machine's, the one that its traffic takes, and then the others.
    """
    if host.strip("[]") not in ("0.0.0.0", "::"):
        return [f"{host}:{port}"]
    others = own_addresses()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # A documentation address: nothing is sent, the system picks its route.
            others.insert(0, str(probe.getsockname()[0]))
        except OSError:
            pass
    found = [f"[{address}]" if ":" in address else address for address in dict.fromkeys(others)]
    return [f"{address}:{port}" for address in found[:MAX_ADDRESSES] or [socket.gethostname()]]
