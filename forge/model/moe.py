"""The assembled model: a Mixtral directory, read in place, with only the routed experts computed.

Shape suffixes: B batch, T tokens, N tokens of all sequences (B * T), D d_model, E n_experts, K top_k, V vocab_size,
A assignments of a token to an expert (N * K), M those of one expert.
"""

from __future__ import annotations

from collections import defaultdict
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError
import torch
from torch import Tensor, nn

from forge.config import ModelConfig
from forge.errors import ConfigError, StorageError
from forge.model import names
from forge.model.attention import Attention, KeyValueCache, Rotary, rotary_tables
from forge.model.layers import Embedding, FeedForward, Linear, RMSNorm
from forge.model.lm import read_tensors
from forge.vocabulary import INDEX_FILE, SINGLE_FILE

#: Keys of config.json that would change the computation, with the only value that is computed here.
FIXED_KEYS: dict[str, Any] = {"hidden_act": "silu", "sliding_window": None}

GateMode = Literal["router", "uniform"]


class OddWidth(ModelConfig):
    """A checkpoint that was not made here, whose experts have a width that no `d_ff` gives."""

    odd_width: int = Field(ge=1)
    """The SwiGLU width."""

    @property
    def ffn_width(self) -> int:
        """SwiGLU width."""
        return self.odd_width


class Routing(NamedTuple):
    """What one layer's router decided for every token."""

    probabilities_NE: Tensor
    """Softmax over all experts, float32."""
    experts_NK: Tensor
    """The experts that the token was sent to, most probable first, int64."""
    weights_NK: Tensor
    """The weight of each of them; sums to 1."""


class Override(NamedTuple):
    """What to do instead of asking the router; for evaluation."""

    gate: GateMode = "router"
    only_expert: int | None = None


class SparseMoe(nn.Module):
    """A router and its experts (Jiang et al. 2024, arXiv 2401.04088, section 2.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.gate = Linear(config.d_model, config.n_experts)
        self.experts = nn.ModuleList(FeedForward(config.d_model, config.ffn_width) for _ in range(config.n_experts))

    def route(self, x_ND: Tensor) -> Routing:
        """Softmax over all experts in float32, keep the top k, renormalise them to sum to 1."""
        probabilities_NE = self.gate(x_ND).softmax(dim=-1, dtype=torch.float32)
        weights_NK, experts_NK = probabilities_NE.topk(self.top_k, dim=-1)
        return Routing(probabilities_NE, experts_NK, weights_NK / weights_NK.sum(dim=-1, keepdim=True))

    def forward(self, x_BTD: Tensor, override: Override, routing: list[Routing] | None = None) -> Tensor:
        """Mix the outputs of each token's experts; -> (B, T, D)."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        if routing is not None or (override.gate == "router" and override.only_expert is None):
            routed = self.route(x_ND)
            if routing is not None:
                routing.append(routed)
        if override.only_expert is not None:
            y_ND: Tensor = self.experts[override.only_expert](x_ND)
        elif override.gate == "uniform":
            y_ND = torch.zeros_like(x_ND)
            for expert in self.experts:
                y_ND += expert(x_ND) / len(self.experts)
        else:
            y_ND = self._mix(x_ND, routed)
        return y_ND.view_as(x_BTD)

    def _mix(self, x_ND: Tensor, routed: Routing) -> Tensor:
        y_ND = torch.zeros_like(x_ND)
        expert_of_A = routed.experts_NK.flatten()
        order_A = expert_of_A.argsort(stable=True)
        counts = torch.bincount(expert_of_A, minlength=len(self.experts)).tolist()
        weights_A1 = routed.weights_NK.flatten()[order_A, None]
        for expert, rows, weights_M1 in zip(
            self.experts, torch.split(order_A // self.top_k, counts), torch.split(weights_A1, counts), strict=True
        ):
            if len(rows):
                y_ND.index_add_(0, rows, (expert(x_ND[rows]) * weights_M1).to(y_ND.dtype))
        return y_ND


class MixtureLayer(nn.Module):
    """A pre-norm decoder layer with a mixture in the place of the FFN."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.block_sparse_moe = SparseMoe(config)

    def forward(
        self, x_BTD: Tensor, rotary: Rotary, cache: KeyValueCache | None, layer: int, override: Override,
        routing: list[Routing] | None,
    ) -> Tensor:  # fmt: skip
        """Map (B, T, D) to (B, T, D)."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotary, cache, layer)
        y_BTD: Tensor = self.block_sparse_moe(self.post_attention_layernorm(x_BTD), override, routing)
        return x_BTD + y_BTD


class MixtureDecoder(nn.Module):
    """What the names on disk call `model`: embedding, layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(MixtureLayer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)


class MixtureLM(nn.Module):
    """A Mixtral for inference; parameters are named as on disk, frozen, and made by `load`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = MixtureDecoder(config)
        self.lm_head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size)

    @classmethod
    def load(cls, directory: Path) -> MixtureLM:
        """Open a Hugging Face Mixtral directory: `config.json` and one safetensors file, or several and their index.

        float32 tensors stay mapped from their files and are paged in when first used. bfloat16 and float16 experts stay
        mapped too, and are widened to float32 one matrix at a time as they are computed; the other tensors of such a
        model are widened when it is loaded.

        Raises:
            StorageError: a file is missing or damaged, or a tensor is missing or has the wrong shape.
            ConfigError: the config describes a model that this class does not compute.
        """
        config = read_model_config(directory)
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        by_file: dict[Path, dict[str, names.Shape]] = defaultdict(dict)
        for name, path in tensor_files(directory, shapes).items():
            by_file[path][name] = shapes[name]
        state: dict[str, Tensor] = {}
        for path, wanted in by_file.items():
            rest = {name: shape for name, shape in wanted.items() if ".experts." not in name}
            state |= read_tensors(path, wanted) | read_tensors(path, rest, torch.float32)
        model.load_state_dict(state, strict=True, assign=True)
        return model.requires_grad_(False).eval()

    def forward(
        self, tokens_BT: Tensor, cache: KeyValueCache | None = None, routing: list[Routing] | None = None,
        gate: GateMode = "router", only_expert: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Hidden states after the final norm.

        Args:
            tokens_BT: token ids, int64.
            cache: keys and values of earlier tokens; the new ones are added to it.
            routing: when given, what each layer's router decided is appended to it, in order (also when overridden).
            gate: "router", or "uniform" for the plain mean of all experts.
            only_expert: send every token to this one expert instead.

        Returns:
            hidden_BTD; logits are `hidden_BTD @ head_weight.T`.
        """
        length = tokens_BT.shape[1]
        rotary = rotary_tables(self.config, length, tokens_BT.device) if cache is None else cache.rotary(length)
        override = Override(gate, only_expert)
        x_BTD: Tensor = self.model.embed_tokens(tokens_BT)
        for index, layer in enumerate(self.model.layers):
            x_BTD = layer(x_BTD, rotary, cache, index, override, routing)
        if cache is not None:
            cache.advance(length)
        hidden_BTD: Tensor = self.model.norm(x_BTD)
        return hidden_BTD

    @property
    def head_weight(self) -> Tensor:
        """The LM head, (V, D): the embedding when they are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight


def read_model_config(directory: Path) -> ModelConfig:
    """The architecture that a Hugging Face Mixtral directory's `config.json` describes.

    Raises:
        StorageError: the directory holds no readable `config.json`.
        ConfigError: it describes another architecture, or sizes that ours cannot express.
    """
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{directory} is not a model directory: it has no readable config.json.",
                           detail=str(error)) from error  # fmt: skip
    if not isinstance(raw, dict) or raw.get("model_type") != "mixtral":
        raise ConfigError(f"{path} does not describe a Mixtral model, which is the only kind that can be loaded here.")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    found = {**raw, "sliding_window": raw.get("sliding_window"), "hidden_act": raw.get("hidden_act", "silu")}
    odd = {key: found[key] for key, value in FIXED_KEYS.items() if found[key] != value}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        odd["rope_type"] = rope.get("rope_type", rope.get("type"))
    if odd:
        key, value = next(iter(odd.items()))
        raise ConfigError(f"{path} asks for {key} = {value!r}, which is not supported.")
    try:
        return _model_config(raw, rope)
    except KeyError as error:
        raise ConfigError(f"{path} lacks the key {error.args[0]!r}.") from error
    except (ValidationError, ValueError, TypeError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"{path} describes a model that cannot be loaded here: {reason}.",
                          detail=str(error)) from error  # fmt: skip


def _model_config(raw: dict[str, Any], rope: dict[str, Any]) -> ModelConfig:
    width, heads = raw["intermediate_size"], raw["num_attention_heads"]
    odd = {"odd_width": width} if width % 128 else {}
    return (OddWidth if odd else ModelConfig)(
        **odd,
        vocab_size=raw["vocab_size"],
        d_model=raw["hidden_size"],
        d_ff=max(8, width * 3 // 2),  # the inverse of ModelConfig.ffn_width
        n_layers=raw["num_hidden_layers"],
        n_heads=heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        n_kv_heads=raw.get("num_key_value_heads") or heads,
        context_channels=0,  # whatever is in the weights is computed like any other head
        n_experts=raw["num_local_experts"],
        top_k=raw["num_experts_per_tok"],
        max_seq_len=raw["max_position_embeddings"],
        rope_theta=rope.get("rope_theta") or raw.get("rope_theta") or 1e6,  # transformers' default for Mixtral
        norm_eps=raw["rms_norm_eps"],
        tie_embeddings=raw.get("tie_word_embeddings", False),
        dtype="bfloat16" if (raw.get("dtype") or raw.get("torch_dtype")) == "bfloat16" else "float32",
    )


def tensor_files(directory: Path, wanted: dict[str, names.Shape]) -> dict[str, Path]:
    """The file of each wanted tensor of a model directory.

    Raises:
        StorageError: the directory lacks an index that names them all, or the one file.
    """
    index = directory / INDEX_FILE
    single = directory / SINGLE_FILE
    if not index.is_file():
        if not single.is_file():
            raise StorageError(f"{directory} is not a whole model: it has neither {INDEX_FILE} nor {SINGLE_FILE}.")
        return dict.fromkeys(wanted, single)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: str(weight_map[name]) for name in wanted}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{index} is damaged, or does not name every tensor of the model.",
                           detail=str(error)) from error  # fmt: skip
    outside = [file for file in files.values() if Path(file).name != file]
    if outside:
        raise StorageError(f"{index} names a file outside its directory: {outside[0]}.")
    return {name: directory / file for name, file in files.items()}
