"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): keep a layer's input, compute the rest again.

`torch.utils.checkpoint` would do, but it imports `torch._dynamo`, 83 MB resident, to save memory.

Shape suffixes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from forge.model.attention import Rotary


def recomputed(layer: nn.Module, x_BTD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """`layer(x, rotary)` of a decoder layer, keeping x alone for the backward pass.

    The layer must be deterministic. Its second output (the FFN's input) carries no gradient.

    Args:
        layer: a decoder layer.
        x_BTD: its input.
        rotary: the rotary tables.
    """
    outputs: tuple[Tensor, Tensor] = _Recomputed.apply(layer, rotary, x_BTD, *layer.parameters())  # type: ignore[no-untyped-call]
    return outputs


class _Recomputed(torch.autograd.Function):
    """The parameters are inputs so that the output requires a gradient when only they do."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, rotary: Rotary, x_BTD: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.layer, ctx.rotary, ctx.inputs = layer, rotary, 3 + len(parameters)
        ctx.save_for_backward(x_BTD)
        y_BTD, gate_input_BTD = layer(x_BTD, rotary)
        ctx.mark_non_differentiable(gate_input_BTD)
        return y_BTD, gate_input_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (saved_BTD,) = ctx.saved_tensors
        x_BTD = saved_BTD.detach().requires_grad_(ctx.needs_input_grad[2])
        with torch.enable_grad():
            y_BTD, _ = ctx.layer(x_BTD, ctx.rotary)
            # A scalar whose gradient in y is grads[0]; to hand grads[0] over would import sympy.
            product = (y_BTD * grads[0]).sum()
        # Into the parameters' own gradients, one at a time: returned from here they would all exist twice.
        torch.autograd.backward(product)
        return (None, None, x_BTD.grad, *([None] * (ctx.inputs - 3)))
