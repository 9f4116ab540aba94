"""GGUF: the assembled model as one file for llama.cpp and what is built on it, written one tensor at a time.

llama.cpp computes a Mixtral as its architecture `llama` with experts. Its file differs from ours in three ways: the names; the
matrices of a layer's experts, which are stacked, (E, d_out, d_in); and the rows of Q and K, since llama.cpp rotates pairs
(2i, 2i + 1) of a head's dimensions where Hugging Face rotates (i, i + head_dim / 2).

Norms and gates stay float32, whatever the type of the file: they are small, and decide much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from forge.config import ModelConfig
from forge.errors import ConfigError, storage_errors
from forge.files import TEMPORARY_SUFFIX
from forge.model import names
from forge.model.moe import read_model_config, tensor_files
from forge.vocabulary import END_OF_TEXT

if TYPE_CHECKING:
    from gguf import GGUFWriter

GgufType = Literal["f32", "f16", "q8_0"]
GGUF_TYPES: tuple[str, ...] = get_args(GgufType)
#: Rows of a quantised matrix are cut into blocks of this many weights.
_BLOCK = 32
#: Our matrices and llama.cpp's: gate, down and up of silu(w1 x) * w3 x.
_EXPERT_NAMES = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
_ATTENTION_NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}

Array = npt.NDArray[np.float32]


class GgufTensor(NamedTuple):
    """A tensor of the file: its name and shape there, how to make it, and the type that it is kept in at least."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Array]
    least: GgufType


def export_gguf(model_dir: Path, target: Path, kind: GgufType = "f16") -> int:
    """Write an assembled model as a GGUF file, and an Ollama Modelfile beside it; returns the bytes of the file.

    Memory: the largest stack of one matrix of all experts of a layer. The file appears when it is whole.

    Args:
        model_dir: the model, with its tokenizer.
        target: the file.
        kind: of the weights; q8_0 is 8 bits a weight and a scale for every 32 of them.

    Raises:
        ConfigError: the `gguf` package is not installed, or the model is not one that can be exported.
        StorageError: a file is missing or damaged, or the disk is full or read-only.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("Exporting to GGUF needs the package gguf: pip install 'modularforge[gguf]'.") from error
    config = read_model_config(model_dir)
    tensors = list(_tensors(config, model_dir))
    temporary = target.with_name(target.name + TEMPORARY_SUFFIX)
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(temporary, "llama")
        try:
            _describe(writer, config, target.stem, kind)
            _describe_tokenizer(writer, model_dir / "tokenizer.json", config.vocab_size)
            kinds = [_kind_of(tensor, kind) for tensor in tensors]
            for tensor, its in zip(tensors, kinds, strict=True):
                raw = gguf.GGMLQuantizationType[its.upper()]
                size = int(np.prod(gguf.quant_shape_to_byte_shape(tensor.shape, raw)))
                # A quantised tensor is announced by the shape of its bytes.
                shape = gguf.quant_shape_to_byte_shape(tensor.shape, raw) if its == "q8_0" else tensor.shape
                dtype = np.dtype({"f32": np.float32, "f16": np.float16, "q8_0": np.uint8}[its])
                writer.add_tensor_info(tensor.name, shape, dtype, size, raw_dtype=raw)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor, its in zip(tensors, kinds, strict=True):
                writer.write_tensor_data(gguf.quantize(tensor.read(), gguf.GGMLQuantizationType[its.upper()]))
            writer.close()
            temporary.replace(target)
        finally:
            writer.close()
            temporary.unlink(missing_ok=True)
        modelfile = f'FROM ./{target.name}\nTEMPLATE "{{{{ .Prompt }}}}"\nPARAMETER num_ctx {config.max_seq_len}\n'
        target.with_name("Modelfile").write_text(modelfile + f'PARAMETER stop "{END_OF_TEXT}"\n', encoding="utf-8")
    return target.stat().st_size


def _kind_of(tensor: GgufTensor, kind: GgufType) -> GgufType:
    if tensor.least == "f32" or kind == "f32":
        return "f32"
    fits = tensor.shape[-1] % _BLOCK == 0
    return kind if tensor.least == "q8_0" and fits else "f16"


def _describe(writer: GGUFWriter, config: ModelConfig, name: str, kind: GgufType) -> None:
    import gguf

    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}[kind]])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_expert_count(config.n_experts)
    writer.add_expert_used_count(config.top_k)


def _describe_tokenizer(writer: GGUFWriter, path: Path, vocab_size: int) -> None:
    from gguf import TokenType

    from forge.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if len(vocabulary) > vocab_size:
        raise ConfigError(f"{path} has more tokens than the model beside it: it is another model's.")
    tokens = [f"[unused{index}]" for index in range(vocab_size)]
    kinds = [TokenType.UNUSED] * vocab_size
    for token, index in vocabulary.items():
        tokens[index] = token
        kinds[index] = TokenType.NORMAL
    for index, added in tokenizer.get_added_tokens_decoder().items():
        kinds[index] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    end = vocabulary[END_OF_TEXT]
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)


def _tensors(config: ModelConfig, model_dir: Path) -> Iterator[GgufTensor]:
    """Every tensor of the file, in order; nothing is read yet."""
    shapes: dict[str, names.Shape] = names.shared_tensors(config) | names.router_tensors(config)
    for expert in range(config.n_experts):
        shapes |= names.expert_tensors(config, expert)
    files = tensor_files(model_dir, shapes)

    def read(name: str) -> Array:
        return _read(files[name], name, shapes[name])

    def one(name: str, ours: str, least: GgufType = "q8_0", heads: int = 0) -> GgufTensor:
        return GgufTensor(name, shapes[ours], lambda: _interleave(read(ours), heads) if heads else read(ours), least)

    def stack(layer: int, matrix: str) -> GgufTensor:
        parts = [names.expert_name(layer, expert, matrix) for expert in range(config.n_experts)]
        shape = (config.n_experts, *shapes[parts[0]])
        name = f"blk.{layer}.{_EXPERT_NAMES[matrix]}.weight"
        return GgufTensor(name, shape, lambda: np.stack([read(part) for part in parts]), "q8_0")

    # What the router needs to know (forge.router.context) is tiny there and in o_proj: 8 bits would lose it.
    yield one("token_embd.weight", names.EMBEDDING, "f16")
    yield one("output_norm.weight", names.FINAL_NORM, "f32")
    if not config.tie_embeddings:
        yield one("output.weight", names.HEAD)
    for layer in range(config.n_layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        yield one(f"{theirs}.attn_norm.weight", f"{ours}.input_layernorm.weight", "f32")
        yield one(f"{theirs}.ffn_norm.weight", f"{ours}.post_attention_layernorm.weight", "f32")
        for projection, name in _ATTENTION_NAMES.items():
            heads = {"q_proj": config.n_heads, "k_proj": config.kv_heads}.get(projection, 0)
            least: GgufType = "f16" if projection == "o_proj" else "q8_0"
            yield one(f"{theirs}.{name}.weight", f"{ours}.self_attn.{projection}.weight", least, heads)
        yield one(f"{theirs}.ffn_gate_inp.weight", names.gate_name(layer), "f32")
        for matrix in names.MATRICES:
            yield stack(layer, matrix)


def _interleave(weight_OD: Array, heads: int) -> Array:
    """Rows (i, i + head_dim / 2) of each head become rows (2i, 2i + 1)."""
    rows, width = weight_OD.shape
    return weight_OD.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def _read(path: Path, name: str, shape: names.Shape) -> Array:
    from forge.model.lm import read_tensors

    tensor: Array = read_tensors(path, {name: shape})[name].float().numpy()
    return tensor

