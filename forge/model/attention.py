"""Causal self-attention with rotary positions and grouped queries, and the cache that makes generation linear.

Shape suffixes: B batch, T new tokens, S all tokens so far (S = T without a cache), D d_model, N query heads,
K key/value heads, H head_dim. `x_BTD` has shape (B, T, D).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forge.config import ModelConfig
from forge.model.layers import Linear

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
    order, so each table repeats its H/2 angles twice; the sines of the first half are negated, for `rotate`.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**half
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    angles_TH = torch.cat((angles, angles), dim=-1)
    sin = angles.sin()
    return angles_TH.cos(), torch.cat((-sin, sin), dim=-1)


def rotate(x_BNTH: Tensor, rotary: Rotary) -> Tensor:
    """Turn every head's pairs by their position's angle."""
    cos_TH, sin_TH = (table.to(x_BNTH.dtype) for table in rotary)
    return x_BNTH * cos_TH + x_BNTH.roll(x_BNTH.shape[-1] // 2, dims=-1) * sin_TH


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
        causal = length > 1 and mask_TS is None
        if length == 1:  # The queries of a group see the same keys: they go as rows, and the cache is not copied for each.
            q_BNTH = q_BNTH.reshape(batch, self.kv_heads, -1, self.head_dim)
        else:
            k_BKSH, v_BKSH = self._per_query_head(k_BKSH), self._per_query_head(v_BKSH)
        out = F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, attn_mask=mask_TS, is_causal=causal)
        out_BNTH = out.view(batch, self.n_heads, length, self.head_dim)
        y_BTD: Tensor = self.o_proj(out_BNTH.transpose(1, 2).reshape(batch, length, -1))
        return y_BTD

    def _per_query_head(self, x_BKSH: Tensor) -> Tensor:
        groups = self.n_heads // self.kv_heads
        return x_BKSH if groups == 1 else x_BKSH.repeat_interleave(groups, dim=1)
