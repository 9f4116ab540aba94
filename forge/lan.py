"""A coordinator on the local network, announced and found by multicast DNS (RFC 6762, 6763).

An announcement is what anybody on the network may say. It leads to an address and proves nothing: who is at that address is
known by the invitation (node/link.py). Without the package `zeroconf`, and where a network carries no multicast, nothing is
announced and nothing is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
import ipaddress
import queue
import time
from typing import TYPE_CHECKING, Final

from forge.errors import NetworkError
from forge.invitation import FINGERPRINT_BYTES

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, Zeroconf

SERVICE: Final = "_modularforge._tcp.local."
#: Seconds that a look takes. Everybody answers within 0.5 s (RFC 6762, 6); a lost packet is asked for again after one second.
LOOK_SECONDS: Final = 3.0
#: Announcements that are read, and characters of a name: who announces may be anybody.
MAX_FOUND: Final = 20
MAX_NAME: Final = 40
#: Digits of a fingerprint that people are shown.
SHOWN_DIGITS: Final = 16


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """What a coordinator says of itself, or somebody in its place.

    Args:
        name: of its run.
        addresses: `HOST:PORT`, IP addresses only.
        fingerprint: sha256 of the certificate of its CA.
    """

    name: str
    addresses: Sequence[str]
    fingerprint: bytes

    def __str__(self) -> str:
        return f"{self.name!r} at {self.addresses[0]} (CA {shown(self.fingerprint)})"


def shown(fingerprint: bytes) -> str:
    """As much of a fingerprint as people compare."""
    return fingerprint.hex()[:SHOWN_DIGITS]


@contextmanager
def announced(announcement: Announcement, interfaces: Sequence[str] | None = None) -> Iterator[None]:
    """Announce a coordinator for as long as the block runs.

    Args:
        announcement: what to say; every address has the same port.
        interfaces: addresses of the interfaces to use; None uses all.

    Raises:
        NetworkError: it cannot be announced here.
    """
    zeroconf = _open(interfaces)
    try:
        from zeroconf import Error, ServiceInfo

        parts = [address.rpartition(":") for address in announcement.addresses]
        label = f"forge-{shown(announcement.fingerprint)}"
        try:
            # A machine without a network has but a name, which is no address: OSError.
            info = ServiceInfo(SERVICE, f"{label}.{SERVICE}", port=int(parts[0][2]), server=f"{label}.local.",
                               parsed_addresses=[host.strip("[]") for host, _, _ in parts],
                               properties={"name": _printable(announcement.name),
                                           "ca": announcement.fingerprint.hex()})  # fmt: skip
            # One CA is of one coordinator, so a name that is in use is our own of before a kill.
            zeroconf.register_service(info, cooperating_responders=True)
        except (OSError, Error) as error:
            raise NetworkError("The coordinator cannot be announced on this network.", detail=str(error)) from error
        yield
    finally:
        zeroconf.close()  # Says goodbye, so that nobody finds what is gone.


def find(enough: Callable[[Announcement], bool] = lambda _: False, interfaces: Sequence[str] | None = None,
         seconds: float = LOOK_SECONDS) -> list[Announcement]:  # fmt: skip
    """Who announces a coordinator on this network, in the order of the answers.

    Args:
        enough: ends the look at the announcement for which it is true.
        interfaces: as for `announced`.
        seconds: how long to look.

    Raises:
        NetworkError: the package is missing, or this machine has no network.
    """
    zeroconf, names = _open(interfaces), queue.SimpleQueue[str]()
    found: list[Announcement] = []
    try:
        from zeroconf import ServiceBrowser, ServiceStateChange

        def heard(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
            if state_change is not ServiceStateChange.Removed:
                names.put(name)

        ServiceBrowser(zeroconf, SERVICE, handlers=[heard])
        deadline = time.monotonic() + seconds
        with suppress(queue.Empty):
            while len(found) < MAX_FOUND and (left := deadline - time.monotonic()) > 0:
                info = zeroconf.get_service_info(SERVICE, names.get(timeout=left), timeout=1000)
                announcement = None if info is None else _read(info)
                if announcement is not None and announcement not in found:
                    found.append(announcement)
                    if enough(announcement):
                        break
    finally:
        zeroconf.close()
    return found


def _open(interfaces: Sequence[str] | None) -> Zeroconf:
    try:
        from zeroconf import InterfaceChoice, Zeroconf
    except ImportError as error:
        raise NetworkError("The Python package zeroconf, which finds coordinators on this network, is not installed: pip "
                           "install zeroconf.") from error  # fmt: skip
    try:
        return Zeroconf(interfaces=InterfaceChoice.All if interfaces is None else list(interfaces))
    except OSError as error:
        raise NetworkError("This machine is on no network that carries multicast.", detail=str(error)) from error


def _read(info: ServiceInfo) -> Announcement | None:
    """What was announced; None where it is not what we announce."""
    properties = info.decoded_properties
    try:
        fingerprint = bytes.fromhex(properties.get("ca") or "")
    except ValueError:
        return None
    addresses = [f"[{address}]" if ":" in address else address for address in info.parsed_addresses()
                 if not ipaddress.ip_address(address).is_multicast]  # fmt: skip
    if len(fingerprint) != FINGERPRINT_BYTES or not addresses or not info.port:
        return None
    return Announcement(name=_printable(properties.get("name") or "unnamed"), fingerprint=fingerprint,
                        addresses=tuple(f"{address}:{info.port}" for address in addresses[:8]))  # fmt: skip


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name[:MAX_NAME])
