"""The line to the coordinator: where it is, how this node knows that it is the one, and what it remembers of it.

gRPC wants the certificate of a CA, and an invitation holds only its sha256. So the certificates that the server shows are
read over a connection that trusts nobody and carries nothing; only if the CA among them is the invited one is it trusted,
and only then does gRPC connect, with that CA as its one root. What was joined is kept in `DATA_DIR/coordinators.json`,
so that the next start needs no invitation, whatever the coordinator's address is then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import closing, suppress
import ipaddress
from pathlib import Path
import socket
import ssl
from typing import TYPE_CHECKING, Any

from forge.errors import AccessError, ConfigError
from forge.files import read_json, write_json
from forge.invitation import Invitation, fingerprint
from forge.lan import shown
from node.connection import StalledError, open_channel

if TYPE_CHECKING:
    import grpc

BOOK_FILE = "coordinators.json"
#: Coordinators that are remembered.
MAX_REMEMBERED = 20
#: Seconds for a server's first bytes: it has nothing to compute before it shows its certificates.
PROBE_SECONDS = 5.0

NOT_INVITED = ("This node has not joined a coordinator before: ask its operator for an invitation (`forge-coordinator token "
               "create`) and run `forge-node join INVITATION`.")  # fmt: skip


class PlaintextError(Exception):
    """What answers does not speak TLS."""


class Link:
    """How to reach one coordinator.

    Args:
        address: `HOST:PORT` as the owner typed it; None takes the invitation's addresses, else the ones remembered.
        data_dir: where coordinators are remembered; None remembers none.
        invitation: names the CA to trust and brings the secret.
        insecure: how often --insecure was said: once for plaintext on this machine, twice for plaintext on a network.
        otherwise: the address when nothing names one.
        look: finds addresses of coordinators with these fingerprints, asked when none answers where it should be; None
            looks nowhere.

    Raises:
        ConfigError: --insecure was said once, for another machine.
    """

    def __init__(self, address: str | None = None, *, data_dir: Path | None = None, invitation: Invitation | None = None,
                 insecure: int = 0, otherwise: str = "127.0.0.1:7433",
                 look: Callable[[Collection[bytes]], Sequence[str]] | None = None) -> None:  # fmt: skip
        self._invitation, self._insecure, self._look = invitation, bool(insecure), look
        self._book = None if data_dir is None else data_dir / BOOK_FILE
        held = self._remembered()
        #: Whether anything says which coordinator it is: not so on a machine that never joined and was told nothing.
        self.named = bool(address or invitation or insecure or held)
        self._addresses: Sequence[str] = (
            [address] if address is not None else invitation.addresses if invitation is not None
            else held[0]["addresses"] if held else [otherwise])  # fmt: skip
        self._ca, self._probed = b"", False
        #: Where the coordinator answers, once it did.
        self.address = self._addresses[0]
        if insecure == 1 and not all(map(is_local, self._addresses)):
            raise ConfigError(f"--insecure would let everybody on the way to {self._addresses[0]} read and change what is "
                              "sent: leave it out, or say it twice.")  # fmt: skip

    @property
    def ca_fingerprint(self) -> bytes:
        """sha256 of the coordinator's CA; empty where nothing is encrypted."""
        return fingerprint(ssl.PEM_cert_to_DER_cert(self._ca.decode())) if self._ca else b""

    @property
    def secret(self) -> bytes | None:
        """Of the invitation, if there is one."""
        return self._invitation.secret if self._invitation is not None else None

    def open(self) -> grpc.Channel:
        """A channel to the coordinator; whoever else answers is found out before anything is sent.

        Raises:
            StalledError: nobody answers.
            AccessError: this node was not invited, or who answers is not the coordinator that it knows.
        """
        if self._insecure:
            if not self._probed and speaks_tls(self.address):
                raise AccessError(f"The coordinator at {self.address} encrypts and --insecure asks it not to: run the "
                                  "same command without --insecure.")  # fmt: skip
            self._probed = True
            return open_channel(self.address)
        if not self._ca:
            self._find()
        return open_channel(self.address, self._ca)

    def moved(self) -> bool:
        """Whether the coordinator answers at another of its addresses now, after it was lost at the last one."""
        before = self.address
        if not self._ca or len(self._addresses) < 2:
            return False
        with suppress(StalledError, AccessError):
            self._find()
        return self.address != before

    def remember(self) -> None:
        """Keep what was joined, so that the next start finds it again.

        Raises:
            StorageError: the directory cannot be written.
        """
        if self._book is None:
            return
        addresses = list(dict.fromkeys((self.address, *self._addresses)))
        entry = {"addresses": addresses, "ca": self._ca.decode()}
        others = [held for held in self._remembered() if held["ca"] != entry["ca"] or not entry["ca"]]
        kept = [entry, *(held for held in others if held != entry)][:MAX_REMEMBERED]
        if kept != self._remembered():
            write_json(self._book, kept)

    def _find(self) -> None:
        """Set the address at which the coordinator answers, and its CA."""
        trusted = ({self._invitation.fingerprint} if self._invitation is not None else
                   {fingerprint(ssl.PEM_cert_to_DER_cert(held["ca"])) for held in self._remembered() if held["ca"]})  # fmt: skip
        if not trusted:
            raise AccessError(NOT_INVITED)
        try:
            self._find_at(self._addresses, trusted)
        except (StalledError, AccessError):
            # A coordinator whose machine got another address; one on this machine would have been found.
            if self._look is None or all(map(is_local, self._addresses)) or not (found := self._look(trusted)):
                raise
            self._find_at(found, trusted)
            self._addresses = list(dict.fromkeys((*found, *self._addresses)))

    def _find_at(self, addresses: Sequence[str], trusted: Collection[bytes]) -> None:
        stalled: StalledError | None = None
        foreign = ""
        for address in addresses:
            try:
                chain = shown_certificates(address)
            except StalledError as error:
                stalled = stalled or error
                continue
            except PlaintextError:
                foreign = foreign or (f"What answers at {address} does not encrypt, so it is not the coordinator that this "
                                      "node knows: check the address, or, if its operator started it with --insecure, ask "
                                      "why.")  # fmt: skip
                continue
            ca = next((certificate for certificate in chain if fingerprint(certificate) in trusted), None)
            if ca is not None:
                self.address, self._ca = address, ssl.DER_cert_to_PEM_cert(ca).encode()
                return
            foreign = foreign or self._stranger(address, chain)
        if foreign:
            raise AccessError(foreign)
        assert stalled is not None
        raise stalled

    def _stranger(self, address: str, chain: Sequence[bytes]) -> str:
        found = shown(fingerprint(chain[-1])) if chain else "none"
        if self._invitation is not None:
            return (f"What answers at {address} is not the coordinator of this invitation (its CA is {found}, and the "
                    f"invitation is of {shown(self._invitation.fingerprint)}): check the address, and ask the operator for "
                    "a new invitation if the coordinator was made anew; otherwise somebody stands in between.")  # fmt: skip
        return (f"What answers at {address} is not a coordinator that this node has joined (its CA is {found}): check the "
                "address, and ask its operator for an invitation if it is another or was made anew; otherwise somebody "
                "stands in between.")  # fmt: skip

    def _remembered(self) -> list[dict[str, Any]]:
        if self._book is None or not self._book.is_file():
            return []
        return [dict(entry) for entry in read_json(self._book)]


def is_local(address: str) -> bool:
    """Whether only this machine reaches an address `HOST:PORT`."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def speaks_tls(address: str) -> bool:
    """Whether what answers at an address wants to encrypt; False also when nobody answers."""
    try:
        return bool(shown_certificates(address))
    except (StalledError, PlaintextError):
        return False


def shown_certificates(address: str) -> list[bytes]:
    """The certificates, in DER, that a server shows, its own first. They are not checked, and nothing is sent.

    Raises:
        StalledError: nobody answers.
        PlaintextError: who answers does not speak TLS.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS)
        with closing(connection), context.wrap_socket(connection) as wrapped:
            return _chain(wrapped)
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
        raise StalledError("the connection was cut") from error
    except ssl.SSLError as error:
        raise PlaintextError(str(error)) from error
    except TimeoutError as error:
        raise StalledError("no answer in time") from error
    except ConnectionResetError as error:
        raise StalledError("the connection was cut") from error
    except (OSError, UnicodeError) as error:  # The second: a name that no name server could know.
        raise StalledError("it cannot be reached") from error


def _chain(wrapped: ssl.SSLSocket) -> list[bytes]:
    if hasattr(wrapped, "get_unverified_chain"):
        return [bytes(certificate) for certificate in wrapped.get_unverified_chain()]
    # Before Python 3.13 only the object behind it had the method.
    found = wrapped._sslobj.get_unverified_chain()  # type: ignore[attr-defined]
    return [ssl.PEM_cert_to_DER_cert(certificate.public_bytes()) for certificate in found or ()]
