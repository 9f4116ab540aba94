"""Text: the cache changes nothing, a seed decides, options are held to, bad ones are one sentence."""

from __future__ import annotations

from pathlib import Path
import re
import sys
from typing import Any

import pytest
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from forge.errors import ConfigError
from forge.evaluate.generate import Sampling, Token, choose, generate, generate_ids, penalised, pieces, tokens
from forge.model import names
from forge.model.attention import KeyValueCache
from forge.model.moe import MixtureLM, Routing
from forge.vocabulary import END_OF_TEXT, ROUTER_FILE, expert_file
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


@torch.inference_mode()
def test_a_cache_gives_what_the_whole_text_gives(model: MixtureLM) -> None:
    text = torch.randint(1, TINY.vocab_size, (2, 48), generator=torch.Generator().manual_seed(1))
    cache = KeyValueCache(TINY, batch=2, capacity=48)
    pieces = [model(piece, cache=cache) for piece in torch.split(text, [20, 1, 17, 1, 9], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(text), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="48 tokens cannot hold 49"):
        model(text[:, :1], cache=cache)


def test_a_seed_decides(model: MixtureLM) -> None:
    texts = [generate_ids(model, [1], 30, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_it_stops_at_an_end_of_text(model: MixtureLM) -> None:
    whole = generate_ids(model, [9], 30, temperature=0)
    end = whole[-1]
    new = [token.id for token in tokens(model, [9], Sampling(30, temperature=0), end_id=end)]
    assert new == whole[: whole.index(end)]


@torch.inference_mode()
def test_the_expert_of_a_token_has_the_largest_mean_weight_where_the_token_was_drawn(model: MixtureLM) -> None:
    text, spoke = [5, 6, 7], set[int]()
    for token in tokens(model, text, Sampling(40, temperature=1.0)):
        routing: list[Routing] = []
        model(torch.tensor([text]), routing=routing)
        shares = [torch.zeros(TINY.n_experts).scatter_(0, layer.experts_NK[-1], layer.weights_NK[-1]) for layer in routing]
        assert token.expert == int(torch.stack(shares).mean(dim=0).argmax())
        spoke.add(token.expert)
        text.append(token.id)
    assert len(spoke) > 1


def test_without_a_number_it_writes_what_fits(model: MixtureLM) -> None:
    assert len(list(tokens(model, [1] * 630, Sampling()))) == 10
    assert len(list(tokens(model, [1], Sampling()))) == 128


def test_choices_follow_the_distribution_and_its_cuts() -> None:
    logits_V = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    random = torch.Generator().manual_seed(0)

    def drawn(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> list[float]:
        sampling = Sampling(None, temperature, top_k, top_p)
        draws = [choose(logits_V, sampling, random) for _ in range(2000)]
        return [draws.count(token) / 2000 for token in range(4)]

    assert drawn() == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.04)
    assert drawn(top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.04)
    assert drawn(top_p=0.6) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.04)
    assert drawn(top_p=1e-9) == [0, 1, 0, 0]
    assert drawn(top_k=100, top_p=1.0) == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.04)
    assert drawn(temperature=0.5) == pytest.approx([1 / 30, 16 / 30, 4 / 30, 9 / 30], abs=0.04)
    assert drawn(temperature=0) == [0, 1, 0, 0]


def test_a_penalty_is_the_one_of_transformers(model: MixtureLM) -> None:
    logits_V = torch.linspace(-2, 2, 9)
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[1, 7, 7]]), logits_V[None])[0]
    assert torch.equal(penalised(logits_V, {7, 1}, 1.3), theirs)
    assert penalised(logits_V, {1}, 1.0) is logits_V
    again = [token.id for token in tokens(model, [5], Sampling(60, temperature=0, repetition_penalty=1e9))]
    assert len({5, *again}) == 61  # Nothing is said twice.


def test_text_comes_in_whole_characters_across_the_borders_of_tokens() -> None:
    """A token is a byte here, so that every character but ASCII's is several tokens."""
    tokenizer, said = byte_tokenizer(), "déjà → 日本 🙂."
    new = [Token(number, 0) for number in tokenizer.encode(said).ids]
    told = [piece.text for piece in pieces(tokenizer, new)]
    assert [text for text in told if text] == list(said) and len(told) == len(said.encode())
    assert [piece.text for piece in pieces(tokenizer, new[:-2])][-1] == "\ufffd"  # The smile lacks its last byte.


def test_text_is_what_its_tokens_say(model: MixtureLM) -> None:
    tokenizer, sampling = byte_tokenizer(), Sampling(40, temperature=1.0, seed=1)
    ids = generate_ids(model, tokenizer.encode("déjà").ids, 40, temperature=1.0, seed=1)
    text = generate(model, tokenizer, "déjà", sampling)
    assert text == tokenizer.decode(ids[: ids.index(0)] if 0 in ids else ids)
    assert text == generate(model, tokenizer, "déjà", sampling)


def test_bytes_that_are_no_text_are_a_prompt_too(model: MixtureLM) -> None:
    typed = b"caf\xe9".decode(errors="surrogateescape")  # As Python reads a command line.
    assert generate(model, byte_tokenizer(), typed, Sampling(4)) == generate(model, byte_tokenizer(), "caf?", Sampling(4))


def test_almost_no_temperature_is_the_most_likely_token(model: MixtureLM) -> None:
    assert generate_ids(model, [1, 2], 8, temperature=1e-40) == generate_ids(model, [1, 2], 8, temperature=0)


def test_an_empty_prompt_starts_a_document(model: MixtureLM) -> None:
    tokenizer = byte_tokenizer()
    expected = [token.id for token in tokens(model, [0], Sampling(8, temperature=0), end_id=0)]
    assert generate(model, tokenizer, "", Sampling(8, temperature=0)) == tokenizer.decode(expected)
    without = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(ConfigError, match="no end of text"):
        generate(model, without, "", Sampling(8))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": 0}, "top-k must be at least 1"),
        ({"top_p": 0.0}, "top-p must be above 0"),
        ({"top_p": 1.5}, "top-p must be above 0"),
        ({"repetition_penalty": 0.0}, "repetition penalty must be above 0"),
        ({"seed": 1 << 64}, "must fit in 64 bits"),
        ({"max_tokens": 0}, "must be at least 1"),
        ({"max_tokens": 640}, "do not fit in the model's context of 640"),
        ({"max_tokens": None, "prompt": [1] * 640}, "leave no room in the model's context of 640"),
        ({"prompt": [TINY.vocab_size]}, "not in the model's vocabulary"),
    ],
)
def test_a_bad_option_is_one_sentence(model: MixtureLM, options: dict[str, Any], sentence: str) -> None:
    prompt = options.pop("prompt", [1, 2])
    with pytest.raises(ConfigError, match=sentence):
        next(tokens(model, prompt, Sampling(**{"max_tokens": 4, **options})))


def test_the_directory_of_a_small_model_is_enough(tmp_path: Path) -> None:
    model = MixtureLM.load(write_mixture(tmp_path, TINY.model_copy(update={"n_experts": 1, "top_k": 1})))
    assert len(generate_ids(model, [1], 5)) == 5


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps tells what is resident on Linux alone")
def test_the_pages_of_an_expert_that_no_token_is_sent_to_are_never_read(tmp_path: Path) -> None:
    config = TINY.model_copy(update={"d_model": 256, "d_ff": 1536, "n_experts": 3, "top_k": 1})
    directory = write_mixture(tmp_path, config)
    favourite = {name: torch.zeros(shape) for name, shape in names.router_tensors(config).items()}
    save_file(favourite, directory / ROUTER_FILE)  # With all weights equal, top-k takes the same expert each time.
    model = MixtureLM.load(directory)
    assert len(generate_ids(model, [5, 6], 4)) == 4
    routing: list[Routing] = []
    model(torch.tensor([[5, 6]]), routing=routing)
    (used,) = set(torch.cat([layer.experts_NK for layer in routing]).flatten().tolist())
    for expert in range(3):
        size, resident = directory.joinpath(expert_file(expert)).stat().st_size, _resident(expert_file(expert))
        assert resident > 0.9 * size if expert == used else resident < 0.2 * size


def _resident(file: str) -> int:
    """Bytes of a mapped file that are in this process's page table."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-", line):
            inside = line.endswith(file)
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found
