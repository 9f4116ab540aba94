"""A shard: one expert's tensors under their final names, with metadata that says what they belong to.

Written without copying the tensors, verified without loading them; torch is imported only to view its own tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
import math
from pathlib import Path
from typing import Any, Final

import numpy as np

from forge.checkpoint.safetensors_header import (
    DTYPE_BYTES,
    Header,
    TensorEntry,
    header_bytes,
    read_header,
    short,
    tensors_finite,
)
from forge.config import ModelConfig, RunConfig
from forge.errors import ShardError, storage_errors
from forge.files import RunDirectory, atomic_file
from forge.model import names
from forge.vocabulary import SHARD_FORMAT_VERSION, SHARD_KEYS

#: `model.dtype` of a config -> the name that safetensors uses.
SAFETENSORS_DTYPES: Final = {"float32": "F32", "bfloat16": "BF16"}
#: transformers refuses safetensors files that do not say which framework wrote them.
FORMAT: Final = {"format": "pt"}
_NUMPY_NAMES: Final = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def write_shard(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write tensors as a safetensors file, atomically, one tensor at a time and each straight from its memory.

    The same tensors and metadata give the same bytes. Tensors are laid out widest type first, then by name, as the
    safetensors library does, so that every tensor is aligned to its type.

    Args:
        path: file to write.
        tensors: name -> numpy array or torch tensor (any device; bfloat16 from torch only).
        metadata: strings for the header (a shard's are `SHARD_KEYS`); `format: pt` is added.

    Raises:
        ShardError: a tensor has a type that the format does not know.
        StorageError: the disk is full or the directory cannot be written.
    """
    described = {name: _describe(name, tensor) for name, tensor in tensors.items()}
    order = sorted(described, key=lambda name: (-DTYPE_BYTES[described[name][0]], name))
    entries: dict[str, TensorEntry] = {}
    position = 0
    for name in order:
        dtype, shape = described[name]
        end = position + math.prod(shape) * DTYPE_BYTES[dtype]
        entries[name] = TensorEntry(dtype=dtype, shape=shape, begin=position, end=end)
        position = end
    with atomic_file(path) as file:
        file.write(header_bytes(entries, {**FORMAT, **metadata}))
        for name in order:
            file.write(tensor_bytes(tensors[name]))


def publish_tensors(run: RunDirectory, name: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Put tensors into a blob of the run, by way of its file `work/NAME.safetensors`: the blob's `sha256` and `size`."""
    path = run.work / f"{name}.safetensors"
    write_shard(path, tensors, {})
    size = path.stat().st_size
    return {"sha256": run.blobs.adopt(path), "size": size}


def verify_shard(path: Path, config: RunConfig, *, partition: int, run_id: str, shared_sha256: str) -> dict[str, str]:
    """Check everything about a shard that can be checked without running it.

    Args:
        path: the shard.
        config: the run's config.
        partition: the partition whose expert it should be.
        run_id: the run it should belong to.
        shared_sha256: sha256 of the shared components it should have been trained on.

    Returns:
        The shard's metadata; every key of `SHARD_KEYS` is there, `tokens_seen` is a whole number, `final_loss` finite.

    Raises:
        ShardError: the shard is truncated or damaged, belongs to another run, partition, config or shared components,
            or a tensor is missing, foreign, misshapen, of another type or not finite; the sentence names it.
        StorageError: the file is missing or cannot be read.
    """
    header = read_header(path)
    expected = {"format_version": SHARD_FORMAT_VERSION, "run_id": run_id, "config_fingerprint": config.fingerprint,
                "shared_sha256": shared_sha256, "partition": str(partition)}  # fmt: skip
    _check_metadata(path, header.metadata, expected)
    _check_tensors(path, header, names.expert_tensors(config.model, partition), SAFETENSORS_DTYPES[config.model.dtype])
    offender = tensors_finite(path)
    if offender is not None:
        raise ShardError(f"The shard {path.name} holds a value that is not finite in the tensor {offender}.")
    _check_context_channels(path, header, config.model, partition)
    return header.metadata


_FOREIGN: Final = {
    "format_version": "is of another format version",
    "run_id": "belongs to another run",
    "config_fingerprint": "was trained with another config",
    "shared_sha256": "was trained on other shared components",
    "partition": "is the expert of another partition",
}


def _check_metadata(path: Path, metadata: Mapping[str, str], expected: Mapping[str, str]) -> None:
    missing = [key for key in SHARD_KEYS if key not in metadata]
    if missing:
        raise ShardError(f"The shard {path.name} does not say its {missing[0]}.")
    for key, wanted in expected.items():
        if metadata[key] != wanted:
            raise ShardError(f"The shard {path.name} {_FOREIGN[key]} ({key} {short(metadata[key])}, "
                             f"expected {wanted!r}).")  # fmt: skip
    if not (metadata["tokens_seen"].isascii() and metadata["tokens_seen"].isdigit()):
        raise ShardError(f"The shard {path.name} says tokens_seen {short(metadata['tokens_seen'])}, which is no count.")
    try:
        loss = float(metadata["final_loss"])
    except ValueError:
        loss = math.nan
    if not math.isfinite(loss):
        raise ShardError(f"The shard {path.name} says final_loss {short(metadata['final_loss'])}, which is no number.")


def _check_tensors(path: Path, header: Header, expected: Mapping[str, names.Shape], dtype: str) -> None:
    missing = [name for name in expected if name not in header.tensors]
    if missing:
        raise ShardError(f"The shard {path.name} lacks the tensor {missing[0]}.")
    foreign = [name for name in header.tensors if name not in expected]
    if foreign:
        raise ShardError(f"The shard {path.name} holds the tensor {short(foreign[0])}, which is not its expert's.")
    for name, shape in expected.items():
        entry = header.tensors[name]
        if entry.shape != shape:
            raise ShardError(f"The shard {path.name} has the tensor {name} in the shape {list(entry.shape)}; "
                             f"expected {list(shape)}.")  # fmt: skip
        if entry.dtype != dtype:
            raise ShardError(f"The shard {path.name} has the tensor {name} in {entry.dtype}; expected {dtype}.")


def _check_context_channels(path: Path, header: Header, model: ModelConfig, partition: int) -> None:
    """An expert must not write to the channels from which the routers of later layers read: training leaves them at zero."""
    with storage_errors(path), open(path, "rb") as file:
        for layer in range(model.n_layers):
            name = names.expert_name(layer, partition, "w2")
            entry = header.tensors[name]
            # The channels are the last rows of (d_model, ffn_width).
            size = model.context_channels * (entry.end - entry.begin) // model.d_model
            file.seek(header.data_start + entry.end - size)
            if np.frombuffer(file.read(size), dtype=np.uint8).any():
                raise ShardError(f"The shard {path.name} writes to the context channels, which are the router's, in the tensor "
                                 f"{name}.")  # fmt: skip


def _describe(name: str, tensor: Any) -> tuple[str, tuple[int, ...]]:
    text = tensor.dtype.name if isinstance(tensor, np.ndarray) else str(tensor.dtype).removeprefix("torch.")
    dtype = "BF16" if text == "bfloat16" else _NUMPY_NAMES.get(text)
    if dtype is None:
        raise ShardError(f"The tensor {name} has the type {text}, which cannot be written.")
    return dtype, tuple(int(size) for size in tensor.shape)


def tensor_bytes(tensor: Any) -> memoryview:
    """The bytes of a numpy array or torch tensor as a safetensors file holds them; a view of its memory if it can be."""
    if not isinstance(tensor, np.ndarray):
        import torch

        tensor = tensor.detach().cpu().contiguous()
        # numpy has no bfloat16; its bits travel as they are.
        tensor = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    array = np.ascontiguousarray(tensor)
    # The format is little-endian.
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return array.reshape(-1).view(np.uint8).data
