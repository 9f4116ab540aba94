"""Read the documents of one file: .txt, .jsonl or .parquet, each also .gz or .zst, as a stream.

A .jsonl line or a .parquet row is a document. A .txt file is one document, or several when it is larger than
`MAX_DOCUMENT_BYTES`, so that memory stays bounded. Rows without text (null, or blank) are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from dataclasses import dataclass
import gzip
import io
import json
from pathlib import Path
import tempfile
from typing import IO, Any
import zlib

from forge.errors import DataError, storage_errors
from forge.vocabulary import CHUNK_BYTES

#: A .txt file is cut into documents of at most this many bytes, at the ends of lines. Large enough for any book (War
#: and Peace has 3.3 MB), small enough that a few copies of one fit into any machine.
MAX_DOCUMENT_BYTES = 8 << 20
#: Rows of a .parquet file that are decoded at a time.
PARQUET_ROWS = 256
FORMATS = (".parquet", ".jsonl", ".txt")
#: What a file may be packed with, by the end of its name -> what that is called.
PACKERS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Columns:
    """Which columns of .jsonl and .parquet files hold the text and, if any, the label."""

    text: str
    label: str | None = None


Row = tuple[str, str | None]


def format_of(name: str) -> str | None:
    """The format of a file by its name, without .gz or .zst: one of `FORMATS`, or None."""
    plain = name.lower()
    if packer := _packer(name):
        plain = plain.removesuffix(packer)
    return next((suffix for suffix in FORMATS if plain.endswith(suffix)), None)


def _packer(name: str) -> str | None:
    return next((suffix for suffix in PACKERS if name.lower().endswith(suffix)), None)


def read_file(path: Path, columns: Columns, name: str | None = None) -> Iterator[Row]:
    """Yield (text, label or None) of every document of one file, in order.

    Args:
        path: the file.
        columns: of .jsonl and .parquet files.
        name: what the file is called in errors and by which its format is known; its path if None.

    Raises:
        DataError: the file is missing, of an unknown format, damaged (the sentence has the line), not UTF-8, or lacks a
            column.
    """
    name = name or str(path)
    kind = format_of(name)
    if kind is None:
        raise DataError(f"The format of {name} is not known: use .txt, .jsonl or .parquet, each also .gz or .zst.")
    if kind == ".txt" and columns.label is not None:
        raise DataError(f"{name} is plain text and has no column {columns.label!r} for data.label_field.")
    packer = _packer(name)
    try:
        with open(path, "rb") as raw, _unpacked(raw, packer) as file:
            yield from _READERS[kind](file, name, columns)
    except FileNotFoundError as error:
        raise DataError(f"There is no file {name}; check data.source.") from error
    except (OSError, EOFError, zlib.error) as error:
        if packer and not getattr(error, "errno", None):
            raise DataError(f"{name} is not a whole {PACKERS[packer]} file; fetch it again.", detail=str(error)) from error
        raise DataError(f"Cannot read {name}: {getattr(error, 'strerror', None) or error}.") from error


def _unpacked(raw: IO[bytes], packer: str | None) -> contextlib.AbstractContextManager[IO[bytes]]:
    """What is in a file, as a stream; only a file that is not packed can seek."""
    if packer == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if packer == ".zst":
        import pyarrow as pa  # Brings zstd along; 60 MB resident once imported, as for .parquet.

        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"), CHUNK_BYTES)
    return contextlib.nullcontext(raw)


def _read_txt(file: IO[bytes], name: str, columns: Columns) -> Iterator[Row]:
    position = 0
    rest = b""
    while block := file.read(MAX_DOCUMENT_BYTES - len(rest)):
        block = rest + block
        cut = len(block)
        if cut == MAX_DOCUMENT_BYTES:
            cut = block.rfind(b"\n") + 1 or _character_end(block)
        yield _decode(block[:cut], name, position), None
        position += cut
        rest = block[cut:]
    if rest:
        yield _decode(rest, name, position), None


def _character_end(block: bytes) -> int:
    """The end of the last whole UTF-8 character of a block that has no end of line."""
    end = len(block)
    while end > len(block) - 4 and block[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1


def _decode(block: bytes, name: str, position: int) -> str:
    try:
        return block.decode("utf-8-sig" if position == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text at byte {position + error.start:,}; convert it first.") from error


def _read_jsonl(file: IO[bytes], name: str, columns: Columns) -> Iterator[Row]:
    number = 0
    try:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{name}, line {number} is not valid JSON.", detail=str(error)) from error
            if not isinstance(row, dict):
                raise DataError(f"{name}, line {number} is not a JSON object with a column {columns.text!r}.")
            for column in (columns.text, columns.label):
                if column is not None and column not in row:
                    raise _missing(f"{name}, line {number}", column, list(row))
            text = row[columns.text]
            if text is None:
                continue
            if not isinstance(text, str):
                raise DataError(f"{name}, line {number}: the column {columns.text!r} is not text.")
            yield text, _label(row[columns.label]) if columns.label is not None else None
    except (OSError, EOFError, zlib.error) as error:
        if getattr(error, "errno", None) or not number:
            raise
        raise DataError(f"{name} is not a whole {PACKERS[_packer(name) or '.gz']} file: it breaks off after line {number}; "
                        "fetch it again.", detail=str(error)) from error  # fmt: skip


def _read_parquet(file: IO[bytes], name: str, columns: Columns) -> Iterator[Row]:
    # Here, so that runs on other formats do not pay for pyarrow: 60 MB resident once imported.
    import pyarrow as pa
    import pyarrow.parquet as pq

    with contextlib.ExitStack() as stack:
        if _packer(name):  # a .parquet file is read from its end, so it needs a file that can seek
            packed, file = file, stack.enter_context(tempfile.TemporaryFile())
            _unpack(packed, file)
        try:
            parquet = stack.enter_context(pq.ParquetFile(file, pre_buffer=False))
            names = parquet.schema_arrow.names
            wanted = [column for column in (columns.text, columns.label) if column is not None]
            for column in wanted:
                if column not in names:
                    raise _missing(name, column, names)
            kind = parquet.schema_arrow.field(columns.text).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(f"{name}: the column {columns.text!r} is {kind} and not text.")
            for batch in parquet.iter_batches(batch_size=PARQUET_ROWS, columns=wanted):
                texts = batch.column(columns.text).to_pylist()
                labels: list[Any] = [None] * len(texts)
                if columns.label is not None:
                    labels = batch.column(columns.label).to_pylist()
                for text, label in zip(texts, labels, strict=True):
                    if text is not None:
                        yield text, _label(label)
        except pa.ArrowException as error:
            raise DataError(f"{name} is not a whole parquet file; fetch it again.", detail=str(error)) from error
        except OSError as error:
            raise DataError(f"{name} cannot be read as parquet; fetch it again.", detail=str(error)) from error


def _unpack(packed: IO[bytes], file: IO[bytes]) -> None:
    while chunk := packed.read(CHUNK_BYTES):
        with storage_errors(tempfile.gettempdir()):
            file.write(chunk)
    file.seek(0)


def _label(value: object) -> str | None:
    return None if value is None else str(value)


def _missing(where: str, column: str, present: list[str]) -> DataError:
    columns = ", ".join(sorted(present)[:10]) or "none"
    return DataError(f"{where} has no column {column!r} (it has: {columns}); set data.text_field or data.label_field.")


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
