"""LM head and cross-entropy in chunks: the full logits never exist.

Shapes: N positions, D model width, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from forge.train.memory import LOSS_ROWS

#: Positions whose logits exist at a time, unless the memory plan says otherwise.
CHUNK_POSITIONS = LOSS_ROWS
IGNORE_INDEX = -100


def chunked_cross_entropy(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, ignore_index: int = IGNORE_INDEX,
                          chunk_positions: int = CHUNK_POSITIONS) -> Tensor:  # fmt: skip
    """Mean cross-entropy of `softmax(hidden @ head.T)` against `targets`, in nats.

    The gradients are computed in the forward pass, chunk by chunk, while a chunk's logits exist: with p the softmax and
    y the one-hot target, d loss / d logits = (p - y) / count. A frozen head gets no gradient and costs none.

    Args:
        hidden_ND: hidden states after the final norm.
        head_VD: weight of the LM head; under autocast both are cast to the autocast type for the matrix products.
        targets_N: token ids; positions with `ignore_index` count for nothing.
        ignore_index: the target that is skipped.
        chunk_positions: C; decides memory, not the result.

    Returns:
        A float32 scalar; zero when every target is ignored.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head_VD, targets_N, ignore_index, chunk_positions)  # fmt: skip
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, ignore_index: int,
                chunk_positions: int) -> Tensor:  # fmt: skip
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        with torch.autocast(device, enabled=False):
            return _forward(ctx, hidden_ND, head_VD, targets_N, ignore_index, chunk_positions, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grads[0]
        # In place, as a head of its own size twice is what a small machine lacks; a second backward pass raises.
        return (None if grad_hidden is None else grad_hidden.mul_(scale.to(grad_hidden.dtype)),
                None if grad_head is None else grad_head.mul_(scale.to(grad_head.dtype)), None, None, None)  # fmt: skip


def _forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, ignore_index: int,
             chunk_positions: int, dtype: torch.dtype) -> Tensor:  # fmt: skip
    need_hidden, need_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    kept_N = targets_N != ignore_index
    count = kept_N.sum().clamp(min=1)
    head = head_VD.to(dtype)
    grad_hidden = torch.empty_like(hidden_ND) if need_hidden else None
    grad_head = torch.zeros_like(head_VD, dtype=torch.float32) if need_head else None
    total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    logits = torch.empty(min(chunk_positions, hidden_ND.shape[0]), len(head), dtype=dtype, device=head.device)
    for start in range(0, hidden_ND.shape[0], chunk_positions):
        rows = slice(start, start + chunk_positions)
        hidden_CD = hidden_ND[rows].to(dtype)
        # One buffer for all chunks and all steps of one: logits, exp(logits - max), softmax, gradient.
        logits_CV = torch.matmul(hidden_CD, head.T, out=logits[: len(hidden_CD)]).float()
        targets_C1 = targets_N[rows].clamp(min=0).unsqueeze(1)
        logits_CV.sub_(logits_CV.amax(dim=1, keepdim=True))
        target_C1 = logits_CV.gather(1, targets_C1)
        sum_C1 = logits_CV.exp_().sum(dim=1, keepdim=True)
        total += torch.where(kept_N[rows], (sum_C1.log() - target_C1).squeeze(1), 0.0).sum()
        if not (need_hidden or need_head):
            continue
        grad_CV = logits_CV.div_(sum_C1)
        grad_CV.scatter_add_(1, targets_C1, torch.full_like(sum_C1, -1.0))
        grad_CV.mul_((kept_N[rows] / count).unsqueeze(1))
        grad_CV = grad_CV.to(dtype)
        if grad_hidden is not None:
            grad_hidden[rows] = (grad_CV @ head).to(hidden_ND.dtype)
        if grad_head is not None:
            if dtype == torch.float32:
                grad_head.addmm_(grad_CV.T, hidden_CD)
            else:
                grad_head += (grad_CV.T @ hidden_CD).float()
    ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head_VD.dtype))
    return total / count
