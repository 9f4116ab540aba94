"""The manifest of a shard: what its node says about it, in the JSON bytes that the node signs.

The shard's own metadata binds its tensors to a run, a config, a partition and the shared components. The manifest binds the
file, by its sha256, to the same four and to the lease that it was trained under.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from forge.errors import ShardError
from forge.strict_json import DuplicateKeyError, read_strict

#: Bytes of a manifest; ours have some 500.
MAX_MANIFEST_BYTES: Final = 1 << 16


def parse_manifest(raw: bytes) -> dict[str, Any]:
    """Read a manifest strictly: every reader of the signed bytes must find the same in them.

    Raises:
        ShardError: it is too long, not UTF-8, not a JSON object, names a key twice, or holds a number that JSON lacks.
    """
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ShardError(f"The manifest has {len(raw):,} bytes; at most {MAX_MANIFEST_BYTES:,} are accepted.")

    try:
        said = read_strict(raw)
    except DuplicateKeyError as error:
        raise ShardError("The manifest names a key twice.") from error
    except (ValueError, RecursionError) as error:
        raise ShardError("The manifest is not JSON.", detail=str(error)) from error
    if not isinstance(said, dict):
        raise ShardError("The manifest is not a JSON object.")
    return said


def check_manifest(raw: bytes, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Read a manifest and hold it against what it must say.

    Args:
        raw: the signed bytes.
        expected: key -> value, such as `run_id`, `partition`, `sha256`, `lease_id` and `shared_sha256`.

    Raises:
        ShardError: it cannot be read, or speaks of something else; the sentence names the key.
    """
    said = parse_manifest(raw)
    for key, value in expected.items():
        # In Python 1 == True == 1.0; another program that reads the same manifest need not agree.
        if said.get(key) != value or type(said.get(key)) is not type(value):
            raise ShardError(f"The manifest speaks of another {_WORDS.get(key, key.replace('_', ' '))} than this shard's.")
    return said


_WORDS: Final = {"shared_sha256": "set of shared components", "config_fingerprint": "config"}


def tokens_seen(manifest: Mapping[str, Any]) -> int | None:
    """How many tokens the node says it trained on; None when that is no count."""
    said = manifest.get("tokens_seen")
    return said if type(said) is int and 0 <= said < 1 << 53 else None
