"""Who calls: a credential that only this coordinator can make, for the node with a key."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
import secrets

from forge.errors import ProtocolError, StorageError, storage_errors

#: Bytes of the server's secret: as many as its HMAC's hash.
SECRET_BYTES = 32
#: Who the operator is, in place of a node id: whoever can read the secret of the run directory.
OPERATOR = "operator"


class CredentialError(ProtocolError):
    """A call came without a credential of this coordinator: the node must join (again)."""


class Credentials:
    """Makes and checks credentials: `NODE_ID.HMAC-SHA256(secret, node_id)`, opaque to the node.

    Args:
        secret: the coordinator's secret.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @classmethod
    def load(cls, path: Path) -> Credentials:
        """Read the secret, or make one that only this user can read.

        Raises:
            StorageError: it cannot be read or written, or is damaged.
        """
        with storage_errors(path):
            if not path.exists():
                from forge.files import create_private  # `status` reads the secret only, and should answer at once

                create_private(path, secrets.token_bytes(SECRET_BYTES))
            secret = path.read_bytes()
        if len(secret) != SECRET_BYTES:
            raise StorageError(f"{path} is damaged: delete it and start again; every node then joins anew by itself.")
        return cls(secret)

    def issue(self, node_id: str) -> str:
        """The credential of a node: the same one every time."""
        return f"{node_id}.{hmac.new(self._secret, node_id.encode(), hashlib.sha256).hexdigest()}"

    def draw(self, what: bytes) -> bytes:
        """32 bytes that nobody can foretell without the secret, and that are the same for the same bytes: a draw by lot."""
        return hmac.digest(self._secret, b"lot\0" + what, "sha256")

    def check(self, credential: str) -> str:
        """The node that a credential belongs to, compared in constant time.

        Raises:
            CredentialError: this coordinator has not made it.
        """
        node_id = credential.partition(".")[0]
        if not hmac.compare_digest(self.issue(node_id).encode(), credential.encode()):
            raise CredentialError("This coordinator does not know this node: join first.")
        return node_id
