"""A run that has published random shared components, and shards for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
import torch
from torch import Tensor

from forge.checkpoint.shard import write_shard
from forge.config import RunConfig, parse_config
from forge.files import RunDirectory, write_json
from forge.model import names
from forge.vocabulary import END_OF_TEXT, SHARD_FORMAT_VERSION

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {"vocab_size": 260, "d_model": 32, "d_ff": 96, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
              "n_experts": 3, "top_k": 2, "max_seq_len": 64, "context_channels": 4},
    "train": {"shared": {"tokens": 1000}, "expert": {"tokens": 1000}},
}  # fmt: skip


def tiny_config(**model: Any) -> RunConfig:
    return parse_config({**TINY, "model": {**TINY["model"], **model}})


def random_tensors(shapes: dict[str, names.Shape], seed: int, dtype: str = "float32") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: ((1.0 if len(shape) == 1 else 0.0) + 0.1 * torch.randn(shape, generator=generator))
             .to(getattr(torch, dtype)) for name, shape in shapes.items()}  # fmt: skip
    for name in drawn:
        if name.endswith("w2.weight"):
            drawn[name][-TINY["model"]["context_channels"] :] = 0
    return drawn


def write_tokenizer(directory: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({END_OF_TEXT: 0, **{byte: 1 + i for i, byte in enumerate(alphabet)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})


def publish_run(root: Path, config: RunConfig | None = None) -> RunDirectory:
    config = config or tiny_config()
    run = RunDirectory.open(root, config)
    write_tokenizer(run.data)
    facts: dict[str, Any] = {"run_id": run.run_id, "config_fingerprint": config.fingerprint, "partitions": []}
    shapes = {"shared_with_context": names.shared_tensors, "router": names.router_tensors, "shared_ffn": names.ffn_tensors}
    for seed, (part, tensors) in enumerate(shapes.items()):
        path = run.work / f"{part}.safetensors"
        write_shard(path, random_tensors(tensors(config.model), seed, config.model.dtype), {})
        size = path.stat().st_size
        facts[part] = {"sha256": run.blobs.adopt(path), "size": size}
    facts["shared"] = facts["shared_with_context"]
    run.finish("publish", facts)
    return run


def shard_metadata(run: RunDirectory, expert: int, **changed: str) -> dict[str, str]:
    published = run.marker("publish")
    assert published is not None
    return {
        "run_id": run.run_id, "config_fingerprint": run.config.fingerprint,
        "shared_sha256": published["shared"]["sha256"], "partition": str(expert), "tokens_seen": "1000",
        "final_loss": "3.5", "format_version": SHARD_FORMAT_VERSION, **changed,
    }  # fmt: skip


def write_expert(run: RunDirectory, partition: int, seed: int | None = None) -> Path:
    """A shard of random weights, in the run's work directory."""
    path = run.work / f"expert-{partition}.safetensors"
    model = run.config.model
    seed = 100 + partition if seed is None else seed
    tensors = random_tensors(names.expert_tensors(model, partition), seed, model.dtype)
    write_shard(path, tensors, shard_metadata(run, partition))
    return path


def make_shard(run: RunDirectory, partition: int, seed: int | None = None) -> str:
    """The same as a blob; returns its sha256."""
    return run.blobs.adopt(write_expert(run, partition, seed))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return publish_run(tmp_path / "run")
