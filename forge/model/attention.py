"""Causal self-attention with rotary positions and grouped queries, and the cache that makes generation linear.

Shape suffixes: B batch, T new tokens, S all tokens so far (S = T without a cache), D d_model, N query heads,
K key/value heads, G queries of each (N / K), H head_dim. `x_BTD` has shape (B, T, D).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forge.config import ModelConfig
from forge.model.layers import Linear, learning, softmax_in_place
from forge.train.memory import ATTENTION_BLOCK

Rotary = tuple[Tensor, Tensor]


class KeyValueCache:
    """Keys and values of every layer for the tokens a model has seen, and the rotary tables, in buffers of fixed size.

    Args:
        config: the model's architecture.
        batch: sequences.
        capacity: tokens a sequence may have, the prompt included.
        device: where the buffers live.

    The buffers take 2 * (n_layers * batch * kv_heads + 1) * capacity * head_dim float32 values.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, device: torch.device | str = "cpu") -> None:
        shape = (config.n_layers, batch, config.kv_heads, capacity, config.head_dim)
        self.capacity = capacity
        self.length = 0
        self._keys, self._values = torch.empty(shape, device=device), torch.empty(shape, device=device)
        self._rotary = rotary_tables(config, capacity, torch.device(device))

    def rotary(self, tokens: int) -> Rotary:
        """The tables of the next `tokens` positions, (tokens, H) each.

        Raises:
            ValueError: the tokens do not fit in the capacity.
        """
        if self.length + tokens > self.capacity:
            raise ValueError(f"a cache of {self.capacity} tokens cannot hold {self.length + tokens}")
        cos_CH, sin_CH = self._rotary
        return cos_CH.narrow(0, self.length, tokens), sin_CH.narrow(0, self.length, tokens)

    def extend(self, layer: int, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; return all of them so far, (B, K, S, H) each."""
        keys_BKCH, values_BKCH, tokens = self._keys[layer], self._values[layer], k_BKTH.shape[2]
        keys_BKCH.narrow(2, self.length, tokens).copy_(k_BKTH)
        values_BKCH.narrow(2, self.length, tokens).copy_(v_BKTH)
        return keys_BKCH.narrow(2, 0, self.length + tokens), values_BKCH.narrow(2, 0, self.length + tokens)

    def advance(self, tokens: int) -> None:
        """Count `tokens` new tokens as seen, after every layer has stored them."""
        self.length += tokens


def rotary_tables(config: ModelConfig, length: int, device: torch.device) -> Rotary:
    """Cos and sin of the first `length` positions, (T, H) each, float32 (Su et al. 2021, arXiv 2104.09864, eq. 34).

    The angle of position t and pair i is t * rope_theta^(-2i/H). Pairs are (i, i + H/2), Hugging Face's half-split
    order, so each table repeats its H/2 angles twice.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**half
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    angles_TH = torch.cat((angles, angles), dim=-1)
    return angles_TH.cos(), angles_TH.sin()


def rotate(x_BNTH: Tensor, rotary: Rotary) -> Tensor:
    """Turn every head's pairs by their position's angle; the result is contiguous, whatever the strides of `x`."""
    cos_TH, sin_TH = (table.to(x_BNTH.dtype) for table in rotary)
    if learning(x_BNTH):
        return cast(Tensor, _Rotation.apply(x_BNTH, cos_TH, sin_TH))  # type: ignore[no-untyped-call]
    return _rotated(x_BNTH, cos_TH, sin_TH)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BNTH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TH, sin_TH)
        return _rotated(x_BNTH, cos_TH, sin_TH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_TH, sin_TH = ctx.saved_tensors
        return _rotated(grads[0], cos_TH, -sin_TH), None, None


def _rotated(x_BNTH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    half = x_BNTH.shape[-1] // 2
    out_BNTH = torch.empty(x_BNTH.shape, dtype=x_BNTH.dtype, device=x_BNTH.device)
    torch.mul(x_BNTH, cos_TH, out=out_BNTH)
    out_BNTH[..., :half].addcmul_(x_BNTH[..., half:], sin_TH[:, :half], value=-1)
    out_BNTH[..., half:].addcmul_(x_BNTH[..., :half], sin_TH[:, half:])
    return out_BNTH


def causal_attention(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(H)) v over each position and those before it, (B, N, T, H).

    torch's fused kernel, but for bfloat16 on a CPU: that kernel's products are several times slower than batched ones
    there (`docs/log.md`), so blocks of queries are multiplied with the keys up to their own last one.
    """
    if q_BNTH.device.type == "cpu" and q_BNTH.dtype == torch.bfloat16:
        return cast(Tensor, _BlockAttention.apply(q_BNTH, k_BNTH, v_BNTH))  # type: ignore[no-untyped-call]
    return F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=q_BNTH.shape[2] > 1)


class _BlockAttention(torch.autograd.Function):
    """Keeps the probabilities, about B N T (T + C) / 2 of them, C the queries of a block. Z is B * N.

    Queries are scaled, not scores: there are far fewer of them.
    """

    @staticmethod
    def forward(ctx: Any, q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor) -> Tensor:
        q_ZTH, k_ZTH, v_ZTH = (tensor.flatten(0, 1) for tensor in (q_BNTH, k_BNTH, v_BNTH))
        q_ZTH = q_ZTH * q_ZTH.shape[-1] ** -0.5
        out_ZTH = torch.empty(q_ZTH.shape, dtype=q_ZTH.dtype)
        later_CC = torch.full((ATTENTION_BLOCK, ATTENTION_BLOCK), -torch.inf, dtype=q_ZTH.dtype).triu_(1)
        probabilities = []
        for start, stop in _blocks(q_ZTH.shape[1]):
            scores_ZCS = torch.bmm(q_ZTH[:, start:stop], k_ZTH[:, :stop].transpose(1, 2))
            scores_ZCS[:, :, start:] += later_CC[: stop - start, : stop - start]
            softmax_ZCS = softmax_in_place(scores_ZCS)
            out_ZTH[:, start:stop] = torch.bmm(softmax_ZCS, v_ZTH[:, :stop])
            probabilities.append(softmax_ZCS)
        ctx.save_for_backward(q_ZTH, k_ZTH, v_ZTH, *probabilities)
        return out_ZTH.view(q_BNTH.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_ZTH, k_ZTH, v_ZTH, *probabilities = ctx.saved_tensors
        grad_ZTH = grads[0].flatten(0, 1)
        grad_q_ZTH = torch.empty(q_ZTH.shape, dtype=q_ZTH.dtype)
        grad_k_ZTH, grad_v_ZTH = (torch.zeros(q_ZTH.shape, dtype=q_ZTH.dtype) for _ in range(2))
        for (start, stop), softmax_ZCS in zip(_blocks(q_ZTH.shape[1]), probabilities, strict=True):
            grad_ZCH = grad_ZTH[:, start:stop].contiguous()
            grad_v_ZTH[:, :stop] += torch.bmm(softmax_ZCS.transpose(1, 2), grad_ZCH)
            grad_ZCS = torch.bmm(grad_ZCH, v_ZTH[:, :stop].transpose(1, 2))
            grad_ZCS = torch.ops.aten._softmax_backward_data(grad_ZCS, softmax_ZCS, -1, softmax_ZCS.dtype)
            grad_q_ZTH[:, start:stop] = torch.bmm(grad_ZCS, k_ZTH[:, :stop])
            grad_k_ZTH[:, :stop] += torch.bmm(grad_ZCS.transpose(1, 2), q_ZTH[:, start:stop])
        grad_q_ZTH *= q_ZTH.shape[-1] ** -0.5
        return tuple(grad.view(grads[0].shape) for grad in (grad_q_ZTH, grad_k_ZTH, grad_v_ZTH))  # type: ignore[return-value]


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + ATTENTION_BLOCK, length)) for start in range(0, length, ATTENTION_BLOCK)]


class Attention(nn.Module):
    """Grouped queries: kv_heads keys and values serve n_heads queries (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head_dim
        self.q_proj = Linear(config.d_model, config.n_heads * config.head_dim)
        self.k_proj = Linear(config.d_model, config.kv_heads * config.head_dim)
        self.v_proj = Linear(config.d_model, config.kv_heads * config.head_dim)
        self.o_proj = Linear(config.n_heads * config.head_dim, config.d_model)

    def forward(self, x_BTD: Tensor, rotary: Rotary, cache: KeyValueCache | None = None, layer: int = 0) -> Tensor:
        """Attend every token to itself and those before it, the cached ones included; -> (B, T, D)."""
        batch, length, _ = x_BTD.shape
        q_BNTH = self.q_proj(x_BTD).view(batch, length, self.n_heads, self.head_dim).transpose(1, 2)
        k_BKSH = self.k_proj(x_BTD).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v_BKSH = self.v_proj(x_BTD).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        q_BNTH, k_BKSH = rotate(q_BNTH, rotary), rotate(k_BKSH, rotary)
        mask_TS = None
        if cache is not None:
            seen = cache.length
            k_BKSH, v_BKSH = cache.extend(layer, k_BKSH, v_BKSH)
            if seen and length > 1:  # one new token sees everything; the first tokens are plainly causal
                mask_TS = torch.ones(length, seen + length, dtype=torch.bool, device=x_BTD.device).tril(seen)
        if length == 1:  # The queries of a group see the same keys: they go as rows, and the cache is not copied for each.
            q_BKGH = q_BNTH.reshape(batch, self.kv_heads, -1, self.head_dim)
            out_BNTH = F.scaled_dot_product_attention(q_BKGH, k_BKSH, v_BKSH).reshape(q_BNTH.shape)
        elif mask_TS is None:
            out_BNTH = causal_attention(q_BNTH, self._per_query_head(k_BKSH), self._per_query_head(v_BKSH))
        else:
            out_BNTH = F.scaled_dot_product_attention(q_BNTH, self._per_query_head(k_BKSH), self._per_query_head(v_BKSH),
                                                      attn_mask=mask_TS)  # fmt: skip
        y_BTD: Tensor = self.o_proj(out_BNTH.transpose(1, 2).reshape(batch, length, -1))
        return y_BTD

    def _per_query_head(self, x_BKSH: Tensor) -> Tensor:
        groups = self.n_heads // self.kv_heads
        return x_BKSH if groups == 1 else x_BKSH.repeat_interleave(groups, dim=1)
