"""Fuzzing of the shard reader by mutation: `python -m tests.fuzz --inputs 1000000`.

Valid shards are cut, spliced, flipped and edited where a reader would look. Of each result the reader says in one sentence why
it refuses it, or it reads it; and then the safetensors library must read the same tensors from it. A crash, another exception,
a sentence that is none, a difference or an input that takes longer than `LIMIT_SECONDS` ends the run with the input in hex.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
import faulthandler
import json
from pathlib import Path
import random
import struct
import sys
import tempfile
import time

from safetensors import SafetensorError, deserialize

from forge.checkpoint.safetensors_header import Header, TensorEntry, header_bytes, read_header, tensors_finite
from forge.errors import ShardError
from forge.system import peak_resident_bytes
from forge.train.memory import MB, format_size

#: Seconds of processor time that one input may take; an honest one of this size takes 50 microseconds.
LIMIT_SECONDS = 1.0
#: Seconds without any progress after which the process ends itself with a traceback: the reader hangs.
HANG_SECONDS = 120.0
#: What a JSON reader, or one of headers, might trip over.
WORDS = (b'"__metadata__"', b'"dtype"', b'"shape"', b'"data_offsets"', b'"F32"', b'"BF16"', b'"I64"', b'"F8_E4M3"', b"[", b"]",
         b"{", b"}", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"null", b"true", b"NaN", b"Infinity", b"-1", b"-0", b"0.5",
         b"1e999", b"1e2", b"9007199254740992", b"18446744073709551616", b"9" * 400, b"[" * 200, b" " * 9, b"\0", b"\xff",
         b"\xef\xbb\xbf", "é".encode())  # fmt: skip


def seeds() -> list[bytes]:
    """Valid files: one tensor, three of different widths, an empty one, a scalar, metadata alone."""
    layouts: list[list[tuple[str, str, tuple[int, ...], int]]] = [
        [("a", "F32", (2, 3), 24)], [("w", "F64", (1,), 8), ("model.é", "BF16", (4,), 8), ("b", "U8", (5,), 5)],
        [("none", "F32", (0, 7), 0), ("scalar", "F16", (), 2)], []]  # fmt: skip
    made = []
    for layout in layouts:
        entries, end = {}, 0
        for name, dtype, shape, size in layout:
            entries[name] = TensorEntry(dtype, shape, end, end + size)
            end += size
        made.append(header_bytes(entries, {"format": "pt", "run_id": "0" * 32}) + bytes(range(1, end + 1)))
    return made


def mutated(draw: random.Random, valid: list[bytes]) -> bytes:
    """One to four changes of a valid file; half the time the length prefix is made to fit again."""
    made = bytearray(draw.choice(valid))
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        draw.choice(_CHANGES)(draw, made, valid)
    if len(made) > 8 and draw.random() < 0.5:
        end = made.rfind(b"}") + 1
        made[:8] = struct.pack("<Q", max(end - 8, 0))
    return bytes(made)


def _flip(draw: random.Random, made: bytearray, valid: list[bytes]) -> None:
    if made:
        made[draw.randrange(len(made))] ^= 1 << draw.randrange(8)


def _cut(draw: random.Random, made: bytearray, valid: list[bytes]) -> None:
    begin = draw.randrange(len(made) + 1)
    del made[begin : begin + draw.choice((1, 2, 8, 40, len(made)))]


def _insert(draw: random.Random, made: bytearray, valid: list[bytes]) -> None:
    at = draw.randrange(len(made) + 1)
    made[at:at] = draw.choice((draw.choice(WORDS), draw.randbytes(draw.randrange(1, 9))))


def _replace(draw: random.Random, made: bytearray, valid: list[bytes]) -> None:
    at = draw.randrange(len(made) + 1)
    word = draw.choice(WORDS)
    made[at : at + len(word)] = word


def _number(draw: random.Random, made: bytearray, valid: list[bytes]) -> None:
    digits = [at for at in range(8, len(made)) if 48 <= made[at] <= 57]
    if digits:
        made[draw.choice(digits)] = draw.randrange(48, 58)


def _length(draw: random.Random, made: bytearray, valid: list[bytes]) -> None:
    length = draw.choice((0, 1, 2, len(made), 1 << 20, (1 << 20) + 1, 100_000_000, 1 << 32, 1 << 63, (1 << 64) - 1,
                          draw.randrange(300), draw.getrandbits(64)))  # fmt: skip
    made[:8] = struct.pack("<Q", length)


def _splice(draw: random.Random, made: bytearray, valid: list[bytes]) -> None:
    other = draw.choice(valid)
    begin = draw.randrange(len(other))
    at = draw.randrange(len(made) + 1)
    made[at:at] = other[begin : begin + draw.randrange(1, 80)]


def _twice(draw: random.Random, made: bytearray, valid: list[bytes]) -> None:
    """A key or an entry twice: what two readers may read in two ways."""
    begin = draw.randrange(len(made) + 1)
    end = min(begin + draw.randrange(1, 120), len(made))
    made[end:end] = made[begin:end]


_CHANGES: tuple[Callable[[random.Random, bytearray, list[bytes]], None], ...] = (
    _flip, _cut, _insert, _replace, _number, _length, _splice, _twice)  # fmt: skip


def wrong(path: Path, content: bytes) -> str:
    """What is wrong with how one input is read; empty when nothing is."""
    path.write_bytes(content)
    try:
        header = read_header(path)
        tensors_finite(path)
    except ShardError as error:
        said = str(error)
        return "" if len(said) < 600 and said.isprintable() and said[-1] in ".)" else f"the sentence {said!r}"
    except Exception as error:  # noqa: BLE001 - this is what is looked for
        return f"{type(error).__name__}: {error}"
    return _differs(header, content)


def _differs(header: Header, content: bytes) -> str:
    try:
        theirs = {name: (tuple(tensor["shape"]), bytes(tensor["data"])) for name, tensor in deserialize(content)}  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        return f"accepted what the library refuses ({error})"
    ours = {name: (entry.shape, content[header.data_start + entry.begin : header.data_start + entry.end])
            for name, entry in header.tensors.items()}  # fmt: skip
    return "" if ours == theirs else "read other tensors than the library does"


def fuzz(inputs: int, seed: int, directory: Path) -> Iterator[tuple[int, str, bytes]]:
    """Yield number, what is wrong and the bytes of each input that is read wrongly or slowly."""
    draw, valid, path = random.Random(seed), seeds(), directory / "shard"
    for number in range(inputs):
        if number % 10_000 == 0:
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        content = mutated(draw, valid)
        started = time.process_time()
        fault = wrong(path, content)
        taken = time.process_time() - started
        if fault or taken > LIMIT_SECONDS:
            yield number, fault or f"took {taken:.1f} s of processor time", content
    faulthandler.cancel_dump_traceback_later()


def main() -> int:
    """Fuzz, and print one line of figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started, before, faults = time.monotonic(), peak_resident_bytes(), 0
    with tempfile.TemporaryDirectory() as directory:
        for number, fault, content in fuzz(options.inputs, options.seed, Path(directory)):
            faults += 1
            print(f"input {number}: {fault}: {content.hex()}")
            if faults == 20:
                break
    seconds = time.monotonic() - started
    print(json.dumps({"inputs": options.inputs, "seed": options.seed, "faults": faults, "seconds": round(seconds),
                      "a second": round(options.inputs / seconds), "peak memory": format_size(peak_resident_bytes()),
                      "of it for the inputs, MB": round((peak_resident_bytes() - before) / MB, 1)}))  # fmt: skip
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
