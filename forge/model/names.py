"""Names and shapes of every tensor on disk: the one place where our words meet Hugging Face's.

Shared components and router carry their final Mixtral names. The shared FFN is a file of its own, named as a dense
layer's (`model.layers.L.mlp.wN.weight`); an expert's shard has the same tensors in the same order under an expert's
names, so that renaming rewrites a header and copies the data. In SwiGLU, y = w2(silu(w1 x) * w3 x). No torch here.
"""

from __future__ import annotations

from forge.config import ModelConfig

Shape = tuple[int, ...]
MATRICES = ("w1", "w2", "w3")
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def shared_tensors(model: ModelConfig) -> dict[str, Shape]:
    """Embedding, attention, norms and (untied) LM head, with their shapes."""
    d, heads, kv = model.d_model, model.n_heads * model.head_dim, model.kv_heads * model.head_dim
    tensors: dict[str, Shape] = {EMBEDDING: (model.vocab_size, d), FINAL_NORM: (d,)}
    for layer in range(model.n_layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = (d,)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = (d,)
        tensors[f"{prefix}.self_attn.q_proj.weight"] = (heads, d)
        tensors[f"{prefix}.self_attn.k_proj.weight"] = (kv, d)
        tensors[f"{prefix}.self_attn.v_proj.weight"] = (kv, d)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = (d, heads)
    if not model.tie_embeddings:
        tensors[HEAD] = (model.vocab_size, d)
    return tensors


def ffn_tensors(model: ModelConfig) -> dict[str, Shape]:
    """The shared FFN: where every expert starts, and the content of each placeholder."""
    return {ffn_name(layer, matrix): _matrix_shape(model, matrix)
            for layer in range(model.n_layers) for matrix in MATRICES}  # fmt: skip


def expert_tensors(model: ModelConfig, expert: int) -> dict[str, Shape]:
    """The tensors of one expert's shard."""
    return {expert_name(layer, expert, matrix): _matrix_shape(model, matrix)
            for layer in range(model.n_layers) for matrix in MATRICES}  # fmt: skip


def router_tensors(model: ModelConfig) -> dict[str, Shape]:
    """The router: one (n_experts, d_model) matrix a layer."""
    return {gate_name(layer): (model.n_experts, model.d_model) for layer in range(model.n_layers)}


def ffn_name(layer: int, matrix: str) -> str:
    """Name of a matrix of the shared FFN."""
    return f"model.layers.{layer}.mlp.{matrix}.weight"


def expert_name(layer: int, expert: int, matrix: str) -> str:
    """Name of a matrix of an expert."""
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"


def gate_name(layer: int) -> str:
    """Name of the router's matrix of a layer."""
    return f"model.layers.{layer}.block_sparse_moe.gate.weight"


def _matrix_shape(model: ModelConfig, matrix: str) -> Shape:
    return (model.d_model, model.ffn_width) if matrix == "w2" else (model.ffn_width, model.d_model)
