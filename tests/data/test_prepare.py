from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from forge.config import RunConfig, parse_config
from forge.data.prepare import prepare, split_documents
from forge.data.sources import documents, text_digest
from forge.data.tokenizer import load_tokenizer, tokenizer_files, train_tokenizer
from forge.data.tokens import TokenFile
from forge.errors import DataError

PHASE = {"tokens": 1000}


def run_config(source: Path | str, *, data: dict[str, Any] | None = None, **model: Any) -> RunConfig:
    return parse_config({
        "data": {"source": str(source), **(data or {})},
        "model": {"vocab_size": 300, "d_model": 16, "n_layers": 1, "n_heads": 2, "n_experts": 2, "max_seq_len": 16}
        | {key: value for key, value in model.items() if key != "tokenizer"},
        "tokenizer": {"path": model.get("tokenizer")},
        "train": {"shared": PHASE, "expert": PHASE},
    })  # fmt: skip


def write_corpus(path: Path, count: int = 60, words: int = 30) -> Path:
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            text = f"Document {i}: " + "the quick brown fox jumps over größere Hunde. " * (words // 8 + i % 3)
            file.write(json.dumps({"text": text, "kind": "xy"[i % 2]}) + "\n")
    return path


def fingerprint(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}


def test_everything_is_written_and_adds_up(tmp_path: Path) -> None:
    config = run_config(write_corpus(tmp_path / "c.jsonl"), data={"label_field": "kind"})
    told: list[tuple[int, int, str]] = []
    facts = prepare(config, tmp_path / "data", lambda *arguments: told.append(arguments))
    assert {name for name in fingerprint(tmp_path / "data")} == {
        "tokenizer.json", "tokenizer_config.json", "corpus.safetensors", "split.npy", "label.npy", "bytes.npy",
        "documents.json"}  # fmt: skip
    corpus = TokenFile(tmp_path / "data" / "corpus.safetensors")
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer.json", 300)
    split, label, sizes = (np.load(tmp_path / "data" / f"{name}.npy") for name in ("split", "label", "bytes"))
    source = list(documents(config.data))
    assert len(corpus) == len(split) == len(label) == facts["documents"] == len(source) == 60
    for i, document in enumerate(source):
        assert tokenizer.decode(corpus.document(i).tolist()) == document.text
        assert sizes[i] == len(document.text.encode())
        assert facts["labels"][label[i]] == document.label
    assert json.loads((tmp_path / "data" / "documents.json").read_text()) == {"labels": ["x", "y"]}
    for key in ("documents", "tokens", "bytes"):
        assert sum(part[key] for part in facts["splits"].values()) == facts[key]
    assert [part["documents"] for part in facts["splits"].values()] == [(split == k).sum() for k in range(3)]
    assert {message for _, _, message in told} == {"reading the corpus", "learning the tokenizer", "encoding"}
    assert all(done <= total or total == 0 for done, total, _ in told) and told[-1][0] == told[-1][1]


def test_running_again_gives_the_same_bytes(tmp_path: Path) -> None:
    config = run_config(write_corpus(tmp_path / "c.jsonl"))
    prepare(config, tmp_path / "a")
    prepare(config, tmp_path / "a")
    prepare(config, tmp_path / "b")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    assert (np.load(tmp_path / "a" / "label.npy") == -1).all()


def test_a_given_tokenizer_is_used_as_it_is(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "c.jsonl")
    file, _ = tokenizer_files(train_tokenizer(["other text " * 9, "much other text, " * 5], 270), tmp_path, 16)
    prepare(run_config(source, vocab_size=270, tokenizer=str(file)), tmp_path / "data")
    assert (tmp_path / "data" / "tokenizer.json").read_bytes() == file.read_bytes()
    with pytest.raises(DataError, match="has 270 tokens and model.vocab_size is 300"):
        prepare(run_config(source, tokenizer=str(file)), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_corpora_that_cannot_be_used(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(DataError, match="has no text"):
        prepare(run_config(empty), tmp_path / "data")
    with pytest.raises(DataError, match="7 documents, too few for model.n_experts: 2"):
        prepare(run_config(write_corpus(tmp_path / "few.jsonl", 7)), tmp_path / "data")
    with pytest.raises(DataError, match="too small for model.vocab_size: 20000"):
        prepare(run_config(write_corpus(tmp_path / "c.jsonl"), vocab_size=20000), tmp_path / "data")
    assert not (tmp_path / "data").exists()
    with pytest.raises(DataError, match=r"training tokens, too few for model.n_experts: 2 \(one sequence each is 8,194"):
        prepare(run_config(tmp_path / "c.jsonl", max_seq_len=4096), tmp_path / "data")


def test_the_smallest_corpus_has_every_split(tmp_path: Path) -> None:
    facts = prepare(run_config(write_corpus(tmp_path / "c.jsonl", 8)), tmp_path / "data")
    assert [facts["splits"][name]["documents"] for name in ("train", "validation", "test")] == [4, 2, 2]


@given(
    texts=st.lists(st.text(min_size=1), min_size=8, max_size=60, unique=True),
    n_experts=st.integers(1, 2),
    fractions=st.tuples(st.floats(0, 0.4), st.floats(0, 0.4)),
)
def test_every_split_has_enough_documents(texts: list[str], n_experts: int, fractions: tuple[float, float]) -> None:
    digests = np.array([text_digest(text.encode("utf-8", "replace")) for text in texts], dtype=np.uint64)
    counts = np.bincount(split_documents(digests, n_experts, *fractions), minlength=3)
    assert counts[1] >= n_experts and counts[2] >= n_experts


@given(data=st.data(), fractions=st.tuples(st.floats(0.02, 0.3), st.floats(0.02, 0.3)))
def test_a_document_keeps_its_split_when_others_come_and_go(
    data: st.DataObject, fractions: tuple[float, float]
) -> None:
    digests = np.array([text_digest(f"document {i}".encode()) for i in range(3000)], dtype=np.uint64)
    chosen = np.sort(np.random.default_rng(data.draw(st.integers(0, 99))).permutation(3000)[:2500])
    whole = split_documents(digests, 2, *fractions)
    np.testing.assert_array_equal(split_documents(digests[chosen], 2, *fractions), whole[chosen])
    order = np.random.default_rng(0).permutation(3000)
    np.testing.assert_array_equal(split_documents(digests[order], 2, *fractions), whole[order])
    shares = np.bincount(whole, minlength=3) / 3000
    np.testing.assert_allclose(shares[1:], fractions, atol=0.03)
