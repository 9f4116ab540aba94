"""Fit the router of a run: count the training tokens, write the context head, fit, and set each layer's temperature."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from forge.checkpoint.shard import publish_tensors, write_shard
from forge.config import RunConfig
from forge.data.packing import evaluation_windows
from forge.data.tokens import TokenFile
from forge.files import RunDirectory
from forge.model.lm import DenseLM, load_dense
from forge.model.names import gate_name, shared_tensors
from forge.router.context import add_context, count_tokens
from forge.router.fit import bayes_rows, fit_rows, fit_temperature
from forge.router.statistics import Array, LayerStatistics, collect, gate_inputs
from forge.train.loop import Progress
from forge.train.memory import temperature_sample
from forge.vocabulary import END_OF_TEXT_ID

#: Training tokens, over all partitions, whose counts the evidence is made of.
COUNTED_TOKENS = 20_000_000
#: Windows of each partition that say how large the residual stream is.
SCALE_WINDOWS = 8


def fit_router(run: RunDirectory, progress: Progress) -> dict[str, Any]:
    """Fit the router on the frozen shared components and put it into the run's blobs.

    Returns:
        Facts of the stage: the blobs of the router and of the shared components with their context head, and per layer
        the held-out token accuracy and the temperature's factor.
    """
    config = run.config
    shared, partitions = run.marker("shared"), run.marker("partition")
    assert shared is not None and partitions is not None
    model = load_dense(config.model, run.blobs.path(shared["shared"]["sha256"]),
                       run.blobs.path(shared["shared_ffn"]["sha256"]))  # fmt: skip
    files = partitions["partitions"]
    total = sum(file["tokens"] for file in files)

    def windows(file: dict[str, Any], tokens: int) -> Iterator[np.ndarray]:
        return _windows(run.blobs.path(file["train"]["sha256"]), config, max(config.model.max_seq_len, tokens))

    progress(stage="router", step=0, steps=len(files), message="counting tokens")
    counts_KV = np.stack([_count(TokenFile(run.blobs.path(file["train"]["sha256"])), config.model.vocab_size,
                                 COUNTED_TOKENS * file["tokens"] // total) for file in files])  # fmt: skip
    write_shard(run.data / "token-counts.safetensors", {"counts_KV": counts_KV}, {})
    add_context(model, counts_KV, chain.from_iterable(
        windows(file, SCALE_WINDOWS * config.model.max_seq_len) for file in files))  # fmt: skip
    if config.router.method == "bayes":
        rows = [bayes_rows(config.model, counts_KV)] * config.model.n_layers
    else:
        statistics = [LayerStatistics.empty(len(files), config.model.d_model) for _ in range(config.model.n_layers)]
        for file in files:
            collect(model, file["partition"], windows(file, round(config.router.tokens * file["tokens"] / total)), statistics)
            progress(stage="router", step=file["partition"] + 1, steps=len(files), message="collecting statistics")
        rows = [fit_rows(layer, config.router) for layer in statistics]
    tokens, share = temperature_sample(config.model)
    held_out = [_windows(run.blobs.path(file["validation"]["sha256"]), config, tokens) for file in files]
    factors, accuracies = temperatures(model, rows, held_out, share)
    dtype = getattr(torch, config.model.dtype)
    weights = dict(model.named_parameters())
    gates = {gate_name(layer): torch.from_numpy(factor * rows_KD).to(dtype)
             for layer, (factor, rows_KD) in enumerate(zip(factors, rows, strict=True))}  # fmt: skip
    with_context = {name: weights[name].detach().to(dtype) for name in shared_tensors(config.model)}
    return {"router": publish_tensors(run, "router", gates),
            "shared_with_context": publish_tensors(run, "shared-with-context", with_context),
            "token_accuracy": accuracies, "factors": factors}  # fmt: skip


def _count(file: TokenFile, vocab_size: int, tokens: int) -> Array:
    """The counts of documents from all over a file, of about so many tokens."""
    every = max(1, -(-file.total_tokens // max(1, tokens)))
    return count_tokens((file.document(index) for index in range(0, len(file), every)), vocab_size)


def temperatures(model: DenseLM, rows: Sequence[Array], held_out: Iterable[Iterable[np.ndarray]],
                 share: float = 1.0) -> tuple[list[float], list[float]]:  # fmt: skip
    """Per layer: the factor on the rows (1/T) that makes held-out labels most likely, and the token accuracy.

    Args:
        model: whose gate inputs the rows are for.
        rows: of every layer's gate, (K, D).
        held_out: the held-out windows of each partition.
        share: of their tokens that are kept, drawn with a fixed seed: every kept one costs K logits a layer.
    """
    random = np.random.default_rng(0)
    logits: list[list[Array]] = [[] for _ in rows]
    labels: list[int] = []
    for partition, windows in enumerate(held_out):
        for count, layers in gate_inputs(model, windows):
            kept_N = random.random(count) < share
            labels.extend([partition] * int(kept_N.sum()))
            for layer, x_ND in enumerate(layers):
                logits[layer].append(x_ND[kept_N] @ rows[layer].T)
    labels_N, factors, accuracies = np.asarray(labels), [], []
    for layer in range(len(rows)):
        logits_NK, logits[layer] = np.concatenate(logits[layer]), []
        factors.append(fit_temperature(logits_NK, labels_N))
        accuracies.append(float((logits_NK.argmax(axis=1) == labels_N).mean()))
    return factors, accuracies


def _windows(path: Path, config: RunConfig, tokens: int) -> Iterator[np.ndarray]:
    return evaluation_windows(TokenFile(path), config.model.max_seq_len, END_OF_TEXT_ID, tokens)
