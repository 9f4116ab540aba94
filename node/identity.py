"""The node's key: who this node is, made on first use.

The key is an Ed25519 private key (RFC 8032), kept as its 32 raw bytes in `DATA_DIR/node.key`, readable by its owner
only. The same key always becomes the same node, so deleting the file makes a stranger of this machine.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from forge.errors import StorageError, storage_errors
from forge.files import create_private
from forge.system import keep_private

KEY_FILE = "node.key"
KEY_BYTES = 32


class Identity:
    """An Ed25519 key pair.

    Args:
        private_bytes: the 32 bytes of the private key.
    """

    def __init__(self, private_bytes: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(private_bytes)

    @classmethod
    def open(cls, data_dir: Path) -> Identity:
        """Read the key of `data_dir`, or make one.

        Raises:
            StorageError: the directory cannot be written, or the key file is damaged.
        """
        path = data_dir / KEY_FILE
        with storage_errors(path):
            if not path.exists():
                create_private(path, Ed25519PrivateKey.generate().private_bytes_raw())
            keep_private(path)
            private_bytes = path.read_bytes()
        if len(private_bytes) != KEY_BYTES:
            raise StorageError(f"The node's key {path} is damaged ({len(private_bytes)} bytes instead of {KEY_BYTES}): "
                               "restore it from a copy, or delete it to join as a new node.")  # fmt: skip
        return cls(private_bytes)

    @property
    def public_key(self) -> bytes:
        """The public key, 32 raw bytes."""
        return self._key.public_key().public_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """The Ed25519 signature of `data`, 64 bytes."""
        return self._key.sign(data)

