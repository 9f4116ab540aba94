"""vLLM's loader on paper: where `load_weights` of its models/mixtral.py (commit f0e26957) puts every tensor of ours.

vLLM itself needs a graphics card or a build of its own. What is written down here of it: parts of names that it replaces, and the
shapes of its parameters. Config keys are read by transformers' own MixtralConfig, as vLLM does.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import MixtralConfig

from forge.config import ModelConfig
from forge.files import read_json
from forge.vocabulary import INDEX_FILE
from tests.model.conftest import write_mixture

TINY = ModelConfig(vocab_size=384, d_model=64, d_ff=192, n_layers=2, n_heads=4, n_experts=3, top_k=2, max_seq_len=640)
#: Part of a tensor's name -> the parameter that takes it, with others: stacked_params_mapping and get_expert_mapping.
STACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
EXPERTS = {"w1.weight": "w13_weight", "w3.weight": "w13_weight", "w2.weight": "w2_weight"}


def loaded(directory: Path) -> dict[str, list[tuple[int, ...]]]:
    """Parameter of vLLM -> shapes of the tensors that it is given."""
    found: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for file in sorted(set(read_json(directory / INDEX_FILE)["weight_map"].values())):
        with safe_open(directory / file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                shape = tuple(tensors.get_slice(name).get_shape())
                head, _, expert = name.partition(".experts.")
                if expert:
                    number, part = expert.split(".", 1)
                    assert int(number) < TINY.n_experts
                    found[f"{head}.experts.{EXPERTS[part]}"].append(shape)
                else:
                    part = next((part for part in STACKED if part in name), "")
                    found[name.replace(part, STACKED[part]) if part else name].append(shape)
    return found


@pytest.mark.parametrize("config", [TINY, TINY.model_copy(update={"head_dim": 32, "n_kv_heads": 2}),
                                    TINY.model_copy(update={"tie_embeddings": False})])  # fmt: skip
def test_every_parameter_gets_its_parts_and_nothing_is_left_over(config: ModelConfig, tmp_path: Path) -> None:
    directory = write_mixture(tmp_path / "model", config)
    said = MixtralConfig.from_pretrained(directory)
    assert said.architectures == ["MixtralForCausalLM"]
    heads, kv, size = said.num_attention_heads, said.num_key_value_heads, said.head_dim
    hidden, inner, experts = said.hidden_size, said.intermediate_size, said.num_local_experts
    expected: dict[str, list[tuple[int, ...]]] = {
        "model.embed_tokens.weight": [(said.vocab_size, hidden)], "model.norm.weight": [(hidden,)]}  # fmt: skip
    if not said.tie_word_embeddings:  # When they are tied, lm_head.weight is the embedding and is no parameter of its own.
        expected["lm_head.weight"] = [(said.vocab_size, hidden)]
    for layer in range(said.num_hidden_layers):
        expected |= {f"model.layers.{layer}.{name}": shapes for name, shapes in {
            "input_layernorm.weight": [(hidden,)], "post_attention_layernorm.weight": [(hidden,)],
            "self_attn.qkv_proj.weight": [(heads * size, hidden), (kv * size, hidden), (kv * size, hidden)],
            "self_attn.o_proj.weight": [(hidden, heads * size)], "block_sparse_moe.gate.weight": [(experts, hidden)],
            "block_sparse_moe.experts.w13_weight": [(inner, hidden)] * 2 * experts,
            "block_sparse_moe.experts.w2_weight": [(hidden, inner)] * experts}.items()}  # fmt: skip
    assert {name: sorted(shapes) for name, shapes in loaded(directory).items()} == {
        name: sorted(shapes) for name, shapes in expected.items()}  # fmt: skip
    assert said.rope_parameters["rope_theta"] == config.rope_theta and said.sliding_window is None
