"""Mixtures of experts in memory, with any gate: what the rows of the benchmark are measured on.

Shape suffixes: B batch, T tokens, D d_model, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.lab.phases import State
from benchmarks.lab.setting import OUTSIDE, TEST, Setting
from forge.evaluate.perplexity import Loss, measure
from forge.model.attention import rotary_tables
from forge.model.lm import DenseLayer, DenseLM, LanguageModel


def matrices(ffn: State, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """w1, w3 and w2 of a layer."""
    w1, w3, w2 = (ffn[f"model.layers.{layer}.mlp.{name}.weight"] for name in ("w1", "w3", "w2"))
    return w1, w3, w2


def swiglu(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """An expert's output on (..., D)."""
    return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


Gate = Callable[[int, Tensor], Tensor]
"""(layer, gate input (B, T, D)) -> weights (B, T, E), which sum to 1."""


class GatedMixture(nn.Module):
    """The shared components with experts under any gate; computes every expert on every token."""

    def __init__(self, base: DenseLM, experts: Sequence[State], gate: Gate) -> None:
        super().__init__()
        self.base, self.gate = base, gate
        self.experts = [[matrices(expert, layer) for expert in experts] for layer in range(base.config.n_layers)]

    @property
    def head_weight(self) -> Tensor:
        """The LM head, (V, D)."""
        return self.base.head_weight

    def forward(self, tokens_BT: Tensor, gate_inputs: list[Tensor] | None = None) -> Tensor:
        """Hidden states after the final norm, (B, T, D)."""
        config = self.base.config
        rotary = rotary_tables(config, tokens_BT.shape[1], tokens_BT.device)
        x_BTD: Tensor = self.base.model.embed_tokens(tokens_BT)
        for index, module in enumerate(self.base.model.layers):
            layer = cast(DenseLayer, module)
            x_BTD = x_BTD + layer.self_attn(layer.input_layernorm(x_BTD), rotary, None, index)
            gate_BTD = layer.post_attention_layernorm(x_BTD)
            if gate_inputs is not None:
                gate_inputs.append(gate_BTD)
            weights_BTE = self.gate(index, gate_BTD)
            for number, (w1, w3, w2) in enumerate(self.experts[index]):
                share = weights_BTE[..., number : number + 1]
                if bool((share != 0).any()):
                    x_BTD = x_BTD + share * swiglu(gate_BTD, w1, w3, w2)
        hidden_BTD: Tensor = self.base.model.norm(x_BTD)
        return hidden_BTD


def top_k_gate(rows_LED: Sequence[Tensor], k: int) -> Gate:
    """Mixtral's gate: softmax over all experts, the top k, renormalised."""

    def gate(layer: int, x_BTD: Tensor) -> Tensor:
        return keep_top(x_BTD @ rows_LED[layer].T, k)

    return gate


def keep_top(logits: Tensor, k: int) -> Tensor:
    """Softmax over the k largest of (..., E) logits, zero elsewhere."""
    if k < logits.shape[-1]:
        floor = logits.topk(k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    return logits.softmax(dim=-1)


def constant_gate(weights_E: Sequence[float]) -> Gate:
    """The same weights for every token."""
    fixed = torch.tensor(weights_E)

    def gate(layer: int, x_BTD: Tensor) -> Tensor:
        return fixed.expand(*x_BTD.shape[:2], -1)

    return gate


def one_hot(expert: int, experts: int) -> list[float]:
    """All weight on one expert."""
    return [float(index == expert) for index in range(experts)]


def losses(setting: Setting, model: LanguageModel, assignment: npt.NDArray[np.integer]) -> dict[str, Loss]:
    """Test loss on every partition ("0", "1", ...) and on the domain that nobody trained on ("ood")."""
    windows = {str(k): setting.windows(setting.documents(TEST, assignment, k)) for k in range(setting.experts)}
    windows[OUTSIDE] = setting.outside_windows()
    return {name: measure(model, some, setting.token_bytes, batch_tokens=2048) for name, some in windows.items()}
