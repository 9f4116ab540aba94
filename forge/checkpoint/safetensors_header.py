"""The header of a safetensors file, read strictly; and the streaming passes over its data. No torch.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors, "Format"). Files come from strangers, so nothing in a header is believed
before it is checked, and no pass holds more than one chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
import hashlib
import json
import math
from pathlib import Path
import struct
from typing import Any, Final

import numpy as np

from forge.errors import ShardError, storage_errors
from forge.files import atomic_file
from forge.strict_json import DuplicateKeyError, read_strict
from forge.vocabulary import CHUNK_BYTES

#: Largest header that is read. A tensor takes about 130 bytes, so this is room for 8,000; the library allows 100 MB.
MAX_HEADER_BYTES: Final = 1 << 20
#: Bytes of one element, by the name that the format uses.
DTYPE_BYTES: Final = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
#: A float is NaN or infinite where all of these bits are set: (unsigned type of the same width, exponent bits).
_EXPONENTS: Final[dict[str, tuple[np.dtype[Any], int]]] = {
    "F64": (np.dtype("<u8"), 0x7FF0000000000000),
    "F32": (np.dtype("<u4"), 0x7F800000),
    "F16": (np.dtype("<u2"), 0x7C00),
    "BF16": (np.dtype("<u2"), 0x7F80),
}
_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor is.

    Args:
        dtype: element type by the format's name, such as `F32`.
        shape: sizes of the dimensions; empty for a scalar.
        begin: first byte, counted from `Header.data_start`.
        end: one past the last byte, counted from `Header.data_start`.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header.

    Args:
        tensors: the tensors by name, in the order of their data.
        metadata: the free-form strings of `__metadata__`.
        data_start: offset in the file of the first tensor's first byte.
    """

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        ShardError: the file is truncated or has bytes after its tensors, the header is larger than `MAX_HEADER_BYTES`,
            is not JSON, names a tensor twice, or its offsets overlap, leave gaps or do not match type and shape.
        StorageError: the file is missing or cannot be read.
    """
    with storage_errors(path), open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ShardError(f"{path} is truncated: {size} bytes are too few for a safetensors file.")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise ShardError(f"{path} claims a header of {length} bytes; at most {MAX_HEADER_BYTES} are accepted.")
        if length > size - 8:
            raise ShardError(f"{path} is truncated: its header should have {length} bytes and {size - 8} are there.")
        raw = file.read(length)
    tree = _parse(path, raw)
    metadata = _metadata(path, tree.pop(_METADATA, {}))
    tensors = dict(sorted(((name, _entry(path, name, value)) for name, value in tree.items()),
                          key=lambda item: (item[1].begin, item[1].end)))  # fmt: skip
    _check_layout(path, tensors, size - 8 - length)
    return Header(tensors=tensors, metadata=metadata, data_start=8 + length)


def header_bytes(tensors: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """The length prefix and the header, padded with spaces so that the data begins at a multiple of 8."""
    tree: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for name, entry in tensors.items():
        tree[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.begin, entry.end]}
    raw = json.dumps(tree, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def write_renamed(source: Path, target: Path, rename: Mapping[str, str], metadata: Mapping[str, str]) -> None:
    """Copy a safetensors file under other tensor names: a new header, and the data in chunks, atomically.

    Args:
        source: file to copy from.
        target: file to write.
        rename: old name -> new name; a name that is not in it stays.
        metadata: the new file's metadata (the old file's is dropped).

    Raises:
        ShardError: `source` is not a sound safetensors file, or two tensors would get one name.
        StorageError: `source` cannot be read or `target` cannot be written.
    """
    header = read_header(source)
    renamed = {rename.get(name, name): entry for name, entry in header.tensors.items()}
    if len(renamed) != len(header.tensors):
        raise ShardError(f"Cannot rename the tensors of {source}: two of them would get the same name.")
    with atomic_file(target) as out, open(source, "rb") as file:
        out.write(header_bytes(renamed, metadata))
        file.seek(header.data_start)
        while chunk := file.read(CHUNK_BYTES):
            out.write(chunk)


def tensors_finite(path: Path) -> str | None:
    """The first tensor, in the order of the data, that holds a NaN or an infinity; None if there is none.

    Raises:
        ShardError: the file is not a sound safetensors file.
        StorageError: the file cannot be read.
    """
    header = read_header(path)
    with storage_errors(path), open(path, "rb") as file:
        for name, entry in header.tensors.items():
            if entry.dtype not in _EXPONENTS:
                continue
            bits, exponent = _EXPONENTS[entry.dtype]
            mask = bits.type(exponent)
            file.seek(header.data_start + entry.begin)
            for chunk in _chunks(file, entry.end - entry.begin):
                if bool(((np.frombuffer(chunk, dtype=bits) & mask) == mask).any()):
                    return name
    return None


def tensors_sha256(path: Path, names: Iterable[str]) -> str:
    """sha256 (hex) over the bytes of the named tensors, one after another: what a file holds, whatever its header says.

    Raises:
        ShardError: the file is not a sound safetensors file, or lacks one of the tensors.
        StorageError: the file cannot be read.
    """
    header = read_header(path)
    digest = hashlib.sha256()
    with storage_errors(path), open(path, "rb") as file:
        for name in names:
            if name not in header.tensors:
                raise ShardError(f"{path} lacks the tensor {name}.")
            entry = header.tensors[name]
            file.seek(header.data_start + entry.begin)
            for chunk in _chunks(file, entry.end - entry.begin):
                digest.update(chunk)
    return digest.hexdigest()


def _chunks(file: Any, remaining: int) -> Iterator[bytes]:
    while remaining and (chunk := file.read(min(CHUNK_BYTES, remaining))):
        remaining -= len(chunk)
        yield chunk


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        tree = read_strict(raw)
    except DuplicateKeyError as error:
        raise ShardError(f"{path} names a tensor or a key twice in its header.") from error
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path} has a header that is not JSON.", detail=str(error)) from error
    if not isinstance(tree, dict) or not raw.startswith(b"{"):
        raise ShardError(f"{path} has a header that is not a JSON object.")
    return tree


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ShardError(f"{path} has metadata that does not map strings to strings.")
    return value


def _entry(path: Path, name: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ShardError(f"{path} describes the tensor {short(name)} by other keys than dtype, shape and data_offsets.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ShardError(f"{path} gives the tensor {short(name)} the type {short(dtype)}, which is unknown.")
    if not _naturals(shape) or len(shape) > 8:
        raise ShardError(f"{path} gives the tensor {short(name)} a shape that is not a short list of whole numbers.")
    if not _naturals(offsets) or len(offsets) != 2:
        raise ShardError(f"{path} gives the tensor {short(name)} offsets that are not two whole numbers.")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ShardError(f"{path} gives the tensor {short(name)} {end - begin} bytes, but its shape {short(shape)} in "
                         f"{dtype} takes {math.prod(shape) * DTYPE_BYTES[dtype]}.")  # fmt: skip
    return TensorEntry(dtype=dtype, shape=tuple(shape), begin=begin, end=end)


def _check_layout(path: Path, tensors: Mapping[str, TensorEntry], available: int) -> None:
    position = 0
    for name, entry in tensors.items():
        if entry.begin != position:
            fault = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise ShardError(f"{path} is damaged: the tensor {short(name)} {fault}.")
        position = entry.end
    if position > available:
        raise ShardError(f"{path} is truncated: its tensors take {position} bytes and {available} are there.")
    if position < available:
        raise ShardError(f"{path} has {available - position} bytes after its last tensor.")


def _naturals(value: Any) -> bool:
    # A bool is an int in Python, and numbers past 2**53 are no sizes: they only make messages and products long.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 53 for item in value)


def short(value: object) -> str:
    """`value` as a stranger wrote it, quoted and cut to 80 characters, so that a message stays one readable line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
