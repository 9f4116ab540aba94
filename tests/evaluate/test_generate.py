"""Text: the cache changes nothing, a seed decides, options are held to, bad ones are one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
import torch

from forge.errors import ConfigError
from forge.evaluate.generate import choose, generate, generate_ids
from forge.model.moe import MixtureLM
from forge.vocabulary import END_OF_TEXT
from tests.model.conftest import TINY, write_mixture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MixtureLM:
    return MixtureLM.load(write_mixture(tmp_path_factory.mktemp("model"), TINY))


def byte_tokenizer() -> Tokenizer:
    """A token a byte and an end of text, with ids that leave the rest of the vocabulary unused."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END_OF_TEXT: 0, **{byte: number for number, byte in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@torch.inference_mode()
def test_the_cache_gives_what_starting_over_gives(model: MixtureLM) -> None:
    text = [5, 6, 7]
    for _ in range(20):
        hidden_BTD = model(torch.tensor([text]))
        text.append(int((hidden_BTD[0, -1] @ model.head_weight.T).argmax()))
    assert generate_ids(model, [5, 6, 7], 20, temperature=0) == text[3:]
    assert generate_ids(model, [5, 6, 7], 20, temperature=1.0, top_k=1) == text[3:]


def test_a_seed_decides(model: MixtureLM) -> None:
    texts = [generate_ids(model, [1], 30, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_it_stops_at_an_end_of_text_and_tells_of_each_token(model: MixtureLM) -> None:
    whole = generate_ids(model, [9], 30, temperature=0)
    end = whole[-1]
    told: list[int] = []
    new = generate_ids(model, [9], 30, temperature=0, end_id=end, on_id=told.append)
    assert new == told == whole[: whole.index(end)]


def test_choices_follow_the_distribution_and_its_cuts() -> None:
    logits_V = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    random = torch.Generator().manual_seed(0)

    def drawn(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> list[float]:
        draws = [choose(logits_V, temperature, top_k, top_p, random) for _ in range(2000)]
        return [draws.count(token) / 2000 for token in range(4)]

    assert drawn() == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.04)
    assert drawn(top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.04)
    assert drawn(top_p=0.6) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.04)
    assert drawn(top_p=1e-9) == [0, 1, 0, 0]
    assert drawn(top_k=100, top_p=1.0) == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.04)
    assert drawn(temperature=0.5) == pytest.approx([1 / 30, 16 / 30, 4 / 30, 9 / 30], abs=0.04)
    assert drawn(temperature=0) == [0, 1, 0, 0]


def test_text_is_told_piece_by_piece_in_whole_characters(model: MixtureLM) -> None:
    pieces: list[str] = []
    tokenizer = byte_tokenizer()
    text = generate(model, tokenizer, "déjà", 40, temperature=1.0, seed=1, on_token=pieces.append)
    assert "".join(pieces) == text and len(pieces) > 1
    assert text == generate(model, tokenizer, "déjà", 40, temperature=1.0, seed=1)


def test_an_empty_prompt_starts_a_document(model: MixtureLM) -> None:
    tokenizer = byte_tokenizer()
    expected = generate_ids(model, [0], 8, temperature=0, end_id=0)
    assert generate(model, tokenizer, "", 8, temperature=0) == tokenizer.decode(expected)
    without = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(ConfigError, match="no end of text"):
        generate(model, without, "", 8)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": 0}, "top-k must be at least 1"),
        ({"top_p": 0.0}, "top-p must be above 0"),
        ({"top_p": 1.5}, "top-p must be above 0"),
        ({"max_tokens": 0}, "must be at least 1"),
        ({"max_tokens": 640}, "do not fit in the model's context of 640"),
        ({"prompt": [TINY.vocab_size]}, "not in the model's vocabulary"),
    ],
)
def test_a_bad_option_is_one_sentence(model: MixtureLM, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        generate_ids(model, **{"prompt": [1, 2], "max_tokens": 4, **options})


def test_the_directory_of_a_small_model_is_enough(tmp_path: Path) -> None:
    model = MixtureLM.load(write_mixture(tmp_path, TINY.model_copy(update={"n_experts": 1, "top_k": 1})))
    assert len(generate_ids(model, [1], 5)) == 5
