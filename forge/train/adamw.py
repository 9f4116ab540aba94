"""AdamW, one parameter at a time.

`torch.optim` would do, but its classes import `torch._dynamo` when the first of them is made: 83 MB resident that nothing
here uses, on top of the 345 MB that a training process took.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Betas; 0.95 rather than 0.999 for the second moment, as is usual for language models of this kind.
BETAS = (0.9, 0.95)
EPSILON = 1e-8


@torch.no_grad()
def adamw_update(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: float, weight_decay: float) -> None:
    """One step (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2), equal to `torch.optim.AdamW` to the bit.

    Args:
        parameter: updated in place.
        gradient: its gradient; it is overwritten, so that the update needs one temporary only.
        state: `step`, `exp_avg` and `exp_avg_sq`; empty before the first step.
        lr: learning rate.
        weight_decay: decoupled; 0 for none.
    """
    if not state:
        state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter),
                  "exp_avg_sq": torch.zeros_like(parameter)}  # fmt: skip
    state["step"] += 1
    step = float(state["step"])
    parameter.mul_(1 - lr * weight_decay)
    state["exp_avg"].lerp_(gradient, 1 - BETAS[0])
    state["exp_avg_sq"].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    correction = math.sqrt(1 - BETAS[1] ** step)
    torch.sqrt(state["exp_avg_sq"], out=gradient).div_(correction).add_(EPSILON)
    parameter.addcdiv_(state["exp_avg"], gradient, value=-lr / (1 - BETAS[0] ** step))
