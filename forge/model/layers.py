"""The layers that every model of ours is made of: bias-free linear maps, RMSNorm and the SwiGLU feed-forward network.

Shape suffixes: B batch, T tokens, N positions, D d_model, F ffn_width, O and I outputs and inputs of a matrix, `x_BTD` has
shape (B, T, D); `...D` stands for any leading shape. Weights are made uninitialised (nothing is computed for them on any
device, "meta" included): whoever makes a model either loads them or calls `DenseLM.initialise`.

Training computes its products in the type of their input, which the norms decide (`DenseLM.compute_in`); weights that
learn stay float32 beside a working copy in that type. The backward passes are written out: a weight's gradient is
added to `weight.grad` where it arises and never exists twice, a frozen weight's never exists, and what is cheap to compute
again is not kept. So they must be reached by `backward()`, not by `torch.autograd.grad` with respect to a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Rows of a weight whose gradient is computed at a time when it must be widened to be added.
_GRADIENT_ROWS = 2048
#: Matrices of at least this many float32 values go through oneDNN in inference. On an AMD EPYC with AVX-512, torch's own
#: choice, MKL, was slower by 1.5 to 2.3 times from 512 x 1408 on whatever the number of rows; on small ones it was faster.
ONEDNN_WEIGHTS = 1 << 18
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")  # type: ignore[no-untyped-call]


def product(x: Tensor, weight: Tensor) -> Tensor:
    """The product x W^T, (..., d_in) and (d_out, d_in) to (..., d_out), the weight read where it lies.

    Training never takes the way through oneDNN: what is computed again for a backward pass must give the same bits.
    """
    if (_HAS_ONEDNN and weight.numel() >= ONEDNN_WEIGHTS and torch.is_inference_mode_enabled()
            and x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"):  # fmt: skip
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return y
    return F.linear(x, weight)


class Linear(nn.Module):
    """y = x W^T without a bias; the weight is (d_out, d_in), uninitialised."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out), in the type of `x` whatever the weight is kept in."""
        weight = working_copy(self.weight, x.dtype)
        if not learning(x, self.weight):
            return product(x, weight)
        return cast(Tensor, _Linear.apply(x, self.weight, weight))  # type: ignore[no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, parameter, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        x, parameter, weight = ctx.saved_tensors
        if x is not None:
            add_gradient(parameter, grads[0], x)
        return grads[0] @ weight if ctx.needs_input_grad[0] else None, None, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4).

    Attributes:
        dtype: type of the result, and so of the products that follow; None keeps the type of the input.
    """

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.eps = eps
        self.dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., D) to the same shape."""
        if not learning(x, self.weight):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps).to(self.dtype or x.dtype)
        return cast(Tensor, _Normalise.apply(x, self.weight, self.eps, self.dtype or x.dtype))  # type: ignore[no-untyped-call]


class _Normalise(torch.autograd.Function):
    """Keeps the input, which the residual stream holds anyway, and one number a position."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        scale = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, scale)
        y: Tensor = (x * scale).mul_(weight).to(dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        normal = x * scale
        grad = grads[0].to(x.dtype)
        if ctx.needs_input_grad[1]:
            for sequence_D in (grad * normal).sum(-2).view(-1, x.shape[-1]):
                gradient_of(weight).add_(sequence_D)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        grad = grad * weight
        # d normal / d x = scale (1 - normal normal^T / D)
        along = torch.linalg.vecdot(grad, normal).div_(x.shape[-1]).unsqueeze(-1)
        return grad.addcmul_(normal, along, value=-1).mul_(scale), None, None, None


class FeedForward(nn.Module):
    """SwiGLU: y = w2(silu(w1 x) * w3 x) (Shazeer 2020, arXiv 2002.05202, eq. 6), the whole of an expert's layer."""

    def __init__(self, d_model: int, ffn_width: int) -> None:
        super().__init__()
        self.w1 = Linear(d_model, ffn_width)
        self.w2 = Linear(ffn_width, d_model)
        self.w3 = Linear(d_model, ffn_width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        parameters = self.w1.weight, self.w2.weight, self.w3.weight
        if not learning(x, *parameters):
            y: Tensor = self.w2(F.silu(self.w1(x)).mul_(self.w3(x)))
            return y
        copies = (working_copy(parameter, x.dtype) for parameter in parameters)
        return cast(Tensor, _FeedForward.apply(x, *parameters, *copies))  # type: ignore[no-untyped-call]


class _FeedForward(torch.autograd.Function):
    """Keeps w1 x and w3 x, 2 F a position; silu and the product are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p1: Tensor, p2: Tensor, p3: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        gate, up = F.linear(x, w1), F.linear(x, w3)
        ctx.save_for_backward(x, gate, up, p1, p2, p3, w1, w2, w3)
        return F.linear(F.silu(gate).mul_(up), w2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, p1, p2, p3, w1, w2, w3 = ctx.saved_tensors
        silu = F.silu(gate)
        if p2.requires_grad:
            add_gradient(p2, grads[0], silu * up)
        grad = grads[0] @ w2
        grad_up = silu.mul_(grad)
        grad_gate = torch.ops.aten.silu_backward(grad.mul_(up), gate)
        if p1.requires_grad:
            add_gradient(p1, grad_gate, x)
        if p3.requires_grad:
            add_gradient(p3, grad_up, x)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_gate @ w1).flatten(0, -2).addmm_(grad_up.flatten(0, -2), w3).view_as(x)
        return grad_x, None, None, None, None, None, None


class Embedding(nn.Module):
    """A (V, D) table of token vectors, uninitialised."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.held: list[tuple[Tensor, Tensor]] | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up (...) token ids as (..., D) vectors, float32 whatever the table is: so is the residual stream."""
        if not learning(self.weight):
            return F.embedding(tokens, self.weight).float()
        return cast(Tensor, _Embedding.apply(self.weight, tokens, self.held))  # type: ignore[no-untyped-call]


class _Embedding(torch.autograd.Function):
    """Adds to the rows of the tokens that were seen, where autograd would make a gradient of the whole table first."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, held: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        ctx.save_for_backward(weight, tokens)
        ctx.held = held
        return F.embedding(tokens, weight).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        weight, tokens = ctx.saved_tensors
        if ctx.held is None:
            _add_rows(weight, tokens, grads[0])
        else:
            ctx.held.append((tokens, grads[0]))
        return None, None, None


@contextmanager
def lookups_held(model: nn.Module) -> Iterator[None]:
    """Hold the gradients of a model's lookups, a float32 vector each, and add them when the block ends.

    A tied LM head has its own gradient for the same table, from every micro-batch before that of the lookups. Held over a
    whole batch, the two are added in an order that does not depend on how many sequences a micro-batch has.
    """
    embeddings = [module for module in model.modules() if isinstance(module, Embedding)]
    for embedding in embeddings:
        embedding.held = []
    try:
        yield
        for embedding in embeddings:
            for tokens, grad in embedding.held or ():
                _add_rows(embedding.weight, tokens, grad)
    finally:
        for embedding in embeddings:
            embedding.held = None


def _add_rows(weight: Tensor, tokens: Tensor, grad: Tensor) -> None:
    gradient_of(weight).index_add_(0, tokens.flatten(), grad.flatten(0, -2).to(weight.dtype))


def learning(*tensors: Tensor) -> bool:
    """Whether a gradient goes through any of the tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def working_copy(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in the type of a product, without its history.

    While gradients are on, the copy is kept with the weight until the weight changes, so that a step casts it once and not
    once a micro-batch. Without gradients it goes with the product: a model may be larger than the memory for copies of it.
    """
    if weight.dtype == dtype:
        return weight.detach()
    if not torch.is_grad_enabled():
        return weight.to(dtype)
    kept = getattr(weight, "working_copy", None)
    if kept is None or kept[0].dtype != dtype or kept[1] != weight._version:
        copy = torch.empty_like(weight, dtype=dtype) if kept is None or kept[0].dtype != dtype else kept[0]
        kept = (copy.copy_(weight.detach()), weight._version)
        weight.working_copy = kept  # type: ignore[attr-defined]
    return cast(Tensor, kept[0])


def gradient_of(weight: Tensor) -> Tensor:
    """The gradient of a weight, which is zero before anything was added to it."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


@torch.no_grad()
def add_gradient(weight: Tensor, grad: Tensor, x: Tensor) -> None:
    """Add grad^T x, summed over the positions of (..., T, O) and (..., T, I), to the gradient of a weight (O, I), in its type.

    A product in a narrower type is rounded before it is added. It is made of one sequence at a time, so that the sum is the
    same however many sequences come together: the memory plan must not decide the result.
    """
    gradient = gradient_of(weight)
    if grad.dtype == gradient.dtype:
        gradient.addmm_(grad.flatten(0, -2).T, x.flatten(0, -2))
        return
    for grad_TO, x_TI in zip(grad.view(-1, *grad.shape[-2:]), x.view(-1, *x.shape[-2:]), strict=True):
        for rows in range(0, len(gradient), _GRADIENT_ROWS):  # In pieces that stay in the cache until they are added.
            gradient[rows : rows + _GRADIENT_ROWS].add_(grad_TO[:, rows : rows + _GRADIENT_ROWS].T @ x_TI)


def softmax_in_place(x: Tensor) -> Tensor:
    """Softmax over the last dimension into the place of its input; float32 inside, whatever the type."""
    return cast(Tensor, torch.ops.aten._softmax.out(x, -1, False, out=x))
