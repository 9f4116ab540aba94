"""Token files: one safetensors file of documents, written as a stream and read without loading it.

Layout: "tokens" (U16, or U32 from 65,537 tokens of vocabulary on; 1-D, all documents one after another) and "offsets"
(I64, documents + 1: document i is tokens[offsets[i]:offsets[i + 1]]). The header is padded to a fixed size, so that it
can be written last although it comes first. No torch here.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
import json
import os
from pathlib import Path
import sys
from types import TracebackType
from typing import IO, Any
import weakref

import numpy as np
import numpy.typing as npt

from forge.errors import StorageError, storage_errors
from forge.files import atomic_file
from forge.system import read_at

#: Bytes kept for the header: a JSON object of two tensors and the vocabulary's size (under 300 bytes); a multiple of 8, so
#: that the tokens are aligned.
HEADER_BYTES = 1024
#: Largest header that a reader accepts, so that a damaged length cannot make it allocate the machine's memory.
MAX_HEADER_BYTES = 1 << 20

IntArray = npt.NDArray[np.int64]
_DTYPES: dict[str, np.dtype[Any]] = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4")}


def token_dtype(vocab_size: int) -> str:
    """The safetensors name of the narrowest type that holds every id: "U16" or "U32"."""
    return "U16" if vocab_size <= 1 << 16 else "U32"


class TokenWriter:
    """Write documents to a token file; it appears, whole, when the `with` block ends without an error.

    Memory is eight bytes a document, whatever their length.

    Args:
        path: the file to make.
        vocab_size: tokens in the vocabulary; decides the type on disk and is recorded in the metadata.

    Raises:
        StorageError: the disk is full or the directory cannot be written.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path = path
        self.vocab_size = vocab_size
        self._code = token_dtype(vocab_size)
        self._offsets = array("q", [0])
        self._stack = ExitStack()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> TokenWriter:
        self._file = self._stack.enter_context(atomic_file(self.path))
        self._file.write(b"\0" * (8 + HEADER_BYTES))
        return self

    def append(self, ids: Sequence[int] | npt.NDArray[Any]) -> None:
        """Add one document of token ids (N,), without an end-of-text.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        assert self._file is not None, "use TokenWriter in a with block"
        array_N = np.asarray(ids, dtype=np.int64)
        if array_N.size and (array_N.min() < 0 or array_N.max() >= self.vocab_size):
            raise ValueError(f"a token id is outside the vocabulary of {self.vocab_size}")
        self._file.write(array_N.astype(_DTYPES[self._code]).tobytes())
        self._offsets.append(self._offsets[-1] + array_N.size)

    @property
    def documents(self) -> int:
        """Documents appended so far."""
        return len(self._offsets) - 1

    @property
    def tokens(self) -> int:
        """Tokens appended so far."""
        return self._offsets[-1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        file = self._file
        self._file = None
        if kind is not None or file is None:
            self._stack.__exit__(kind, error, trace)
            return
        try:
            self._finish(file)
        except BaseException:
            self._stack.__exit__(*sys.exc_info())
            raise
        self._stack.__exit__(None, None, None)

    def _finish(self, file: IO[bytes]) -> None:
        end = self.tokens * _DTYPES[self._code].itemsize
        header = {
            "__metadata__": {"vocab_size": str(self.vocab_size)},
            "tokens": {"dtype": self._code, "shape": [self.tokens], "data_offsets": [0, end]},
            "offsets": {
                "dtype": "I64",
                "shape": [len(self._offsets)],
                "data_offsets": [end, end + 8 * len(self._offsets)],
            },
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        with storage_errors(self.path):
            file.write(np.frombuffer(self._offsets, dtype=np.int64).astype("<i8").tobytes())
            file.seek(0)
            file.write(HEADER_BYTES.to_bytes(8, "little") + text.ljust(HEADER_BYTES))


class TokenFile:
    """A token file, opened read-only: the offsets are in memory (eight bytes a document), the tokens are not.

    `read` and `document` fetch exactly what is asked for, so that a process's resident memory does not grow with the
    corpus; pages of `tokens`, the memory map, count as resident once touched.

    Args:
        path: the file.

    Raises:
        StorageError: the file is missing, truncated, or not a token file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise StorageError(f"Cannot read the token file {path}: {error.strerror}.", detail=str(error)) from error
        weakref.finalize(self, os.close, self._descriptor)
        self.offsets: IntArray
        self.metadata: dict[str, str]
        self._open()

    def __len__(self) -> int:
        """Documents in the file."""
        return len(self.offsets) - 1

    @property
    def total_tokens(self) -> int:
        """Tokens in the file."""
        return int(self.offsets[-1])

    @property
    def vocab_size(self) -> int:
        """Vocabulary the file was written for."""
        return int(self.metadata.get("vocab_size", np.iinfo(self._dtype).max + 1))

    @property
    def lengths(self) -> IntArray:
        """Tokens of every document, (documents,)."""
        return np.diff(self.offsets)

    @cached_property
    def tokens(self) -> npt.NDArray[Any]:
        """All tokens as a read-only memory map, (total tokens,), uint16 or uint32."""
        if not self.total_tokens:
            return np.empty(0, dtype=self._dtype)
        return np.memmap(self.path, dtype=self._dtype, mode="r", offset=self._start, shape=(self.total_tokens,))

    def document(self, index: int) -> npt.NDArray[Any]:
        """Tokens of one document, (length,), uint16 or uint32, without an end-of-text.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self.read(int(self.offsets[index]), int(self.offsets[index + 1]))

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Tokens [start, stop) of the whole file, (stop - start,), copied with one read and no mapping.

        Raises:
            StorageError: the file became shorter since it was opened.
        """
        size = self._dtype.itemsize
        data = self._pread(self._start + start * size, (stop - start) * size)
        return np.frombuffer(data, dtype=self._dtype)

    def _pread(self, offset: int, count: int) -> bytes:
        parts: list[bytes] = []
        while count > 0:
            with storage_errors(self.path):
                part = read_at(self._descriptor, count, offset)
            if not part:
                raise self._damaged("it is truncated")
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _open(self) -> None:
        with storage_errors(self.path), open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise self._damaged("it is truncated or is another kind of file")
            try:
                header = json.loads(file.read(length))
                tokens, offsets = header["tokens"], header["offsets"]
                self._dtype = _DTYPES[tokens["dtype"]]
                (begin, end), (first, last) = tokens["data_offsets"], offsets["data_offsets"]
                (count,), (documents_1,) = tokens["shape"], offsets["shape"]
                self.metadata = dict(header.get("__metadata__", {}))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise self._damaged("its header is not a token file's") from error
            sound = (
                offsets["dtype"] == "I64" and begin == 0 and end == first == count * self._dtype.itemsize
                and documents_1 >= 1 and last - first == 8 * documents_1
            )  # fmt: skip
            if not sound:
                raise self._damaged("its header is not a token file's")
            if size != 8 + length + last:
                raise self._damaged(f"it has {size:,} bytes where {8 + length + last:,} were written")
            self._start = 8 + length
            file.seek(self._start + first)
            self.offsets = np.frombuffer(file.read(8 * documents_1), dtype="<i8").astype(np.int64)
        if self.offsets[0] != 0 or self.offsets[-1] != count or np.any(np.diff(self.offsets) < 0):
            raise self._damaged("its document boundaries are not in order")

    def _damaged(self, reason: str) -> StorageError:
        return StorageError(f"The token file {self.path} cannot be used: {reason}; delete it and run the stage again.")
