"""The context head: what the text so far is about, for the router to read, in closed form and in stock Mixtral.

A token's own state says too little about its document. So the last key/value head of every layer is kept free in the
shared phase (its weights stay zero) and filled in here. Its queries are zero, so that it attends evenly to everything so
far; its values are the Fisher discriminants of the partitions (Fisher 1936; Hastie, Tibshirani & Friedman, The Elements
of Statistical Learning, section 4.3.3) in exactly what it averages, the running mean of the layer's input. It adds them
to channels of the residual stream that nothing but the router reads: their columns in every other matrix are zero.

RMSNorm divides by the length of the whole stream, channels included, so they are written tiny and the norm before the gate
makes them large again: the model's own computation moves by rounding only (`tests/router/test_context.py`).

Shapes: B sequences, T tokens, D model width, K partitions, R = min(channels, K - 1) discriminants, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
import math
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forge.model.lm import DenseLayer, DenseLM
from forge.router.statistics import Array, LayerStatistics, forward_batches

#: Mean squares of what the layers write, summed, as a share of the smallest mean square of the residual stream.
_SHARE = 1e-8


def add_context(model: DenseLM, windows: Sequence[Callable[[], Iterable[npt.NDArray[Any]]]], shrinkage: float) -> None:
    """Fit the context heads of a dense model on the windows of each partition and write them into its weights.

    Args:
        model: the shared components; their attention and norms are changed in place.
        windows: for each partition a function that yields its windows, (length + 1,) token ids each.
        shrinkage: epsilon in W + eps * tr(W)/D * I, for the pooled within-partition covariance W.
    """
    config = model.config
    rank = min(config.context_channels, len(windows) - 1)
    if rank < 1:
        return
    layers = [LayerStatistics.empty(len(windows), config.d_model) for _ in range(config.n_layers)]
    squares = [0.0] * config.n_layers
    for partition, some in enumerate(windows):
        for means, residuals in _attention_inputs(model, some()):
            for layer, mean_ND in zip(layers, means, strict=True):
                layer.add(partition, mean_ND)
            squares = [total + residual for total, residual in zip(squares, residuals, strict=True)]
    tokens = float(layers[0].counts_K.sum())
    mean_squares = [total / tokens for total in squares]
    projections = discriminants(layers, rank, shrinkage)
    written = sum(float((layer.second_DD * (p_RD.T @ p_RD)).sum()) / tokens
                  for layer, p_RD in zip(layers, projections, strict=True))  # fmt: skip
    # A power of two is exact in every number format.
    scale = 2.0 ** math.floor(math.log2(math.sqrt(_SHARE * config.d_model * min(mean_squares) / written)))
    for index, p_RD in enumerate(projections):
        _write_head(model, index, p_RD, scale, math.sqrt(mean_squares[index]))


def discriminants(layers: Sequence[LayerStatistics], rank: int, shrinkage: float) -> list[Array]:
    """The directions in which the partitions' means lie apart, (R, D) for every layer.

    With C the centred means (K, D) and W the pooled within-partition covariance, shrunk, the rows of C W^-1 score the
    partitions. The R eigenvectors with the largest eigenvalues of C W^-1 C' in the first layer are the basis U of the
    scores that all layers write in, P = U C W^-1: what they add to the channels then adds up.
    """
    scores: list[Array] = []
    basis_RK: Array | None = None
    for layer in layers:
        centred_KD = layer.means_KD - layer.means_KD.mean(axis=0)
        scores.append(np.linalg.solve(layer.shrunk_within_DD(shrinkage), centred_KD.T).T)
        if basis_RK is None:
            vectors_KK = np.linalg.eigh(centred_KD @ scores[0].T)[1][:, ::-1]
            # An eigenvector's sign is free: fix it, so that every machine writes the same head.
            signs_K = np.sign(vectors_KK[np.abs(vectors_KK).argmax(axis=0), np.arange(len(vectors_KK))])
            basis_RK = (vectors_KK * signs_K).T[:rank]
    assert basis_RK is not None
    return [basis_RK @ scores_KD for scores_KD in scores]


@torch.no_grad()
def _write_head(model: DenseLM, index: int, p_RD: Array, scale: float, residual_rms: float) -> None:
    config, layer = model.config, cast(DenseLayer, model.model.layers[index])
    rank, channel = len(p_RD), config.d_model - config.context_channels
    query = config.head_dim * (config.n_heads - config.n_heads // config.kv_heads)
    value = config.head_dim * (config.kv_heads - 1)
    # Rounded as it will be published, so that the gate is fitted on what it will see.
    published = torch.from_numpy(p_RD.copy()).to(getattr(torch, config.dtype))
    layer.self_attn.v_proj.weight[value : value + rank] = published.to(layer.self_attn.v_proj.weight)
    layer.self_attn.o_proj.weight[channel : channel + rank, query : query + rank] = scale * torch.eye(rank)
    layer.post_attention_layernorm.weight[channel : channel + rank] = 2.0 ** round(math.log2(residual_rms / scale))


def _attention_inputs(model: DenseLM, windows: Iterable[npt.NDArray[Any]]) -> Iterator[tuple[list[Array], list[float]]]:
    """Batch by batch: per layer the running mean of what its attention reads, (N, D), and the residual's summed squares."""
    means: list[Tensor] = []
    squares: list[Tensor] = []

    def attention_input(module: torch.nn.Module, arguments: tuple[Tensor, ...], output_BTD: Tensor) -> None:
        counts_T1 = torch.arange(1, output_BTD.shape[1] + 1, dtype=output_BTD.dtype)[:, None]
        means.append(output_BTD.cumsum(dim=1) / counts_T1)

    def ffn_input(module: torch.nn.Module, arguments: tuple[Tensor, ...], output_BTD: Tensor) -> None:
        squares.append(arguments[0].square().mean(dim=-1))

    with _hooked(model, attention_input, ffn_input):
        for kept_BT, _ in forward_batches(model, windows):
            yield ([mean_BTD.numpy()[kept_BT].astype(np.float64) for mean_BTD in means],
                   [float(square_BT.numpy()[kept_BT].sum(dtype=np.float64)) for square_BT in squares])  # fmt: skip
            means.clear()
            squares.clear()


@contextmanager
def _hooked(model: DenseLM, attention_input: Callable[..., None], ffn_input: Callable[..., None]) -> Iterator[None]:
    handles = []
    for layer in cast(Iterable[DenseLayer], model.model.layers):
        handles.append(layer.input_layernorm.register_forward_hook(attention_input))
        handles.append(layer.post_attention_layernorm.register_forward_hook(ffn_input))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
