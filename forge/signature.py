"""Ed25519 signatures (RFC 8032): who a node is, and whether it said something."""

from __future__ import annotations

import hashlib
from typing import Final

#: Bytes of a public key and of a signature (RFC 8032, 5.1.5 and 5.1.6).
PUBLIC_KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
#: Hexadecimal digits of a node id.
NODE_ID_DIGITS: Final = 16


def node_id_of(public_key: bytes) -> str:
    """The id of the node with this key: the first 16 hexadecimal digits of its sha256."""
    return hashlib.sha256(public_key).hexdigest()[:NODE_ID_DIGITS]


def verify_signature(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` over `message` was made with the private half of `public_key`."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
