"""transformers is the oracle: the same directory, the same logits, the same text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
import transformers

from forge.config import ModelConfig
from forge.evaluate.generate import generate_ids
from forge.model.moe import MixtureLM
from tests.model.conftest import TINY

VARIANTS = {
    "plain": TINY,
    "grouped-queries": TINY.model_copy(update={"n_kv_heads": 2}),
    "untied": TINY.model_copy(update={"tie_embeddings": False, "n_kv_heads": 1, "rope_theta": 5e5, "norm_eps": 1e-6}),
    "top-1": TINY.model_copy(update={"top_k": 1}),
}


def oracle(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def tokens(count: int) -> Tensor:
    return torch.randint(1, TINY.vocab_size, (1, count), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def logits(model: MixtureLM, tokens_BT: Tensor) -> Tensor:
    hidden_BTD: Tensor = model(tokens_BT)
    return hidden_BTD @ model.head_weight.T


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_greedy_text_are_those_of_transformers(
    config: ModelConfig, mixture: Callable[..., Path]
) -> None:
    directory = mixture(config)
    theirs, ours = oracle(directory), MixtureLM.load(directory)
    tokens_BT = tokens(512)
    with torch.inference_mode():
        expected = theirs(tokens_BT).logits
    assert expected.std() > 0.5  # a flat model would agree with anything
    assert (logits(ours, tokens_BT) - expected).abs().max() < 1e-4

    prompt = tokens_BT[:, :16]
    written = theirs.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate_ids(ours, prompt[0].tolist(), 64, temperature=0.0) == written[0, 16:].tolist()


def test_a_directory_saved_by_transformers_loads(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs: Any = transformers.MixtralForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    tokens_BT = tokens(100) % 300
    with torch.inference_mode():
        expected = theirs(tokens_BT).logits
    assert (logits(MixtureLM.load(tmp_path), tokens_BT) - expected).abs().max() < 1e-4
