"""The layers that every model of ours is made of: bias-free linear maps, RMSNorm and the SwiGLU feed-forward network.

Shape suffixes: B batch, T tokens, D d_model, F ffn_width, `x_BTD` has shape (B, T, D); `...D` stands for any leading
shape. Weights are made uninitialised (nothing is computed for them on any device, "meta" included): whoever makes a
model either loads them or calls `DenseLM.initialise`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Matrices of at least this many float32 values go through oneDNN in inference. On an AMD EPYC with AVX-512, torch's own
#: choice, MKL, was slower by 1.5 to 2.3 times from 512 x 1408 on whatever the number of rows; on small ones it was faster.
ONEDNN_WEIGHTS = 1 << 18
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, (..., d_in) and (d_out, d_in) to (..., d_out); the weight is read where it lies, mapped files included.

    Training never takes the way through oneDNN: what is computed again for a backward pass must give the same bits.
    """
    if (_HAS_ONEDNN and weight.numel() >= ONEDNN_WEIGHTS and torch.is_inference_mode_enabled()
            and x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")):  # fmt: skip
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return y
    return F.linear(x, weight)


class Linear(nn.Module):
    """y = x W^T without a bias; the weight is (d_out, d_in), uninitialised."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out), in the type of `x` (or of autocast) whatever the weight is kept in."""
        weight: Tensor = self.weight
        if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            weight = weight.to(x.dtype)
        return product(x, weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4)."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., D) to the same shape."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class FeedForward(nn.Module):
    """SwiGLU: y = w2(silu(w1 x) * w3 x) (Shazeer 2020, arXiv 2002.05202, eq. 6), the whole of an expert's layer."""

    def __init__(self, d_model: int, ffn_width: int) -> None:
        super().__init__()
        self.w1 = Linear(d_model, ffn_width)
        self.w2 = Linear(ffn_width, d_model)
        self.w3 = Linear(d_model, ffn_width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        y: Tensor = self.w2(gated_silu(self.w1(x), self.w3(x)))
        return y


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, keeping one tensor less for the backward pass than autograd would (3 F a token instead of 4)."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        product: Tensor = _GatedSilu.apply(gate, up)  # type: ignore[no-untyped-call]
        return product
    return F.silu(gate).mul_(up)


class _GatedSilu(torch.autograd.Function):
    """Recomputes silu(gate) in the backward pass instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        (grad,) = grads
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
