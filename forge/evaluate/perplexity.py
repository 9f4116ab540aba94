"""Losses on held-out documents: nats a token, perplexity, bits a byte; pooled, a partition.

Shape suffixes: B batch, T tokens, N tokens of all sequences (B * T), D d_model, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
import math
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from forge.data.packing import batches, pad
from forge.model.lm import LanguageModel
from forge.model.moe import GateMode, MixtureLM, Routing
from forge.train.loss import IGNORE_INDEX, chunked_cross_entropy
from forge.train.memory import EVALUATION_TOKENS

#: Tokens of a forward pass, padding included, as the memory plan has them. At the default size, on one core, 512 gave 1,060
#: tokens a second at a peak of 294 MB above the interpreter (214 of them the mapped model), 2,048 gave 1,096 at 358 MB.
BATCH_TOKENS = EVALUATION_TOKENS

Observer = Callable[[list[Routing], Tensor], None]


@dataclass(frozen=True)
class Loss:
    """A sum of cross-entropies, with what it was summed over. Losses add."""

    nats: float = 0.0
    """Sum over the predicted tokens of -log p(token), natural logarithm."""
    tokens: int = 0
    """Predicted tokens."""
    bytes: int = 0
    """UTF-8 bytes of the predicted tokens; an end of text has none."""

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    @property
    def nats_per_token(self) -> float:
        """Mean loss in nats a token; NaN without tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(nats a token); NaN without tokens."""
        return perplexity(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of text, which compares across tokenizers; NaN without bytes."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


def perplexity(nats: float) -> float:
    """exp(nats), and infinity where a float cannot hold it."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def pooled(losses: Iterable[Loss]) -> Loss:
    """All tokens in one sum: partitions count by their number of tokens."""
    return sum(losses, Loss())


def equal_weight_mean(losses: Iterable[Loss]) -> float:
    """Mean of the nats a token of every partition that has tokens: each counts once; NaN if there is none."""
    means = [loss.nats_per_token for loss in losses if loss.tokens]
    return math.fsum(means) / len(means) if means else math.nan


def figures(losses: Sequence[Loss]) -> dict[str, Any]:
    """The losses of all partitions in JSON values.

    Returns:
        `losses` (nats a token, one a partition); `mean_loss` and `mean_perplexity` (equal weight of the partitions; the
        perplexity is exp of the mean loss); `pooled_loss`, `pooled_perplexity` and `pooled_bits_per_byte` (equal weight
        of the tokens). What JSON cannot say is null.
    """
    mean, together = equal_weight_mean(losses), pooled(losses)
    return {
        "losses": [finite(loss.nats_per_token) for loss in losses],
        "mean_loss": finite(mean),
        "mean_perplexity": finite(perplexity(mean)),
        "pooled_loss": finite(together.nats_per_token),
        "pooled_perplexity": finite(together.perplexity),
        "pooled_bits_per_byte": finite(together.bits_per_byte),
    }


def finite(value: float) -> float | None:
    """The value, or None for what JSON cannot say."""
    return value if math.isfinite(value) else None


def document_losses(
    model: LanguageModel, windows: Iterable[npt.NDArray[Any]], *, gate: GateMode = "router",
    only_expert: int | None = None, batch_tokens: int = BATCH_TOKENS,
) -> tuple[float, int]:  # fmt: skip
    """Sum of the losses, in nats, and number of predicted tokens; `measure` without bytes."""
    loss = measure(model, windows, gate=gate, only_expert=only_expert, batch_tokens=batch_tokens)
    return loss.nats, loss.tokens


@torch.inference_mode()
def measure(
    model: LanguageModel, windows: Iterable[npt.NDArray[Any]], token_bytes_V: npt.NDArray[Any] | None = None, *,
    gate: GateMode = "router", only_expert: int | None = None, observe: Observer | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Loss:  # fmt: skip
    """The loss of a model on windows of documents.

    Args:
        model: a dense model, or an assembled one.
        windows: token ids, (length + 1,) each: every token but the first is predicted from those before it.
        token_bytes_V: UTF-8 bytes of each token of the vocabulary; without it the loss has no bytes.
        gate: of an assembled model: "router", or "uniform" for the mean of all experts.
        only_expert: of an assembled model: send every token to this expert.
        observe: of an assembled model: called after each batch with every layer's routing and the mask (N,) of the rows
            that are not padding.
        batch_tokens: tokens of a forward pass, padding included; a longer window is a batch of its own.
    """
    device = model.head_weight.device
    total = Loss()
    for batch in batches(windows, batch_tokens):
        inputs_BT, targets_BT = (torch.from_numpy(array).to(device) for array in pad(batch, IGNORE_INDEX))
        targets_N = targets_BT.flatten()
        kept_N = targets_N != IGNORE_INDEX
        if isinstance(model, MixtureLM):
            routing: list[Routing] | None = [] if observe is not None else None
            hidden_BTD = model(inputs_BT, routing=routing, gate=gate, only_expert=only_expert)
            if observe is not None and routing is not None:
                observe(routing, kept_N)
        else:
            hidden_BTD = model(inputs_BT)
        mean = chunked_cross_entropy(hidden_BTD.flatten(0, 1), model.head_weight, targets_N)
        tokens = int(kept_N.sum())
        size = 0 if token_bytes_V is None else int(sum(token_bytes_V[window[1:]].sum() for window in batch))
        total += Loss(float(mean) * tokens, tokens, size)
    return total
