"""The coordinator's own certificate authority, made on its first start, and the server certificate that it issues.

    RUN_DIR/tls/ca.pem        private key and certificate of the CA; its fingerprint is what invitations hold
    RUN_DIR/tls/server.pem    private key and certificate of the server

Each file holds both halves and appears in one step, so a process that is killed between them leaves no half. Only the
owner can read them. The server's certificate is issued anew when this machine gets another address or name, or when its
end is near: a coordinator that moves, or runs for years, keeps its fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable
import datetime
import ipaddress
import os
from pathlib import Path
import socket
import threading
import time
from typing import TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
import grpc
import psutil

from forge.errors import ForgeError, StorageError, storage_errors
from forge.files import create_private, remove_temporaries, replace_private
from forge.invitation import SERVER_NAME, fingerprint
from forge.system import keep_private

DIRECTORY = "tls"
CA_FILE, SERVER_FILE = "ca.pem", "server.pem"
#: The CA cannot be renewed without a new invitation for every node, so it outlives every run.
CA_DAYS = 30 * 365
#: Days that a server's certificate is valid, and how many before its end the next one is issued.
SERVER_DAYS, RENEWAL_DAYS = 397, 30
#: Seconds between two looks, while connections come in, at whether the certificate still fits.
LOOK_SECONDS = 60.0

_Name: TypeAlias = x509.DNSName | x509.IPAddress


class Authority:
    """The CA of one run and its server certificate.

    Args:
        run_dir: the run directory; what is missing in its `tls` is made.
        host: the address that the coordinator listens on.
        clock: seconds since the epoch.

    Raises:
        StorageError: a file cannot be read or written, or is damaged.
    """

    def __init__(self, run_dir: Path, host: str = "127.0.0.1", clock: Callable[[], float] = time.time) -> None:
        self._directory, self._host, self._clock = run_dir / DIRECTORY, host, clock
        self._lock = threading.Lock()
        with storage_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            keep_private(self._directory)
        if not (self._directory / CA_FILE).exists():
            create_private(self._directory / CA_FILE, _new_ca(self._now()))
        self._key, self._certificate = _load(self._directory / CA_FILE)
        self._looked = clock()

    @property
    def fingerprint(self) -> bytes:
        """sha256 of the CA's certificate."""
        return fingerprint(self._certificate.public_bytes(serialization.Encoding.DER))

    @property
    def ca_pem(self) -> bytes:
        """The CA's certificate."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def server_pair(self) -> tuple[bytes, bytes]:
        """The server's key, and its certificate followed by the CA's, in PEM; issued (anew) when that is due."""
        path = self._directory / SERVER_FILE
        names = _names(self._host)
        try:
            key, certificate = _load(path)
            due = not self._fits(certificate, names)
        except StorageError:
            due = True
        if due:
            replace_private(path, self._issue(names))
            key, certificate = _load(path)
        return _key_pem(key), certificate.public_bytes(serialization.Encoding.PEM) + self.ca_pem

    def credentials(self) -> grpc.ServerCredentials:
        """What a gRPC server shows; it looks at every connection whether another certificate is due."""
        remove_temporaries(self._directory)
        shown = self.server_pair()

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal shown
            with self._lock:
                if self._clock() - self._looked < LOOK_SECONDS:
                    return None
                self._looked = self._clock()
                try:
                    pair = self.server_pair()
                except ForgeError:  # A full disk is no reason to turn anybody away: the old one is still good.
                    return None
                if pair == shown:
                    return None
                shown = pair
                return grpc.ssl_server_certificate_configuration([pair])

        return grpc.dynamic_ssl_server_credentials(
            grpc.ssl_server_certificate_configuration([shown]), renewed,  # type: ignore[arg-type]  # None: as before
            require_client_authentication=False)  # fmt: skip

    def _fits(self, certificate: x509.Certificate, names: set[_Name]) -> bool:
        try:
            certificate.verify_directly_issued_by(self._certificate)
            held = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except Exception:  # noqa: BLE001 - of another CA or damaged in whatever way: there will be a new one
            return False
        left = certificate.not_valid_after_utc - self._now()
        return names <= set(held) and left > datetime.timedelta(days=RENEWAL_DAYS)

    def _issue(self, names: set[_Name]) -> bytes:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            _builder(SERVER_NAME, self._certificate.subject, key, self._now(), SERVER_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(sorted(names, key=str)), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        return _pem(key, builder.sign(self._key, hashes.SHA256()))

    def _now(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self._clock(), datetime.timezone.utc)


def ca_certificate(run_dir: Path) -> bytes:
    """The certificate, in PEM, of the CA that a run directory holds.

    Raises:
        StorageError: it holds none, or it is damaged.
    """
    return _load(run_dir / DIRECTORY / CA_FILE)[1].public_bytes(serialization.Encoding.PEM)


def own_addresses() -> list[str]:
    """The addresses of this machine's interfaces that other machines may reach, as text; link-local ones are left out."""
    found = []
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family in (socket.AF_INET, socket.AF_INET6):
                parsed = ipaddress.ip_address(address.address.partition("%")[0])
                if not (parsed.is_loopback or parsed.is_link_local):
                    found.append(str(parsed))
    return sorted(set(found), key=lambda text: (":" in text, text))


def _new_ca(now: datetime.datetime) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    # A name of its own: a client that knows several CAs finds the right one by it.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"ModularForge CA {os.urandom(8).hex()}")])
    builder = (
        _builder("", subject, key, now, CA_DAYS)
        .subject_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return _pem(key, builder.sign(key, hashes.SHA256()))


def _builder(name: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime.datetime,
             days: int) -> x509.CertificateBuilder:  # fmt: skip
    builder = x509.CertificateBuilder().issuer_name(issuer).public_key(key.public_key())
    if name:
        builder = builder.subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        builder = builder.add_extension(_usage(sign_certificates=False), critical=True)
    # A day back, for nodes whose clock is behind.
    return (builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=days)))  # fmt: skip


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates, key_cert_sign=sign_certificates, crl_sign=sign_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False)  # fmt: skip


def _names(host: str) -> set[_Name]:
    """Everything that this machine may be called, and the name that nodes check."""
    names: set[_Name] = {x509.DNSName(SERVER_NAME)}
    for text in ("localhost", "127.0.0.1", "::1", socket.gethostname(), host.strip("[]"), *own_addresses()):
        try:
            names.add(x509.IPAddress(ipaddress.ip_address(text)))
        except ValueError:
            if text and text.isascii():
                names.add(x509.DNSName(text))
    return names


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                             serialization.NoEncryption())  # fmt: skip


def _pem(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> bytes:
    return _key_pem(key) + certificate.public_bytes(serialization.Encoding.PEM)


def _load(path: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    with storage_errors(path):
        data = path.read_bytes()
        keep_private(path)
    try:
        key = serialization.load_pem_private_key(data, password=None)
        certificate = x509.load_pem_x509_certificate(data)
    except ValueError as error:
        raise StorageError(f"{path} is damaged: restore it from a copy, or delete the directory {path.parent} and invite "
                           "every node anew.", detail=str(error)) from error  # fmt: skip
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key, certificate
