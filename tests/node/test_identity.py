from __future__ import annotations

from pathlib import Path
import stat

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
import pytest

from forge.errors import StorageError
from node.identity import Identity


def test_the_key_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    first, second = Identity.open(tmp_path / "node"), Identity.open(tmp_path / "node")
    assert first.public_key == second.public_key and len(first.public_key) == 32
    assert stat.S_IMODE((tmp_path / "node" / "node.key").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "node").iterdir()] == ["node.key"]
    Ed25519PublicKey.from_public_bytes(first.public_key).verify(second.sign(b"manifest"), b"manifest")


def test_a_damaged_key_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "node.key").write_bytes(b"short")
    with pytest.raises(StorageError, match="damaged"):
        Identity.open(tmp_path)
    assert (tmp_path / "node.key").read_bytes() == b"short"
