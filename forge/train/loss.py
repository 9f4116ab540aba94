"""LM head and cross-entropy in chunks: the full logits never exist.

Shapes: T tokens of a sequence, N positions of all of them, D model width, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from forge.model.layers import add_gradient, learning, softmax_in_place, working_copy
from forge.train.memory import CHUNK_POSITIONS

IGNORE_INDEX = -100
#: The smallest probability that float32 and bfloat16 hold in full: no token loses more than 87 nats.
_TINY = torch.finfo(torch.float32).tiny


def chunked_cross_entropy(hidden: Tensor, head_VD: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX,
                          weight: float = 1.0) -> Tensor:  # fmt: skip
    """Mean cross-entropy of `softmax(hidden @ head.T)` against `targets`, in nats, times `weight`.

    The gradients are computed in the forward pass, chunk by chunk, while a chunk's logits exist: with p the softmax and
    y the one-hot target, d loss / d logits = (p - y) weight / count. That of a head that learns is added to `head.grad` at
    once, so the loss must be differentiated as it is (hence `weight`); a frozen head gets none and costs none. No chunk has
    positions of two sequences, so that the head's gradient is rounded alike however many come together.

    Args:
        hidden: hidden states after the final norm, (..., T, D); their type is that of the products.
        head_VD: weight of the LM head.
        targets: token ids, (..., T); positions with `ignore_index` count for nothing.
        ignore_index: the target that is skipped.
        weight: the share of a micro-batch in its batch.

    Returns:
        A float32 scalar; zero when every target is ignored.
    """
    length = targets.shape[-1]
    hidden_ND, targets_N = hidden.flatten(0, -2), targets.flatten()
    kept_N = targets_N != ignore_index
    share_N = kept_N * (weight / kept_N.sum().clamp(min=1))
    head = working_copy(head_VD, hidden_ND.dtype)
    if learning(hidden_ND, head_VD):
        loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden_ND, head_VD, head, targets_N, share_N, length)  # fmt: skip
        return loss
    return sum((loss for _, _, loss in _chunks(hidden_ND, head, targets_N, share_N, length)),
               torch.zeros((), device=hidden_ND.device))  # fmt: skip


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, parameter: Tensor, head_VD: Tensor, targets_N: Tensor, share_N: Tensor,
                length: int) -> Tensor:  # fmt: skip
        need_hidden, ctx.need_head = ctx.needs_input_grad[:2]
        grad_ND = torch.empty_like(hidden_ND) if need_hidden else None
        total = torch.zeros((), device=hidden_ND.device)
        for rows, grad_CV, loss in _chunks(hidden_ND, head_VD, targets_N, share_N, length):
            total += loss
            share_C1 = share_N[rows].unsqueeze(1)
            if grad_ND is not None:
                torch.mul(grad_CV @ head_VD, share_C1, out=grad_ND[rows])
            if ctx.need_head:
                add_gradient(parameter, grad_CV, (hidden_ND[rows] * share_C1).to(hidden_ND.dtype))
        ctx.save_for_backward(grad_ND)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        (grad_ND,) = ctx.saved_tensors
        if ctx.need_head and grads[0] != 1:
            raise RuntimeError("the gradient of the head is that of the loss itself: give chunked_cross_entropy a weight")
        # In place: a second backward pass raises.
        return None if grad_ND is None else grad_ND.mul_(grads[0].to(grad_ND.dtype)), None, None, None, None, None


def _chunks(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, share_N: Tensor, length: int) -> Any:
    """Of each chunk its rows, the gradient (C, V) of every position's own loss in its logits, and the chunk's share of the loss.

    The gradients of all chunks lie in one buffer, which the next one overwrites. Sequences are `length` positions long.
    """
    buffer = torch.empty(min(CHUNK_POSITIONS, length), len(head_VD), dtype=hidden_ND.dtype, device=hidden_ND.device)
    for sequence, start in product(range(0, len(hidden_ND), length), range(0, length, CHUNK_POSITIONS)):
        rows = slice(sequence + start, sequence + min(start + CHUNK_POSITIONS, length))
        hidden_CD = hidden_ND[rows]
        logits_CV = torch.matmul(hidden_CD, head_VD.T, out=buffer[: len(hidden_CD)])
        softmax_CV = softmax_in_place(logits_CV)
        at = torch.arange(len(softmax_CV), device=softmax_CV.device), targets_N[rows].clamp(min=0)
        target_C = softmax_CV[at].float()
        loss = -(target_C.clamp(min=_TINY).log() * share_N[rows]).sum()
        softmax_CV[at] = (target_C - 1).to(softmax_CV.dtype)  # `scatter_` would copy all of it, twice.
        yield rows, softmax_CV, loss
