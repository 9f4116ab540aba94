from __future__ import annotations

from collections.abc import Callable
import json
from pathlib import Path
import struct
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import safetensors.torch
import torch

from forge.checkpoint.safetensors_header import read_header, tensors_finite, write_renamed
from forge.errors import ShardError, StorageError


def raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(begin: int, end: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros((), np.int64)}, path, {"k": "v"})
    header = read_header(path)
    assert header.metadata == {"k": "v"}
    assert {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()} == {
        "a": ("I64", ()), "b": ("F32", (2, 3))}  # fmt: skip
    entry = header.tensors["b"]
    data = path.read_bytes()[header.data_start + entry.begin : header.data_start + entry.end]
    assert np.frombuffer(data, np.float32).tolist() == list(range(6))


BAD: dict[str, Callable[[Path], Path]] = {
    "too few for": lambda p: p.write_bytes(b"abc") and p or p,
    "claims a header of 104857600 bytes": lambda p: raw(p, {}, length=100 << 20),
    "claims a header of 18446744073709551615": lambda p: raw(p, {}, length=2**64 - 1),
    "truncated: its header": lambda p: raw(p, {}, length=1000),
    "not JSON.": lambda p: raw(p, b"{nope"),
    "header that is not JSON": lambda p: raw(p, b"[" * 100_000),
    "not a JSON object": lambda p: raw(p, b"[]"),
    "names a tensor or a key twice": lambda p: raw(p, b'{"a":{},"a":{}}'),
    "metadata that does not map": lambda p: raw(p, {"__metadata__": {"a": 1}}),
    "by other keys": lambda p: raw(p, {"a": {"dtype": "F32"}}),
    "the type 'F31'": lambda p: raw(p, {"a": tensor(0, 4, dtype="F31")}, b"1234"),
    "a shape that": lambda p: raw(p, {"a": tensor(0, 4, shape=[-1])}, b"1234"),
    "offsets that": lambda p: raw(p, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, True]}}, b"1234"),
    "takes 8": lambda p: raw(p, {"a": tensor(0, 4, shape=[2])}, b"1234"),
    "overlaps": lambda p: raw(p, {"a": tensor(0, 8), "b": tensor(4, 12)}, b"0" * 12),
    "leaves a gap": lambda p: raw(p, {"a": tensor(0, 4), "b": tensor(8, 12)}, b"0" * 12),
    "truncated: its tensors take 8": lambda p: raw(p, {"a": tensor(0, 8)}, b"1234"),
    "4 bytes after its last": lambda p: raw(p, {"a": tensor(0, 4)}, b"12345678"),
}


@pytest.mark.parametrize("message", BAD)
def test_refuses_what_is_not_sound(tmp_path: Path, message: str) -> None:
    path = BAD[message](tmp_path / "bad.safetensors")
    with pytest.raises(ShardError, match=message.replace("(", r"\(")) as caught:
        read_header(path)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        read_header(tmp_path / "none.safetensors")


def test_renaming_keeps_every_byte_of_the_data(tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = {"x": np.random.default_rng(0).normal(size=(700, 500)).astype(np.float32), "y": np.ones(3, np.float32)}
    save_file(tensors, source, {"old": "1"})
    write_renamed(source, target, {"x": "model.x"}, {"new": "2"})
    loaded = load_file(target)
    assert set(loaded) == {"model.x", "y"} and read_header(target).metadata == {"new": "2"}
    assert np.array_equal(loaded["model.x"], tensors["x"])
    with pytest.raises(ShardError, match="same name"):
        write_renamed(source, target, {"x": "y"}, {})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_finds_the_tensor_that_is_not_finite(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    path = tmp_path / "a.safetensors"
    largest = torch.full((600_000,), torch.finfo(dtype).max, dtype=dtype)
    safetensors.torch.save_file({"a": largest, "b": largest.clone()}, path)
    assert tensors_finite(path) is None
    bad = largest.clone()
    bad[-1] = value
    safetensors.torch.save_file({"a": largest, "b": bad}, path)
    assert tensors_finite(path) == "b"
