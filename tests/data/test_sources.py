from __future__ import annotations

from collections import Counter
import gzip
import io
import json
from pathlib import Path
import sysconfig
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge.config import DataConfig
from forge.data.hub import HubSource, select_files
from forge.data.readers import MAX_DOCUMENT_BYTES
from forge.data.sources import HashSet, documents, read_stdlib, split_articles, text_digest
from forge.errors import DataError, HubError

WIKITEXT_LINES = [
    "",
    " = Valkyria Chronicles III = \n",
    "",
    " Senjō no Valkyria 3 : <unk> Chronicles \n",
    "",
    " = = Gameplay = = \n",
    "",
    " As with previous games \n",
    " = x + 1 = \n",
    " goes on \n",
    "",
    " = A = \n",
    " \n",
    " Short . \n",
]
FIRST = ("rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet", "rows.parquet.gz", "rows.parquet.zst")


def parquet(rows: dict[str, list[Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(rows), buffer)
    return buffer.getvalue()


def texts(source: object, **options: Any) -> list[str]:
    return [document.text for document in documents(DataConfig(source=str(source), **options))]


def write_rows(directory: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    if ".jsonl" in name:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        data = parquet({key: [row[key] for row in rows] for key in rows[0]})
    path = directory / name
    path.write_bytes(packed(data, name))
    return path


def packed(data: bytes, name: str) -> bytes:
    if name.endswith(".zst"):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return bytes(sink.getvalue())
    return gzip.compress(data) if name.endswith(".gz") else data


@pytest.mark.parametrize("name", FIRST)
def test_rows_with_text_and_label(tmp_path: Path, name: str) -> None:
    rows = [{"body": f"text {i} ü", "kind": "ab"[i % 2], "n": i} for i in range(600)]
    path = write_rows(tmp_path, name, rows)
    config = DataConfig(source=str(path), text_field="body", label_field="kind")
    assert [(d.text, d.label) for d in documents(config)] == [(r["body"], r["kind"]) for r in rows]
    assert [d.label for d in documents(DataConfig(source=str(path), text_field="body"))][:2] == [None, None]


@pytest.mark.parametrize("name", FIRST)
def test_a_missing_column_is_named(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path, name, [{"body": "a"}])
    with pytest.raises(DataError, match=r"no column 'text' \(it has: body\)"):
        texts(path)
    with pytest.raises(DataError, match="no column 'kind'"):
        texts(path, text_field="body", label_field="kind")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_column_of_numbers_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="not text"):
        texts(write_rows(tmp_path, name, [{"text": 5}]))


def test_null_blank_and_equal_documents_are_passed_over(tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("one", None, "  \n", "two", "one", "two", "three")]
    assert texts(write_rows(tmp_path, "a.jsonl", rows)) == ["one", "two", "three"]


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert texts(tmp_path / "a.jsonl") == ["a?b"]


def test_a_broken_line_is_named_with_its_file_and_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 3 is not valid JSON"):
        texts(path)
    path.write_text('{"text": "a"}\n[1]\n')
    with pytest.raises(DataError, match="line 2 is not a JSON object"):
        texts(path)


@pytest.mark.parametrize(("end", "kind"), [("gz", "gzip"), ("zst", "zstd")])
def test_broken_archives_are_named(tmp_path: Path, end: str, kind: str) -> None:
    data = "".join(json.dumps({"text": f"{i} {i * 7919 % 1009}"}) + "\n" for i in range(50000)).encode()
    path = tmp_path / f"a.jsonl.{end}"
    path.write_bytes(packed(data, path.name)[:-2000])
    with pytest.raises(DataError, match=rf"a\.jsonl\.{end} is not a whole {kind} file: it breaks off after line \d+"):
        texts(path)
    for name in (f"a.txt.{end}", f"a.jsonl.{end}", f"a.parquet.{end}"):
        (tmp_path / name).write_bytes(b"no archive")
        with pytest.raises(DataError, match=f"not a whole {kind} file"):
            texts(tmp_path / name)


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet({"text": ["a"]})[:-9])
    with pytest.raises(DataError, match="parquet"):
        texts(tmp_path / "a.parquet")


def test_several_zstd_frames_are_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt.zst").write_bytes(packed(b"one, ", "a.zst") + packed(b"two", "a.zst"))
    assert texts(tmp_path / "a.txt.zst") == ["one, two"]


def test_text_files_by_glob_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfay")
    (tmp_path / "sub" / "c.txt.gz").write_bytes(gzip.compress(b"sea"))
    (tmp_path / "notes.md").write_text("no")
    assert texts(tmp_path / "*.txt") == ["ay", "bee"]
    assert texts(tmp_path / "**" / "*") == texts(tmp_path) == ["ay", "bee", "sea"]


def test_a_folder_of_every_format(tmp_path: Path) -> None:
    folder = tmp_path / "my [texts]"
    (folder / "sub").mkdir(parents=True)
    for i, end in enumerate(("", ".gz", ".zst")):
        (folder / f"a.txt{end}").write_bytes(packed(f"plain {i}".encode(), end))
        write_rows(folder / "sub", f"b.jsonl{end}", [{"text": f"json {i}"}])
        write_rows(folder / "sub", f"c.parquet{end}", [{"text": f"parquet {i}"}])
    assert texts(folder) == [f"{kind} {i}" for kind in ("plain", "json", "parquet") for i in range(3)]


def test_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path, "a.jsonl", [{"text": text} for text in ("a", "a", " ", "b", "a")])
    passed_over = Counter[str]()
    assert len(list(documents(DataConfig(source=str(path)), passed_over))) == 2
    assert passed_over == {"equal": 2, "blank": 1}


def test_a_large_text_file_becomes_several_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    line = "größer " * 30 + "\n"
    text = "".join(f"{i} {line}" for i in range(1 + MAX_DOCUMENT_BYTES // len(line)))
    path.write_text(text, encoding="utf-8")
    parts = texts(path)
    assert len(parts) == 2 and "".join(parts) == text and parts[0].endswith("\n")
    path.write_text("ü" + "é€" * (MAX_DOCUMENT_BYTES // 5), encoding="utf-8")
    assert sum(map(len, texts(path))) == 1 + 2 * (MAX_DOCUMENT_BYTES // 5)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "latin.txt").write_bytes(b"ab\xe4")
    for source, sentence in {
        "a.txt": "There is no file",
        "*.txt.gz": "No file matches",
        "*.md": "No .txt, .jsonl or .parquet file",
        "a.md": "format of .*a.md is not known",
        "empty": r"No .txt, .jsonl or .parquet file \(each also .gz or .zst\) is in .*empty",
        "latin.txt": "not UTF-8 text at byte 2",
    }.items():
        with pytest.raises(DataError, match=sentence):
            texts(f"{tmp_path}/{source}")
    with pytest.raises(DataError, match="no column 'kind'"):
        texts("python-stdlib", label_field="kind")
    with pytest.raises(DataError, match="plain text"):
        texts(tmp_path / "latin.txt", label_field="kind")


@given(limit=st.integers(1, 40))
def test_max_bytes_is_exact_up_to_a_character(tmp_path_factory: pytest.TempPathFactory, limit: int) -> None:
    path = tmp_path_factory.mktemp("max") / "a.jsonl"
    whole = ["ab€d", "éé", "xyz", "last"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in whole))
    read = texts(path, max_bytes=limit)
    joined = "".join(read)
    assert "".join(whole).startswith(joined)
    assert min(limit, len("".join(whole).encode())) - 2 <= len(joined.encode()) <= limit


def test_articles_of_wikitext() -> None:
    first, second = split_articles(WIKITEXT_LINES)
    assert first.startswith(" = Valkyria Chronicles III = \n\n Senjō")
    assert " = = Gameplay = = " in first and " = x + 1 = \n goes on" in first
    assert second == " = A = \n \n Short . "
    assert list(split_articles(["before", "", " = T = "])) == ["before\n\n = T = "]
    assert list(split_articles([])) == list(split_articles(["", " \n"])) == []


@given(st.lists(st.sampled_from([*WIKITEXT_LINES, "", "text"])))
def test_splitting_articles_loses_nothing_but_blank_starts(lines: list[str]) -> None:
    joined = "\n".join(line.rstrip("\n") for line in lines)
    assert "\n".join(split_articles(lines)).split() == joined.split()


def test_the_standard_library() -> None:
    read = list(documents(DataConfig(source="python-stdlib", max_bytes=3_000_000)))
    assert read == list(documents(DataConfig(source="python-stdlib", max_bytes=3_000_000)))
    assert len({document.text for document in read}) == len(read) > 50
    assert sum(len(document.text.encode()) for document in read) <= 3_000_000
    whole = texts("python-stdlib")
    assert any(text.startswith('The "assert" statement') for text in whole)
    assert (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8") in whole
    assert not any("class BasicSocketTests(" in text for text in whole)


def test_stdlib_leaves_tests_out_and_reads_old_encodings(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "test/t.py", "a/tests/t.py", "site-packages/s.py", "pydoc_data/topics.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "l.py").write_bytes(b"# coding: latin-1\n# \xe4\n")
    (tmp_path / "broken.py").write_bytes(b"# \xe4\n")
    assert list(read_stdlib(tmp_path)) == ["# b.py\n", "# coding: latin-1\n# ä\n", "# a/z.py\n"]


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 50), max_size=300))
def test_the_hash_set_is_a_set(values: list[int]) -> None:
    ours, theirs = HashSet(), set[int]()
    for value in values:
        assert ours.add(value) == ((value or 1) not in theirs)
        theirs.add(value or 1)


def test_the_hash_set_grows() -> None:
    ours = HashSet()
    values = [text_digest(str(i).encode()) for i in range(5000)]
    assert all(ours.add(value) for value in values) and not any(ours.add(value) for value in values)


def test_wikitext_from_a_hub(hub: Any) -> None:
    hub.files["Salesforce/wikitext"] = {
        "README.md": b"",
        "wikitext-103-raw-v1/test-00000-of-00001.parquet": parquet({"text": [" = No = "]}),
        "wikitext-103-raw-v1/train-00000-of-00002.parquet": parquet({"text": WIKITEXT_LINES[:6]}),
        "wikitext-103-raw-v1/train-00001-of-00002.parquet": parquet({"text": WIKITEXT_LINES[6:]}),
        "wikitext-2-raw-v1/train-00000-of-00001.parquet": parquet({"text": [" = No = "]}),
    }
    assert texts("wikitext-103") == list(split_articles(WIKITEXT_LINES))


def test_a_hub_data_set_is_fetched_as_far_as_it_is_read(hub: Any) -> None:
    hub.files["ann/set"] = {
        f"data/train-0000{i}.jsonl": f'{{"content": "part {i}", "text": 0, "kind": "k"}}\n'.encode() for i in range(3)
    }
    config = DataConfig(source="hf:ann/set:::content", label_field="kind")
    assert [(d.text, d.label) for d in documents(config)] == [(f"part {i}", "k") for i in range(3)]
    hub.fetched.clear()
    assert texts("hf:ann/set::train:content", max_bytes=6) == ["part 0"]
    assert len(hub.fetched) <= 1


def test_hub_errors(hub: Any) -> None:
    with pytest.raises(DataError, match="no public data set ann/none"):
        texts("hf:ann/none")
    hub.files["ann/set"] = {"README.md": b""}
    with pytest.raises(DataError, match="has no .parquet"):
        texts("hf:ann/set")
    for source in ("hf:", "hf:a:b:c:d:e"):
        with pytest.raises(DataError, match="must look like"):
            texts(source)
    hub.refuses = True
    with pytest.raises(HubError, match="ann/set cannot be fetched") as caught:
        texts("hf:ann/set")
    assert "403" in (caught.value.detail or "")


def test_which_files_a_source_means() -> None:
    names = ["en/train-0.parquet", "en/test-0.parquet", "de/train-0.parquet", "en/train-0.jsonl", "README.txt.md"]
    pick = select_files
    assert pick(names, HubSource("x", "en", None, None)) == ["en/train-0.parquet"]
    assert pick(names, HubSource("x", "en", "test", None)) == ["en/test-0.parquet"]
    assert pick(["all.txt", ".hidden.txt"], HubSource("x", None, None, None)) == ["all.txt"]
    assert pick(["en-train.txt", "de-train.txt"], HubSource("x", "de", None, None)) == ["de-train.txt"]
    with pytest.raises(DataError, match=r"several configs \(de, en\)"):
        pick(names, HubSource("x", None, None, None))
    with pytest.raises(DataError, match="split dev"):
        pick(names, HubSource("x", "en", "dev", None))
