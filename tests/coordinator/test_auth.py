from __future__ import annotations

import hashlib
from pathlib import Path
import stat

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
import pytest

from coordinator.auth import CredentialError, Credentials
from forge.errors import StorageError
from forge.signature import node_id_of, verify_signature


def test_the_secret_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    first = Credentials.load(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Credentials.load(path).issue("abc") == first.issue("abc")


def test_a_credential_names_its_node_and_cannot_be_made_elsewhere(tmp_path: Path) -> None:
    credentials = Credentials.load(tmp_path / "secret")
    credential = credentials.issue("0123456789abcdef")
    assert credentials.check(credential) == "0123456789abcdef"
    for wrong in ("", ".", "0123456789abcdef", credential[:-1], credential.replace("0123", "1123"), "\u00e9." + "0" * 64,
                  Credentials(bytes(32)).issue("0123456789abcdef")):  # fmt: skip
        with pytest.raises(CredentialError):
            credentials.check(wrong)


def test_a_damaged_secret_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(StorageError, match="damaged"):
        Credentials.load(tmp_path / "secret")


def test_the_node_id_is_the_hash_of_the_key() -> None:
    assert node_id_of(b"k" * 32) == hashlib.sha256(b"k" * 32).hexdigest()[:16]


def test_signatures() -> None:
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()
    assert verify_signature(public, b"message", key.sign(b"message"))
    assert not verify_signature(public, b"massage", key.sign(b"message"))
    assert not verify_signature(public, b"message", b"short")
    assert not verify_signature(b"short", b"message", key.sign(b"message"))
