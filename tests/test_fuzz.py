"""Readers of what strangers write: whatever comes, a value or one short sentence of ours, at once and in little memory.

`python -m tests.fuzz --inputs 1000000` does it to the shard reader by mutation, and compares with the safetensors library.
"""

from __future__ import annotations

from collections.abc import Callable
import json
from pathlib import Path
import struct
import tracemalloc
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
import pytest

from forge.checkpoint.manifest import MAX_MANIFEST_BYTES, check_manifest, parse_manifest
from forge.checkpoint.safetensors_header import MAX_HEADER_BYTES, read_header
from forge.config import load_config, parse_config
from forge.errors import ConfigError, ForgeError, ShardError
from forge.invitation import MAX_CHARACTERS, Invitation
from tests.fuzz import fuzz

#: The same inputs every time, so that a red build is red again; a file is written for each, which takes the time.
FUZZ = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["F32", "BF16", "dtype", "__metadata__", 1 << 53, 1 << 64, -1]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | st.sampled_from(
        ["dtype", "shape", "data_offsets", "__metadata__", "a.weight"]), inner, max_size=4), max_leaves=12)  # fmt: skip
ENTRY = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "F33"]) | JSON,
    "shape": st.lists(st.integers(-1, 5), max_size=4) | JSON,
    "data_offsets": st.tuples(st.integers(-1, 64), st.integers(-1, 64)) | JSON})  # fmt: skip
HEADERS = st.dictionaries(st.text(max_size=6), ENTRY | JSON, max_size=3)
GOOD_HEADER = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
               "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]}, "__metadata__": {"format": "pt"}}  # fmt: skip


def shard(header: bytes, data: bytes = bytes(24), length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


GOOD = shard(json.dumps(GOOD_HEADER).encode())


def survives(read: Callable[[], Any], error: type[ForgeError]) -> None:
    """It returns, or raises the one error that it documents, as one short line."""
    try:
        read()
    except error as said:
        sentence = str(said)
        assert len(sentence) < 600 and sentence == sentence.strip() and sentence[-1] in ".?)", sentence
        assert sentence.isprintable() or "\n" not in sentence, sentence


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "file"


def _read_shard(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    survives(lambda: read_header(path), ShardError)


@FUZZ
@given(content=st.binary(max_size=200))
def test_any_bytes_as_a_shard(path: Path, content: bytes) -> None:
    _read_shard(path, content)


@FUZZ
@given(tree=HEADERS | JSON, data=st.binary(max_size=64), length=st.none() | st.integers(0, (1 << 64) - 1))
def test_any_header_of_a_shard(path: Path, tree: Any, data: bytes, length: int | None) -> None:
    _read_shard(path, shard(json.dumps(tree).encode(), data, length))


@FUZZ
@given(at=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255), cut=st.integers(0, len(GOOD)))
def test_a_shard_with_one_byte_changed_or_its_end_cut_off(path: Path, at: int, byte: int, cut: int) -> None:
    _read_shard(path, GOOD[:at] + bytes([byte]) + GOOD[at + 1 :])
    _read_shard(path, GOOD[:cut])


def test_mutated_shards_are_read_as_the_library_reads_them_or_refused_in_a_sentence(tmp_path: Path) -> None:
    assert list(fuzz(2000, 1, tmp_path)) == []


@pytest.mark.parametrize("text", [b"\\ud800", b"\\udfff\\ud800", b"\\ud83d\\ude00"])
def test_a_header_with_half_a_character_is_refused_as_the_library_does(path: Path, text: bytes) -> None:
    header = json.dumps({**GOOD_HEADER, "__metadata__": {"note": "HERE"}}).encode().replace(b"HERE", text)
    path.write_bytes(shard(header))
    if text == b"\\ud83d\\ude00":  # A whole one.
        assert read_header(path).metadata == {"note": "\U0001f600"}
        return
    with pytest.raises(ShardError, match="not JSON"):
        read_header(path)


@pytest.mark.parametrize("header", [
    b"[" * MAX_HEADER_BYTES, b'{"a":' * (MAX_HEADER_BYTES // 5), b" " * MAX_HEADER_BYTES, b"1" * MAX_HEADER_BYTES,
    b'{"a":"' + b"\\u0041" * (MAX_HEADER_BYTES // 6 - 9) + b'"}',
])  # fmt: skip
def test_the_worst_headers_of_the_size_that_is_read_take_little_memory(path: Path, header: bytes) -> None:
    path.write_bytes(shard(header))
    tracemalloc.start()
    try:
        with pytest.raises(ShardError):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 40 * MAX_HEADER_BYTES
    finally:
        tracemalloc.stop()


@FUZZ
@given(raw=st.binary(max_size=100) | JSON.map(lambda tree: json.dumps(tree).encode()))
@example(raw=b"[" * MAX_MANIFEST_BYTES)
@example(raw=b"9" * MAX_MANIFEST_BYTES)
@example(raw=b'{"partition": 1e999, "partition": NaN}')
@example(raw='{"partition": 0}'.encode("utf-16"))
@example(raw=b" " * (MAX_MANIFEST_BYTES + 1))
def test_any_bytes_as_a_manifest(raw: bytes) -> None:
    survives(lambda: parse_manifest(raw), ShardError)
    # None of them says what it must, not even by what Python takes for equal (true == 1 == 1.0).
    with pytest.raises(ShardError):
        check_manifest(raw, {"partition": 0, "lease_id": "1" * 32})


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12))  # fmt: skip
WORDS = st.sampled_from(["name: ", "model:\n  ", "train:\n  shared:\n    ", "d_model: ", "tokens: ", "- ", "&a ", "*a ", "{", "}",
                         "[", "]", "'", '"', "\n", "  ", "1e400", ".nan", "0x", "2001-99-99", "!!int x", "!!python/name:os",
                         "? ", ": ", "<<: ", "%", "@", "\t", "999999999999999999999", "0b", "1:2:3", "é", "\0"])  # fmt: skip


@FUZZ
@given(text=st.text(max_size=60) | st.lists(WORDS, max_size=25).map("".join))
@example(text=BOMB)
@example(text="name: " + "[" * 20_000)
@example(text="a: &a [*a]")
@example(text="name: 0x" + "f" * 20_000)
@example(text="name: " + "9" * 20_000)
@example(text="2001-99-99: 1")
@example(text="!!int x")
@example(text="!!python/object/apply:os.system ['true']")
def test_any_text_as_a_config(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="replace")
    survives(lambda: load_config(str(path)), ConfigError)


@FUZZ
@given(key=st.sampled_from(["model.d_model", "name", "train.shared.tokens", "model", "a.b", ""]), value=st.lists(
    WORDS, max_size=6).map("".join) | st.text(max_size=20))  # fmt: skip
def test_any_override(key: str, value: str) -> None:
    survives(lambda: load_config("smoke", [f"{key}={value}"]), ConfigError)


@FUZZ
@given(changes=st.dictionaries(st.sampled_from(["name", "seed", "model", "train", "assembly", "x"]), JSON, max_size=3))
def test_any_tree_as_a_coordinators_config(changes: dict[str, Any]) -> None:
    survives(lambda: parse_config({**load_config("smoke").model_dump(mode="json"), **changes}), ConfigError)


@FUZZ
@given(text=st.text(max_size=300) | st.from_regex(r"forge1_[A-Za-z0-9_\-=]{0,200}", fullmatch=True))
@example(text="forge1_" + "A" * MAX_CHARACTERS)
def test_any_text_as_an_invitation(text: str) -> None:
    survives(lambda: Invitation.parse(text), ConfigError)


@FUZZ
@given(secret=st.binary(min_size=32, max_size=32), at=st.integers(0, 150), letter=st.characters(codec="ascii"))
def test_an_invitation_is_read_as_it_was_written_and_not_with_a_letter_changed(secret: bytes, at: int, letter: str) -> None:
    written = Invitation(addresses=("10.0.0.1:7433", "[::1]:7433"), fingerprint=bytes(32), secret=secret)
    text = written.encode()
    assert Invitation.parse(text) == written
    at %= len(text)
    changed = text[:at] + letter + text[at + 1 :]
    if changed.strip() != text:
        with pytest.raises(ConfigError) as refused:
            Invitation.parse(changed)
        assert secret.hex() not in str(refused.value) and changed not in str(refused.value)
