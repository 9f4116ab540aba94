"""A real assignment for the job `train-expert`, whose plans differ by enough memory to be told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
import torch

from forge.config import RunConfig, parse_config
from forge.data.tokens import TokenWriter
from forge.files import hash_file
from forge.model import names
from forge.model.lm import DenseLM
from forge.train.memory import built_for_cuda

#: What a training process of the smallest plan has come to when a limit of 100 MB stops it: PyTorch alone, as a pattern.
USED = r"[2-7]\d\dM" if built_for_cuda() else r"1\d\dM"
#: Micro-batches of 4, 2 and 1, and recomputation, are predicted some 100, 50 and 25 MB apart; a step takes under a second.
CONFIG = parse_config({
    "model": {"vocab_size": 512, "d_model": 64, "d_ff": 512, "n_layers": 6, "n_heads": 2, "n_experts": 2, "top_k": 1,
              "max_seq_len": 1024},
    "train": {"batch_size": 4, "checkpoint_seconds": 1e6, "shared": {"tokens": 1000}, "expert": {"tokens": 4 * 4 * 1024}},
})  # fmt: skip


def write_files(directory: Path, config: RunConfig = CONFIG) -> dict[str, Path]:
    """Shared components, a shared FFN and the tokens of a partition, as files in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    model = DenseLM(config.model)
    model.initialise(torch.Generator().manual_seed(0))
    files = {name: directory / f"{name}.safetensors" for name in ("shared", "shared_ffn", "train_tokens")}
    state = model.state_dict()
    save_file({name: state[name] for name in names.shared_tensors(config.model)}, files["shared"], {"format": "pt"})
    save_file({name: state[name] for name in names.ffn_tensors(config.model)}, files["shared_ffn"], {"format": "pt"})
    with TokenWriter(files["train_tokens"], config.model.vocab_size) as writer:
        for document in range(40):
            writer.append(np.random.default_rng(document).integers(0, config.model.vocab_size // 4, 300))
    return files


def assignment(directory: Path, config: RunConfig = CONFIG) -> dict[str, Any]:
    """What a coordinator would have a node train."""
    files = write_files(directory, config)
    return {"run_id": "run-1", "config_fingerprint": config.fingerprint, "config": config.model_dump(mode="json"),
            "partition": 1, "lease_id": "lease", "shared_sha256": hash_file(files["shared"]),
            **{name: str(path) for name, path in files.items()}}  # fmt: skip
