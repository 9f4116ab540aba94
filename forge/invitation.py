"""An invitation: the one string that lets a machine into a run. Both ends must agree on what is here.

It holds where the coordinator may be reached, the sha256 of the certificate of its CA, by which a node knows it again,
and a secret of 256 random bits, by which the coordinator knows who was invited.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field
import hashlib
import re
from typing import Final

from forge.errors import ConfigError

#: What every invitation begins with, so that people and scanners for leaked secrets recognise one.
PREFIX: Final = "forge1_"
#: Bytes of the secret, of the fingerprint (sha256), and of the checksum that finds a string that was cut.
SECRET_BYTES, FINGERPRINT_BYTES, _CHECK_BYTES = 32, 32, 4
#: Characters of an invitation; ours have some 130.
MAX_CHARACTERS: Final = 2000

#: A name in every certificate of a coordinator. Nodes check this one: the CA serves one coordinator only, so who holds a
#: certificate of it is the right one, whatever address or tunnel leads there.
SERVER_NAME: Final = "coordinator.modularforge"
#: Metadata of a Join. A key is 32 bytes, the proof 64, the secret 32 (only from a node that is not known yet).
KEY_HEADER: Final = "forge-key-bin"
PROOF_HEADER: Final = "forge-proof-bin"
SECRET_HEADER: Final = "forge-invitation-bin"
#: Trailing metadata of a call that came too soon: seconds until it may be made again.
RETRY_HEADER: Final = "forge-retry-after"


def is_address(text: str) -> bool:
    """Whether a text looks like `HOST:PORT`; an IPv6 address is in brackets."""
    return re.fullmatch(r"([^\s,/:\[\]]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}", text) is not None


def fingerprint(certificate: bytes) -> bytes:
    """sha256 of a certificate in DER."""
    return hashlib.sha256(certificate).digest()


def proof_message(ca_fingerprint: bytes) -> bytes:
    """What a node signs to prove that it holds its key.

    The fingerprint (empty where nothing is encrypted) binds it to one coordinator: another one that this node once
    joined cannot pass the proof on.
    """
    return b"modularforge join 1\0" + ca_fingerprint


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """One invitation.

    Args:
        addresses: `HOST:PORT`, the likeliest first.
        fingerprint: sha256 of the CA's certificate.
        secret: never printed but in `encode`.
    """

    addresses: Sequence[str]
    fingerprint: bytes
    secret: bytes = field(repr=False)

    def encode(self) -> str:
        """The string."""
        payload = self.fingerprint + self.secret + ",".join(self.addresses).encode()
        checked = payload + hashlib.sha256(payload).digest()[:_CHECK_BYTES]
        return PREFIX + base64.urlsafe_b64encode(checked).rstrip(b"=").decode()

    @classmethod
    def parse(cls, text: str) -> Invitation:
        """Read the string.

        Raises:
            ConfigError: it is not an invitation, or not all of one. The sentence does not repeat it: it holds a secret.
        """
        wrong = ConfigError("The invitation is damaged or not complete: copy the whole string that `forge-coordinator "
                            f"token create` printed; it begins with {PREFIX}.")  # fmt: skip
        text = text.strip()
        if not text.startswith(PREFIX) or len(text) > MAX_CHARACTERS:
            raise wrong
        body = text.removeprefix(PREFIX)
        try:
            checked = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
            payload, check = checked[:-_CHECK_BYTES], checked[-_CHECK_BYTES:]
            addresses = tuple(payload[FINGERPRINT_BYTES + SECRET_BYTES :].decode().split(","))
        except (ValueError, binascii.Error):
            raise wrong from None
        if hashlib.sha256(payload).digest()[:_CHECK_BYTES] != check or not all(map(is_address, addresses)):
            raise wrong
        return cls(addresses=addresses, fingerprint=payload[:FINGERPRINT_BYTES],
                   secret=payload[FINGERPRINT_BYTES : FINGERPRINT_BYTES + SECRET_BYTES])  # fmt: skip
