"""JSON from strangers, read such that every reader of the same bytes finds the same in them."""

from __future__ import annotations

import json
from typing import Any


class DuplicateKeyError(ValueError):
    """An object names a key twice: readers differ in which value they take."""


def read_strict(raw: bytes) -> Any:
    """Read one JSON value.

    Raises:
        DuplicateKeyError: an object names a key twice.
        ValueError: it is not UTF-8, not JSON, holds a number that JSON lacks, such as NaN, or half of a surrogate pair.
        RecursionError: it is nested too deep.
    """
    value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
    if b"\\u" in raw:
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # Half of a surrogate pair is no text, and others refuse it.
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise DuplicateKeyError("a key is named twice")
    return keys


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
