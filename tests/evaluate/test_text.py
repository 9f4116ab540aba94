"""Texts of the user's under checkpoints of ours and of others, against transformers' own loss on the same windows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from click.testing import CliRunner
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
import torch
from torch.nn import functional as F
import transformers

from forge.cli import main
from forge.data.tokenizer import load_tokenizer
from forge.errors import ConfigError, DataError, StorageError
from forge.evaluate import text as text_module
from forge.evaluate.text import evaluate_text, read_tokenizer, start_of_text
from forge.files import write_json
from forge.model.moe import MixtureLM
from tests.evaluate.test_generate import byte_tokenizer
from tests.model.conftest import TINY, write_mixture

TEXTS = ["what is this? <|endoftext|> is no token here\n" * 6, "déjà vu, 1 2 3 — and the rest of it"]
CONTEXT = 32


def gpt2_like(directory: Path) -> None:
    """Byte-level BPE whose end of text is the last of the vocabulary, as GPT-2's is."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    named = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named})


def llama_like(directory: Path) -> None:
    """Not byte-level: a space is a letter of its own, and one is put before the text; `<s>` begins it."""
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trained = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=trained, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(8)
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named})


class Foreign(NamedTuple):
    """How somebody else saved their Mixtral."""

    tied: bool = False
    dtype: str = "float32"
    shard: str = "1GB"
    width: int = 128
    tokenizer: Any = staticmethod(gpt2_like)
    start: str = "<|endoftext|>"


FOREIGN = {
    "untied": Foreign(),
    "tied, sharded": Foreign(tied=True, shard="60KB"),
    "bfloat16, sharded": Foreign(dtype="bfloat16", shard="60KB"),
    "tied, bfloat16, of an odd width": Foreign(tied=True, dtype="bfloat16", width=200),
    "not byte-level": Foreign(tokenizer=llama_like, start="<s>", width=96),
}


def save(directory: Path, kind: Foreign) -> Path:
    directory.mkdir(exist_ok=True)
    kind.tokenizer(directory)
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=kind.width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, max_position_embeddings=CONTEXT, tie_word_embeddings=kind.tied,
        initializer_range=0.3)  # fmt: skip
    model: Any = transformers.MixtralForCausalLM(config)
    model.to(getattr(torch, kind.dtype)).save_pretrained(directory, max_shard_size=kind.shard)
    assert (directory / "model.safetensors.index.json").is_file() == (kind.shard != "1GB")
    return directory


def their_loss(directory: Path, start: str) -> tuple[float, int]:
    """transformers' own mean over the tokens of the same windows, in float32, and how many tokens there are."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    nats, count = 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, truncation=False)["input_ids"]
        ids = [tokenizer.convert_tokens_to_ids(start), *ids]
        for begin in range(0, len(ids) - 1, CONTEXT):
            window = torch.tensor([ids[begin : begin + CONTEXT + 1]])
            # transformers shifts the labels itself: the first is predicted from nothing and is left out.
            logits = model(window[:, :-1]).logits
            nats += float(F.cross_entropy(logits[0], window[0, 1:], reduction="sum"))
            count += window.shape[1] - 1
    return nats / count, count


@torch.inference_mode()
@pytest.mark.parametrize("kind", FOREIGN.values(), ids=FOREIGN)
def test_the_loss_of_any_mixtral_is_that_of_transformers(kind: Foreign, tmp_path: Path) -> None:
    directory = save(tmp_path, kind)
    loss, tokens = their_loss(directory, kind.start)
    size = sum(len(text.encode()) for text in TEXTS)
    result = evaluate_text(directory, iter(TEXTS))
    assert (result["tokens"], result["bytes"], result["window"], result["documents"]) == (tokens, size, CONTEXT, 2)
    assert tokens > 2 * CONTEXT and abs(loss - math.log(320)) > 0.2  # several windows of a model that is not flat
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(loss * tokens / math.log(2) / size, rel=1e-5)


def test_the_loss_is_transformers_own_where_one_window_holds_the_text(tmp_path: Path) -> None:
    """Their `labels=` loss, so that the sum above is not ours in disguise."""
    directory = save(tmp_path, Foreign())
    text = "a short one"
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = float(model(ids, labels=ids).loss)
    assert evaluate_text(directory, [text])["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [Foreign(), Foreign(shard="60KB")], ids=["one file", "sharded"])
def test_the_command_takes_a_checkpoint_of_others(kind: Foreign, tmp_path: Path) -> None:
    directory = save(tmp_path / "model", kind)
    (tmp_path / "text.txt").write_text(TEXTS[1], encoding="utf-8")
    outcome = CliRunner().invoke(main, ["evaluate", str(directory), "--data", str(tmp_path / "text.txt"), "--json"])
    assert (outcome.exit_code, outcome.stderr) == (0, ""), outcome.output
    assert json.loads(outcome.stdout)["loss"] == pytest.approx(evaluate_text(directory, [TEXTS[1]])["loss"])


def test_the_start_of_a_text_is_found_where_it_is_told(tmp_path: Path) -> None:
    save(tmp_path, Foreign())
    tokenizer = read_tokenizer(tmp_path)
    last = tokenizer.get_vocab_size(with_added_tokens=True) - 1
    config = json.loads((tmp_path / "config.json").read_text())

    def told(tokens: dict[str, Any], ids: dict[str, Any]) -> int:
        write_json(tmp_path / "tokenizer_config.json", tokens)
        write_json(tmp_path / "config.json", {**config, "bos_token_id": None, "eos_token_id": None, **ids})
        return start_of_text(tmp_path, tokenizer)

    assert told({"bos_token": None, "eos_token": {"content": "<|endoftext|>"}}, {"bos_token_id": 5}) == last
    assert told({"bos_token": "<of another model>"}, {"bos_token_id": 5, "eos_token_id": 6}) == 5
    assert told({}, {"eos_token_id": [7, 8]}) == 7
    assert told({}, {"bos_token_id": 9999, "eos_token_id": []}) == last
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    assert start_of_text(tmp_path, tokenizer) == last


def test_nothing_that_tells_where_a_text_begins_is_one_sentence(tmp_path: Path) -> None:
    save(tmp_path, Foreign(tokenizer=llama_like))
    (tmp_path / "tokenizer_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", {**config, "bos_token_id": None, "eos_token_id": None})
    with pytest.raises(DataError, match=r"which token a text begins with: name .* bos_token_id in config.json\.$"):
        evaluate_text(tmp_path, TEXTS)


def test_what_cannot_be_measured_is_one_sentence(tmp_path: Path) -> None:
    save(tmp_path, Foreign())
    for texts in ([], [""]):
        with pytest.raises(DataError, match="There is no text"):
            evaluate_text(tmp_path, texts)
    whole = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        evaluate_text(tmp_path, TEXTS)
    larger = Tokenizer.from_str(whole)
    larger.add_tokens([f"word{number}" for number in range(100)])
    larger.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="more tokens than the model beside it"):
        evaluate_text(tmp_path, TEXTS)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(StorageError, match=r"holds no tokenizer\.json"):
        evaluate_text(tmp_path, TEXTS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_mixture(tmp_path_factory.mktemp("model"), TINY)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


def test_text_is_measured_whole(directory: Path, tmp_path: Path) -> None:
    model, tokenizer = MixtureLM.load(directory), load_tokenizer(directory / "tokenizer.json")
    texts = ["what is this?", "déjà vu"]
    result = evaluate_text(directory, iter(texts))
    nats = 0.0
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([[0, *tokenizer.encode(text).ids]])
            logits = model(ids[:, :-1]) @ model.head_weight.T
            nats += float(F.cross_entropy(logits[0], ids[0, 1:], reduction="sum"))
    size = sum(len(text.encode()) for text in texts)
    assert (result["documents"], result["bytes"], result["tokens"]) == (2, size, size)
    assert result["loss"] == pytest.approx(nats / size, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_a_long_context_is_not_used_whole(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window is as long as the model's context, or as the longest that ordinary machines have the memory for."""
    text = "x y " * TINY.max_seq_len
    whole = evaluate_text(directory, [text])
    monkeypatch.setattr(text_module, "LONGEST_WINDOW", 10)
    cut = evaluate_text(directory, [text])
    assert whole["tokens"] == cut["tokens"] == whole["bytes"] == len(text)
    assert (whole["window"], cut["window"]) == (TINY.max_seq_len, 10) and whole["loss"] != cut["loss"]
