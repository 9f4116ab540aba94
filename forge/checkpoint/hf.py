"""The Hugging Face directory that the assembled model is: a stock `MixtralForCausalLM` checkpoint in several files.

shared.safetensors · router.safetensors · expert-NNN.safetensors · model.safetensors.index.json · config.json ·
generation_config.json · tokenizer.json · tokenizer_config.json. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from forge.checkpoint.safetensors_header import DTYPE_BYTES, read_header
from forge.checkpoint.shard import SAFETENSORS_DTYPES
from forge.config import ModelConfig
from forge.errors import StorageError
from forge.files import link_or_copy, write_json
from forge.model import names
from forge.vocabulary import END_OF_TEXT_ID, INDEX_FILE, ROUTER_FILE, SHARED_FILE, expert_file

CONFIG_FILE: Final = "config.json"
GENERATION_FILE: Final = "generation_config.json"
#: Copied from the run's data directory; the first must be there.
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json")


def mixtral_config(model: ModelConfig) -> dict[str, Any]:
    """`config.json` of the assembled model.

    transformers 5 reads the rotary base from `rope_parameters`, older readers (llama.cpp, vLLM, transformers 4) from
    `rope_theta`; likewise `dtype` and `torch_dtype`. Both forms are written, and they agree.
    """
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "sliding_window": None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "num_local_experts": model.n_experts,
        "num_experts_per_tok": model.top_k,
        "router_jitter_noise": 0.0,
        "router_aux_loss_coef": 0.0,
        "output_router_logits": False,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "use_cache": True,
        "dtype": model.dtype,
        "torch_dtype": model.dtype,
    }


def generation_config() -> dict[str, Any]:
    """`generation_config.json`: where a text begins and ends, and nothing that would change how it is sampled."""
    return {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID, "pad_token_id": END_OF_TEXT_ID}


def weight_map(model: ModelConfig) -> dict[str, str]:
    """Every tensor of the assembled model -> the file it is in."""
    files = dict.fromkeys(names.shared_tensors(model), SHARED_FILE)
    files |= dict.fromkeys(names.router_tensors(model), ROUTER_FILE)
    for expert in range(model.n_experts):
        files |= dict.fromkeys(names.expert_tensors(model, expert), expert_file(expert))
    return files


def write_index(directory: Path, model: ModelConfig, metadata: Mapping[str, Any]) -> None:
    """Write the index that makes the files one checkpoint, atomically.

    Args:
        directory: the model directory; `shared.safetensors` and `router.safetensors` must be in it.
        model: the architecture.
        metadata: what to say beside `total_size` (bytes of all tensors).

    Raises:
        StorageError: a file is missing or the directory cannot be written.
    """
    size = total_size(directory, model)
    write_json(directory / INDEX_FILE, {"metadata": {"total_size": size, **metadata}, "weight_map": weight_map(model)})


def total_size(directory: Path, model: ModelConfig) -> int:
    """Bytes of all tensors of the model in a directory, as its index says them.

    Raises:
        ShardError, StorageError: the file of the shared components or of the router is not sound, or missing.
    """
    total = model.n_experts * model.expert_parameters * DTYPE_BYTES[SAFETENSORS_DTYPES[model.dtype]]
    return total + sum(max((entry.end for entry in read_header(directory / name).tensors.values()), default=0)
                       for name in (SHARED_FILE, ROUTER_FILE))  # fmt: skip


def write_configuration(directory: Path, model: ModelConfig, tokenizer_directory: Path) -> None:
    """Write `config.json` and `generation_config.json` and put the tokenizer's files beside them.

    Raises:
        StorageError: the tokenizer is missing or the directory cannot be written.
    """
    if not (tokenizer_directory / TOKENIZER_FILES[0]).is_file():
        raise StorageError(f"{tokenizer_directory} holds no {TOKENIZER_FILES[0]}: run the prepare stage first.")
    for name in TOKENIZER_FILES:
        if (tokenizer_directory / name).is_file():
            link_or_copy(tokenizer_directory / name, directory / name)
    write_json(directory / GENERATION_FILE, generation_config())
    write_json(directory / CONFIG_FILE, mixtral_config(model))
