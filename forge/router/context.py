"""The context head: what the text so far is about, for the router to read, in closed form and in stock Mixtral.

A token's own state says too little about its document. The text so far says more, and how much is what naive Bayes adds up:
for every token the evidence log p(token | partition), less its mean over the partitions (Rennie et al. 2003, "Tackling the
poor assumptions of naive Bayes text classifiers", whose transform of the counts it has as well). A stock checkpoint can hold
it. Some channels of the residual stream and the last key/value head of every layer are kept at zero in the shared phase. Here
the embedding gets the evidence of each token in these channels, and the head of the first layer, whose queries are zero so that
it attends evenly to everything so far, writes the mean of it to the same channels, larger. Only the router reads them: their
columns in every other matrix are zero.

RMSNorm divides by the length of the whole stream, channels included, so they are written tiny and the norms that their
readers have before them make them large again: the model's own computation moves by rounding only
(`tests/router/test_context.py`).

Shapes: B sequences, T tokens, D model width, K partitions, V vocabulary, R = min(channels, K - 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
import math
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forge.config import ModelConfig
from forge.model.lm import DenseLayer, DenseLM
from forge.router.statistics import Array, forward_batches

#: Mean square of what the head writes, as a share of the smallest mean square of the residual stream.
_SHARE = 1e-8
#: How much smaller than their mean the tokens' own evidence is written, since both are in the same channels.
_QUIETER = 16.0
#: Counts that the smoothing adds to a partition, spread over the vocabulary as the corpus is.
_PRIOR_COUNTS = 500.0
#: Rows of the embedding that are widened at a time.
_ROWS = 1024


def count_tokens(documents: Iterable[npt.NDArray[Any]], vocab_size: int) -> Array:
    """How often each token occurs, (V,): log(1 + its count) summed over the documents.

    The logarithm makes a word that fills one document count for less than one that is in many (Rennie et al., section 4.1).
    """
    counts_V = np.zeros(vocab_size)
    for document in documents:
        tokens, occurrences = np.unique(document, return_counts=True)
        counts_V[tokens] += np.log1p(occurrences)
    return counts_V


def evidence(counts_KV: Array, rank: int) -> tuple[Array, Array]:
    """What each token says about the partition of its document.

    Args:
        counts_KV: of each partition, from `count_tokens`; they add up, so a partition can be added later.
        rank: R, directions that are kept: all there are when R = K - 1.

    Returns:
        e_VR and the basis u_KR: token v adds `u_KR @ e_VR[v]` to the partitions' log odds. A token that nobody has seen
        says nothing.
    """
    prior_V = (counts_KV.sum(axis=0) + 1) / (counts_KV.sum() + counts_KV.shape[1])
    totals_K1 = counts_KV.sum(axis=1, keepdims=True)
    odds_KV = np.log((counts_KV + _PRIOR_COUNTS * prior_V) / (totals_K1 + _PRIOR_COUNTS))
    odds_KV -= odds_KV.mean(axis=0)
    odds_KV[:, counts_KV.sum(axis=0) == 0] = 0.0
    # The directions in which the partitions' mean evidence lies apart.
    means_KK = counts_KV / np.maximum(totals_K1, 1.0) @ odds_KV.T
    basis_KR = np.linalg.eigh(means_KK.T @ means_KK)[1][:, ::-1][:, :rank]
    # An eigenvector's sign is free: fix it, so that every machine writes the same head.
    basis_KR = basis_KR * np.sign(basis_KR[np.abs(basis_KR).argmax(axis=0), np.arange(rank)])
    return odds_KV.T @ basis_KR, basis_KR


def add_context(model: DenseLM, counts_KV: Array, windows: Iterable[npt.NDArray[Any]]) -> None:
    """Write the evidence and the head that averages it into the weights of a dense model, in place.

    Args:
        model: the shared components.
        counts_KV: of each partition, from `count_tokens`.
        windows: some windows of the corpus, (length + 1,) token ids each: how large the residual stream is there decides
            how large the channels may be.
    """
    config = model.config
    rank = context_rank(config, len(counts_KV))
    if rank < 1:
        return
    evidence_VR, _ = evidence(counts_KV, rank)
    kept = list(windows)
    mean_square = float(np.mean(np.concatenate([np.square(running_mean(evidence_VR[w[:-1]])).sum(axis=1) for w in kept])))
    squares_L = _residual_squares(model, kept)
    # Powers of two are exact in every number format.
    scale = 2.0 ** math.floor(math.log2(math.sqrt(_SHARE * config.d_model * min(squares_L) / max(mean_square, 1e-12))))
    _write_evidence(model, evidence_VR, scale / _QUIETER)
    _write_head(model, rank, scale)
    channels = context_columns(config, rank)
    for module, square in zip(model.model.layers, squares_L, strict=True):
        norm = cast(DenseLayer, module).post_attention_layernorm
        norm.weight.data[channels] = 2.0 ** round(math.log2(math.sqrt(square * rank / max(mean_square, 1e-12)) / scale))


def context_rank(config: ModelConfig, partitions: int) -> int:
    """R: how many of the context channels are used."""
    return min(config.context_channels, partitions - 1)


def context_columns(config: ModelConfig, rank: int) -> slice:
    """Where in the residual stream the context channels in use are."""
    first = config.d_model - config.context_channels
    return slice(first, first + rank)


def running_mean(x_TR: Array) -> Array:
    """The mean of everything so far, at every position, (T, R)."""
    means_TR: Array = np.cumsum(x_TR, axis=0) / np.arange(1, len(x_TR) + 1)[:, None]
    return means_TR


@torch.no_grad()
def _write_evidence(model: DenseLM, evidence_VR: Array, scale: float) -> None:
    """Into the embedding, such that the first layer's attention reads exactly the evidence."""
    config, embedding = model.config, model.model.embed_tokens.weight
    channels = context_columns(config, evidence_VR.shape[1])
    # The norm before the attention divides by each token's own length.
    squares = [rows_CD.double().square().mean(dim=1, keepdim=True) for rows_CD in torch.split(embedding, _ROWS)]
    length_V1 = (torch.cat(squares) + config.norm_eps).sqrt()
    # About one for the corpus: then the power of two that the norm multiplies by is the inverse of what is written here.
    scale = 2.0 ** round(math.log2(scale / float(length_V1.mean())))
    embedding[:, channels] = (scale * length_V1 * torch.from_numpy(evidence_VR)).to(embedding)
    cast(DenseLayer, model.model.layers[0]).input_layernorm.weight[channels] = 1 / scale


@torch.no_grad()
def _write_head(model: DenseLM, rank: int, scale: float) -> None:
    config, attention = model.config, cast(DenseLayer, model.model.layers[0]).self_attn
    channels = context_columns(config, rank)
    query = config.head_dim * (config.n_heads - config.n_heads // config.kv_heads)
    value = config.head_dim * (config.kv_heads - 1)
    attention.v_proj.weight[value : value + rank, channels] = torch.eye(rank)
    attention.o_proj.weight[channels, query : query + rank] = scale * torch.eye(rank)


def _residual_squares(model: DenseLM, windows: Iterable[npt.NDArray[Any]]) -> list[float]:
    """Mean square of the residual stream that each layer's gate reads."""
    squares: list[Tensor] = []
    totals, tokens = [0.0] * model.config.n_layers, 0
    with _hooked(model, lambda module, arguments, output: squares.append(arguments[0].square().mean(dim=-1))):
        for kept_BT, _ in forward_batches(model, windows):
            tokens += int(kept_BT.sum())
            totals = [total + float(square_BT.numpy()[kept_BT].sum(dtype=np.float64))
                      for total, square_BT in zip(totals, squares, strict=True)]  # fmt: skip
            squares.clear()
    return [total / tokens for total in totals]


@contextmanager
def _hooked(model: DenseLM, ffn_input: Callable[..., None]) -> Iterator[None]:
    handles = [layer.post_attention_layernorm.register_forward_hook(ffn_input)
               for layer in cast(Iterable[DenseLayer], model.model.layers)]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
