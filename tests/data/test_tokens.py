from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
from safetensors.numpy import load_file

from forge.data.tokens import TokenFile, TokenWriter
from forge.errors import StorageError

Documents = list[list[int]]


def write(path: Path, documents: Documents, vocab_size: int = 1000) -> TokenFile:
    with TokenWriter(path, vocab_size) as writer:
        for document in documents:
            writer.append(document)
    return TokenFile(path)


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 999), max_size=20), max_size=12),
    vocab_size=st.sampled_from([1000, 65536, 65537, 200_000]),
)
def test_round_trip_and_the_safetensors_library_agree(
    tmp_path_factory: pytest.TempPathFactory, documents: Documents, vocab_size: int
) -> None:
    path = tmp_path_factory.mktemp("tokens") / "t.safetensors"
    file = write(path, documents, vocab_size)
    assert len(file) == len(documents)
    assert [file.document(i).tolist() for i in range(len(file))] == documents
    assert file.vocab_size == vocab_size
    library = load_file(path)
    assert set(library) == {"tokens", "offsets"}
    assert library["tokens"].dtype == (np.uint16 if vocab_size <= 65536 else np.uint32)
    np.testing.assert_array_equal(library["tokens"], file.tokens)
    np.testing.assert_array_equal(library["offsets"], file.offsets)
    assert file.tokens.tolist() == [token for document in documents for token in document]


def test_the_bytes_depend_on_the_content_only(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2], [3]])
    write(tmp_path / "b", [[1, 2], [3]])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TokenWriter(tmp_path / "t", 10) as writer:
        writer.append([1])
        raise RuntimeError("killed")
    with pytest.raises(ValueError, match="outside the vocabulary"), TokenWriter(tmp_path / "t", 10) as writer:
        writer.append([10])
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    write(tmp_path / "t", [[1, 2]])
    with pytest.raises(RuntimeError), TokenWriter(tmp_path / "t", 10):
        raise RuntimeError("killed")
    assert TokenFile(tmp_path / "t").document(0).tolist() == [1, 2]


@pytest.mark.parametrize("keep", [0, 5, 8, 500, 1032, 1036, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "t"
    write(path, [[1, 2, 3], [4]])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StorageError, match="cannot be used"):
        TokenFile(path)


def test_damaged_headers_and_offsets_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write(path, [[1, 2, 3], [4]])
    good = path.read_bytes()
    for damaged in (
        good.replace(b'"I64"', b'"F64"'),
        good.replace(b'"tokens"', b'"tokenz"'),
        good.replace(b"{", b"[", 1),
        good[:-24] + (7).to_bytes(8, "little") + good[-16:],
        (1 << 60).to_bytes(8, "little") + good[8:],
        good + b"x",
    ):
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match="cannot be used"):
            TokenFile(path)
    with pytest.raises(StorageError, match="Cannot read"):
        TokenFile(tmp_path / "missing")


def test_a_file_cut_while_open_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t"
    file = write(path, [[1, 2, 3], [4]])
    with open(path, "r+b") as handle:
        handle.truncate(1033)
    with pytest.raises(StorageError, match="truncated"):
        file.document(0)


def test_index_errors_and_read_only(tmp_path: Path) -> None:
    file = write(tmp_path / "t", [[1, 2, 3]])
    with pytest.raises(IndexError):
        file.document(1)
    with pytest.raises(IndexError):
        file.document(-1)
    with pytest.raises(ValueError, match="read-only"):
        file.tokens[0] = 5
