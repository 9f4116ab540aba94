"""Muon, with the orthogonalisation in the type that this machine multiplies fastest.

`torch.optim.Muon` always orthogonalises in bfloat16. On a CPU without bfloat16 instructions that product ran at 1 GFLOP/s
against 140 in float32 (AVX2, two cores), so the optimiser took most of every step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOMENTUM = 0.95
#: Coefficients and count of the quintic Newton-Schulz iteration (Jordan et al. 2024, "Muon", section "Design").
COEFFICIENTS = (3.4445, -4.775, 2.0315)
STEPS = 5
EPSILON = 1e-7
#: RMS of an AdamW update; Muon's updates are scaled to it (Liu et al. 2025, arXiv 2502.16982, eq. 4).
ADAMW_RMS = 0.2


@torch.no_grad()
def muon_update(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: float, weight_decay: float,
                dtype: torch.dtype) -> None:  # fmt: skip
    """One step: momentum, orthogonalised.

    Args:
        parameter: a matrix, updated in place.
        gradient: its gradient; it is overwritten.
        state: `momentum_buffer`; empty before the first step.
        lr: learning rate in AdamW's units.
        weight_decay: decoupled.
        dtype: type of the orthogonalisation.
    """
    if not state:
        state["momentum_buffer"] = torch.zeros_like(parameter)
    buffer = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
    update = orthogonalise(gradient.lerp_(buffer, MOMENTUM), dtype)
    parameter.mul_(1 - lr * weight_decay)
    parameter.add_(update.to(parameter.dtype), alpha=-lr * ADAMW_RMS * math.sqrt(max(parameter.shape)))


def orthogonalise(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Push all singular values of a matrix towards one: a quintic Newton-Schulz iteration.

    Args:
        matrix: of any shape (A, B).
        dtype: type of the products and of the result.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
