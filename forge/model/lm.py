"""The dense language model: the shared components with the shared FFN, or with one expert, in every layer.

Shape suffixes: B batch, T tokens, D d_model, V vocab_size. `hidden_BTD` has shape (B, T, D).
Parameter names are those of the files (`forge.model.names`), so a state dict and a safetensors file are the same thing.
"""

from __future__ import annotations

from collections.abc import Iterable
import math
from pathlib import Path
from typing import Protocol, cast

from safetensors import SafetensorError, safe_open
import torch
from torch import Tensor, nn

from forge.config import ModelConfig
from forge.errors import StorageError
from forge.model import names
from forge.model.attention import Attention, Rotary, rotary_tables
from forge.model.layers import Embedding, FeedForward, Linear, RMSNorm
from forge.model.recompute import recomputed

#: Standard deviation of initial weights (GPT-2's; residual projections get it divided by sqrt(2 n_layers)).
INITIAL_STD = 0.02
#: The projections that write to the residual stream.
RESIDUAL_PROJECTIONS = ("o_proj.weight", "w2.weight")


class LanguageModel(Protocol):
    """What losses are measured on: (B, T) token ids to (B, T, D) hidden states, and the head (V, D) that reads them."""

    def __call__(self, tokens_BT: Tensor, /) -> Tensor:
        """Hidden states after the final norm."""

    @property
    def head_weight(self) -> Tensor:
        """The LM head."""


class DenseLayer(nn.Module):
    """A pre-norm decoder layer: x + attention(norm x), then x + ffn(norm x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = FeedForward(config.d_model, config.ffn_width)

    def forward(self, x_BTD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Return the layer's output and the input of its FFN (which is its gate's input), (B, T, D) each."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotary)
        gate_input_BTD = self.post_attention_layernorm(x_BTD)
        return x_BTD + self.mlp(gate_input_BTD), gate_input_BTD


class Decoder(nn.Module):
    """What the names on disk call `model`: embedding, layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(DenseLayer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)


class DenseLM(nn.Module):
    """The shared components with one FFN a layer.

    Parameters are made on torch's default device, uninitialised; under `torch.device("meta")` they take no memory.

    Attributes:
        config: the architecture.
        recompute: whether training keeps only each layer's input and computes the rest again in the backward pass.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.model = Decoder(config)
        self.lm_head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Let matrix products be computed in `dtype`; the residual stream and the norms stay float32."""
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.dtype = dtype

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw new weights: norms 1, matrices normal(0, 0.02), residual projections divided by sqrt(2 n_layers).

        The draw is on the generator's device, in the order of the parameters, whatever the model's device.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            std = INITIAL_STD
            if name.endswith(RESIDUAL_PROJECTIONS):
                std /= math.sqrt(2 * self.config.n_layers)
            if parameter.device == generator.device:
                parameter.normal_(0.0, std, generator=generator)
            else:
                drawn = torch.empty(parameter.shape, device=generator.device).normal_(0.0, std, generator=generator)
                parameter.copy_(drawn)
        self._silence_context()

    def _silence_context(self) -> None:
        """Zero the context channels and the context head, which the router stage fills in (`forge.router.context`).

        Zero is a fixed point of training: nothing reads or writes the channels, so every gradient there is zero too.
        """
        config = self.config
        if not config.context_channels:
            return
        channels, head = slice(-config.context_channels, None), slice(-config.head_dim, None)
        group = slice(-config.head_dim * (config.n_heads // config.kv_heads), None)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter[channels] = 0
            elif name.endswith(RESIDUAL_PROJECTIONS):
                parameter[channels] = 0
            else:
                parameter[:, channels] = 0
        for layer in cast(Iterable[DenseLayer], self.model.layers):
            attention = layer.self_attn
            attention.q_proj.weight[group] = 0
            attention.k_proj.weight[head] = 0
            attention.v_proj.weight[head] = 0
            attention.o_proj.weight[:, group] = 0

    def forward(self, tokens_BT: Tensor, gate_inputs: list[Tensor] | None = None) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens_BT: token ids, int64.
            gate_inputs: when given, each layer's gate input (B, T, D) is appended to it.

        Returns:
            hidden_BTD; logits are `hidden_BTD @ head_weight.T`.
        """
        rotary = rotary_tables(self.config, tokens_BT.shape[1], tokens_BT.device)
        x_BTD: Tensor = self.model.embed_tokens(tokens_BT)
        for layer in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                x_BTD, gate_input_BTD = recomputed(layer, x_BTD, rotary)
            else:
                x_BTD, gate_input_BTD = layer(x_BTD, rotary)
            if gate_inputs is not None:
                gate_inputs.append(gate_input_BTD)
        hidden_BTD: Tensor = self.model.norm(x_BTD)
        return hidden_BTD

    @property
    def head_weight(self) -> Tensor:
        """The LM head, (V, D): the embedding when they are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight


def load_dense(
    config: ModelConfig, shared: Path, ffn: Path, products: torch.dtype = torch.float32, expert: int | None = None
) -> DenseLM:
    """Load the shared components with a shared FFN, or with an expert's shard in its place.

    The shared tensors are frozen (`requires_grad` is off) and stay mapped from their file where its type is the one wanted:
    that of the products for matrices, so that each is in memory once, and float32 for norms. An embedding keeps the type of
    its file where products are narrower than float32: looking up a vector must not round it. The FFN's are float32 copies
    that may be trained in place.

    Args:
        config: the architecture.
        shared: safetensors file of the shared components.
        ffn: safetensors file of the shared FFN or, with `expert`, of that expert's shard.
        products: type of the products that training will compute.
        expert: whose shard `ffn` is; none for the shared FFN.

    Raises:
        StorageError: a file is missing, damaged, or lacks a tensor of the right shape.
    """
    with torch.device("meta"):
        model = DenseLM(config)
    shapes = names.shared_tensors(config)
    embedding = {names.EMBEDDING: shapes.pop(names.EMBEDDING)}
    frozen = read_tensors(shared, shapes, products)
    frozen |= read_tensors(shared, embedding, torch.float32 if products == torch.float32 else None)
    wanted = names.ffn_tensors(config) if expert is None else names.expert_tensors(config, expert)
    copies = read_tensors(ffn, wanted, torch.float32, copy=True).values()
    trainable = dict(zip(names.ffn_tensors(config), copies, strict=True))
    model.load_state_dict({**frozen, **trainable}, strict=True, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return model


def read_tensors(path: Path, shapes: dict[str, names.Shape] | Iterable[str], dtype: torch.dtype | None = None,
                 copy: bool = False) -> dict[str, Tensor]:  # fmt: skip
    """Map tensors of a safetensors file, in the order asked for; pages are read when they are first used.

    What is copied is read by a map of its own, so that no more of the file is resident beside the copies than one tensor.

    Args:
        path: the file.
        shapes: names of the tensors, with the shapes to insist on if it is a dict.
        dtype: type of the matrices; vectors are float32 then. Tensors of another type are copied.
        copy: whether all of them are.

    Raises:
        StorageError: the file is missing or damaged, or a tensor is missing or has another shape.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in shapes}
        for name, mapped in tensors.items():
            wanted = mapped.dtype if dtype is None else torch.float32 if mapped.dim() == 1 else dtype
            if copy or mapped.dtype != wanted:
                with safe_open(path, framework="pt") as file:
                    tensors[name] = file.get_tensor(name).to(wanted, copy=True)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"Cannot load the model's tensors from {path}: it is missing, damaged, or lacks one of them.",
            detail=str(error)) from error  # fmt: skip
    if isinstance(shapes, dict):
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != tuple(shapes[name]):
                raise StorageError(f"{path} does not fit the config: {name} has shape {tuple(tensor.shape)}, "
                                   f"expected {tuple(shapes[name])}.")  # fmt: skip
    return tensors
