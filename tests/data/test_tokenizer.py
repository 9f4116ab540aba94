from __future__ import annotations

from argparse import __file__ as argparse_file
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
from tokenizers import Tokenizer

from forge.data.tokenizer import (
    encode_documents,
    load_tokenizer,
    split_pieces,
    token_bytes,
    tokenizer_files,
    train_tokenizer,
)
from forge.errors import DataError
from forge.vocabulary import END_OF_TEXT_ID

CORPUS = [Path(argparse_file).read_text(encoding="utf-8"), "Größe, naïve café — 日本語 🙂\n"]
SAMPLES = [*CORPUS, "", " ", "\n\n  x\n", "a<|endoftext|>b", "it's I'LL\t\tgo  now", "\x00\x7f\u2028 é", "𝒳" * 5]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CORPUS, 600)


def test_the_shape_of_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 600
    assert tokenizer.token_to_id("<|endoftext|>") == END_OF_TEXT_ID
    assert train_tokenizer(iter(CORPUS), 600).to_str() == tokenizer.to_str()


def test_a_corpus_too_small_for_the_vocabulary_says_what_it_reaches() -> None:
    with pytest.raises(DataError, match=r"vocab_size: 5000: it gives (\d+) tokens; set model.vocab_size to \d+"):
        train_tokenizer(["hello world"], 5000)


@given(st.text())
def test_every_text_survives_and_bytes_add_up(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = encode_documents(tokenizer, [text])
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode())
    assert END_OF_TEXT_ID not in ids


def test_special_tokens_have_no_bytes(tokenizer: Tokenizer) -> None:
    sizes = token_bytes(tokenizer)
    assert sizes.shape == (600,) and sizes[0] == 0 and sizes[1:].min() == 1


@given(text=st.text(alphabet="ab1' .,\n\t\u00e9\u00a0"), limit=st.integers(8, 30))
def test_pieces_encode_as_the_whole(tokenizer: Tokenizer, text: str, limit: int) -> None:
    pieces = list(split_pieces(text, limit))
    assert "".join(pieces) == text and all(len(piece) <= limit for piece in pieces)
    if all(piece.startswith("\n") for piece in pieces[1:]):
        assert sum([tokenizer.encode(piece).ids for piece in pieces], []) == tokenizer.encode(text).ids


def test_large_documents_encode_as_the_whole(tokenizer: Tokenizer) -> None:
    large = CORPUS[0] * 4
    assert len(list(split_pieces(large))) > 1
    encoded = encode_documents(tokenizer, [large, "", "x"])
    assert encoded[0].tolist() == tokenizer.encode(large).ids
    assert [ids.size for ids in encoded[1:]] == [0, 1]


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_transformers_loads_it_and_encodes_equally(
    tokenizer: Tokenizer, tmp_path: Path, beside_a_model: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer_files(tokenizer, tmp_path, 128)
    if beside_a_model:
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 600})
        )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == 600
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == 0
    assert theirs.model_max_length == 128
    ours = load_tokenizer(tmp_path / "tokenizer.json", 600)
    for text in SAMPLES:
        if "<|endoftext|>" not in text:  # theirs reads it as the special token, as prompts need it
            ids = theirs(text, verbose=False)["input_ids"]
            assert ids == ours.encode(text).ids == encode_documents(ours, [text])[0].tolist()
            assert theirs.decode(ids) == text
    assert theirs("a<|endoftext|>b")["input_ids"][1] == 0


def test_reading_back_gives_the_same_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file, _ = tokenizer_files(tokenizer, tmp_path / "a", 128)
    again, _ = tokenizer_files(load_tokenizer(file), tmp_path / "b", 128)
    assert file.read_bytes() == again.read_bytes()
    np.testing.assert_array_equal(token_bytes(load_tokenizer(file)), token_bytes(tokenizer))


def test_what_another_program_left_in_the_file_cuts_no_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "one two three four five " * 20
    path, _ = tokenizer_files(tokenizer, tmp_path, 128)
    careless = Tokenizer.from_file(str(path))
    careless.enable_truncation(8)
    careless.enable_padding(length=8)
    careless.save(str(path))
    assert load_tokenizer(path).encode(text).ids == tokenizer.encode(text).ids


def test_tokenizers_that_cannot_be_used(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer file"):
        load_tokenizer(tmp_path / "tokenizer.json")
    path, _ = tokenizer_files(tokenizer, tmp_path, 128)
    with pytest.raises(DataError, match="has 600 tokens and model.vocab_size is 512; set it to 600"):
        load_tokenizer(path, 512)
    good = json.loads(path.read_text())
    path.write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer.json"):
        load_tokenizer(path)
    renamed = json.dumps(good).replace("<|endoftext|>", "</s>")
    path.write_text(renamed)
    with pytest.raises(DataError, match="has no <|endoftext|>"):
        load_tokenizer(path)
    moved = json.loads(json.dumps(good))
    vocabulary = moved["model"]["vocab"]
    vocabulary["!"], vocabulary["<|endoftext|>"] = 0, 1
    moved["added_tokens"][0]["id"] = 1
    path.write_text(json.dumps(moved))
    with pytest.raises(DataError, match="as id 1; it must be id 0"):
        load_tokenizer(path)
    short = json.loads(json.dumps(good))
    short["model"] = {"type": "BPE", "vocab": {"<|endoftext|>": 0, "a": 1}, "merges": []}
    path.write_text(json.dumps(short))
    with pytest.raises(DataError, match="not byte-level"):
        load_tokenizer(path)
