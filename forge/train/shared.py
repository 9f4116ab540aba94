"""The shared phase: train embedding, attention, norms, LM head and the shared FFN as one dense model, then freeze them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from forge.checkpoint.shard import publish_tensors
from forge.config import RunConfig
from forge.data.packing import SequenceSampler
from forge.data.tokens import TokenFile
from forge.files import RunDirectory
from forge.model import names
from forge.model.lm import DenseLM
from forge.train.loop import LoopSettings, Progress, train
from forge.train.memory import Products, plan, report
from forge.train.precision import product_dtype, resolve_device
from forge.vocabulary import END_OF_TEXT_ID


def train_shared(run: RunDirectory, ram_bytes: int, progress: Progress, should_stop: Callable[[], bool],
                 device: str = "auto") -> dict[str, Any] | None:  # fmt: skip
    """Train the shared components and put them into the run's blobs; resumable at any instant.

    Returns:
        The facts of the stage (hashes of `shared` and `shared_ffn`, loss, tokens, maturity), or None when it was asked
        to stop before the end.

    Raises:
        MemoryBudgetError: one sequence at a time does not fit `ram_bytes`.
        TrainingError: the loss is not finite.
    """
    config = run.config
    device = resolve_device(device)
    dtype = product_dtype(device)
    products: Products = "bfloat16" if dtype == torch.bfloat16 else "float32"
    chosen = plan(config, "shared", ram_bytes, products)
    progress(stage="shared", plan=report(config, chosen, products))
    model = DenseLM(config.model)
    model.initialise(torch.Generator().manual_seed(config.seed))
    model.to(device)
    model.recompute = chosen.recompute
    model.compute_in(dtype)
    corpus = TokenFile(run.data / "corpus.safetensors")
    training = np.flatnonzero(np.load(run.data / "split.npy") == 0)
    sampler = SequenceSampler(corpus, config.model.max_seq_len, config.seed, END_OF_TEXT_ID, training)
    result = train(model, sampler, LoopSettings(
        phase=config.train.shared, batch_size=config.batch_size("shared"), sequence_length=config.model.max_seq_len,
        micro_batch=chosen.micro_batch, directory=run.work / "shared", stage="shared", device=device,
        checkpoint_seconds=config.train.checkpoint_seconds, dtype=dtype), progress, should_stop)  # fmt: skip
    if not result.finished:
        return None
    facts: dict[str, Any] = {"loss": result.loss, "tokens": result.tokens, "steps": result.steps, "maturity": maturity(config),
             "predicted_bytes": chosen.peak_bytes, "micro_batch": chosen.micro_batch}  # fmt: skip
    tensors = {name: p.detach().to("cpu", getattr(torch, config.model.dtype)) for name, p in model.named_parameters()}
    for part, expected in (("shared", names.shared_tensors(config.model)), ("shared_ffn", names.ffn_tensors(config.model))):
        facts[part] = publish_tensors(run, part, {name: tensors[name] for name in expected})
    return facts


def maturity(config: RunConfig) -> float:
    """Training tokens per non-embedding parameter of the shared components: too young ones cap every expert."""
    return config.train.shared.tokens / (config.model.dense_parameters - config.model.embedding_parameters)
