"""Small random models as files, written under the names of `forge.model.names`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
import torch
from torch import Tensor

from forge.checkpoint.hf import mixtral_config, write_index
from forge.config import ModelConfig
from forge.files import write_json
from forge.model import names
from forge.vocabulary import ROUTER_FILE, SHARED_FILE, expert_file

TINY = ModelConfig(vocab_size=384, d_model=64, d_ff=192, n_layers=2, n_heads=4, n_experts=4, top_k=2, max_seq_len=640)


def random_tensors(shapes: dict[str, names.Shape], generator: torch.Generator) -> dict[str, Tensor]:
    """Matrices of a scale that makes attention and routing decisive; norms near 1."""
    return {
        name: 1 + 0.1 * torch.randn(shape, generator=generator)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * (1.0 if "gate" in name else 0.15)
        for name, shape in shapes.items()
    }


def write_mixture(directory: Path, config: ModelConfig, seed: int = 0, *, same_ffn: bool = False) -> Path:
    """Write a mixture of random experts, or of n copies of one FFN, which is then also in ffn.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config.dtype)
    metadata = {"format": "pt"}

    def save(name: str, tensors: dict[str, Tensor]) -> None:
        save_file({key: value.to(dtype) for key, value in tensors.items()}, directory / name, metadata)

    save(SHARED_FILE, random_tensors(names.shared_tensors(config), generator))
    save(ROUTER_FILE, random_tensors(names.router_tensors(config), generator))
    ffn = random_tensors(names.ffn_tensors(config), generator)
    if same_ffn:
        save("ffn.safetensors", ffn)
    for expert in range(config.n_experts):
        shapes = names.expert_tensors(config, expert)
        copies = {name: tensor.clone() for name, tensor in zip(shapes, ffn.values(), strict=True)}
        save(expert_file(expert), copies if same_ffn else random_tensors(shapes, generator))
    write_json(directory / "config.json", mixtral_config(config))
    write_index(directory, config, {})
    return directory


@pytest.fixture
def mixture(tmp_path: Path) -> Callable[..., Path]:
    """Write a mixture for a config; returns its directory."""

    def write(config: ModelConfig = TINY, *, same_ffn: bool = False) -> Path:
        return write_mixture(tmp_path / "model", config, same_ffn=same_ffn)

    return write
