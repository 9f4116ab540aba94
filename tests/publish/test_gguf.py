"""GGUF files read back with the gguf package: every weight, the tokenizer and the sizes; and llama.cpp itself where it is."""

from __future__ import annotations

import json
from pathlib import Path
import shutil
from typing import Any

from click.testing import CliRunner
import gguf
import numpy as np
import numpy.typing as npt
import pytest
from safetensors import safe_open

from forge.cli import main
from forge.config import ModelConfig
from forge.data.tokenizer import train_tokenizer
from forge.errors import StorageError
from forge.model import names
from forge.publish.gguf import GGUF_TYPES, export_gguf
from tests.model.conftest import write_mixture

CONFIG = ModelConfig(vocab_size=320, d_model=64, d_ff=192, n_layers=2, n_heads=5, head_dim=16, n_experts=3, top_k=2,
                     max_seq_len=256, context_channels=8)  # fmt: skip
TEXT = "the quick brown fox jumps over the lazy dog and then some more words follow it across the field " * 40


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = write_mixture(tmp_path / "model", CONFIG)
    tokenizer = train_tokenizer([TEXT, TEXT.upper()], 300)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def weights(directory: Path) -> dict[str, npt.NDArray[np.float32]]:
    found: dict[str, npt.NDArray[np.float32]] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return found


def read_back(path: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[np.float32]], dict[str, str]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist()) for t in reader.tensors}
    return fields, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


def halves(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows as Hugging Face has them, from rows as llama.cpp has them: the inverse, spelled out row by row."""
    size = len(weight) // heads
    order = [head * size + 2 * i + half for head in range(heads) for half in (0, 1) for i in range(size // 2)]
    return weight[order]


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_every_weight_comes_back(model_dir: Path, tmp_path: Path, kind: Any) -> None:
    size = export_gguf(model_dir, tmp_path / "out" / "m.gguf", kind)
    assert size == (tmp_path / "out" / "m.gguf").stat().st_size
    _, found, kinds = read_back(tmp_path / "out" / "m.gguf")
    ours = weights(model_dir)
    tolerance = {"f32": 0.0, "f16": 5e-4, "q8_0": 8e-3}[kind]

    def same(theirs: npt.NDArray[np.float32], name: str) -> None:
        # 8 bits: half a step of the block's largest value over 127.
        np.testing.assert_allclose(theirs, ours[name], rtol=0, atol=tolerance * float(np.abs(ours[name]).max()))

    same(found["token_embd.weight"], "model.embed_tokens.weight")
    for layer in range(CONFIG.n_layers):
        prefix = f"model.layers.{layer}.self_attn"
        same(halves(found[f"blk.{layer}.attn_q.weight"], CONFIG.n_heads), f"{prefix}.q_proj.weight")
        same(halves(found[f"blk.{layer}.attn_k.weight"], CONFIG.kv_heads), f"{prefix}.k_proj.weight")
        same(found[f"blk.{layer}.attn_v.weight"], f"{prefix}.v_proj.weight")
        same(found[f"blk.{layer}.attn_output.weight"], f"{prefix}.o_proj.weight")
        np.testing.assert_array_equal(found[f"blk.{layer}.ffn_gate_inp.weight"], ours[names.gate_name(layer)])
        for matrix, theirs in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            for expert in range(CONFIG.n_experts):
                same(found[f"blk.{layer}.ffn_{theirs}_exps.weight"][expert], names.expert_name(layer, expert, matrix))
    assert len(found) == 2 + 10 * CONFIG.n_layers, "tied: no output.weight"
    assert kinds["blk.0.ffn_up_exps.weight"] == kind.upper()
    assert {kinds[name] for name in kinds if "norm" in name or "gate_inp" in name} == {"F32"}


def test_sizes_and_tokenizer_are_the_models(model_dir: Path, tmp_path: Path) -> None:
    export_gguf(model_dir, tmp_path / "m.gguf")
    fields, _, _ = read_back(tmp_path / "m.gguf")
    said = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}
    assert said == {
        "vocab_size": 320, "context_length": 256, "embedding_length": 64, "block_count": 2,
        "feed_forward_length": CONFIG.ffn_width, "attention.head_count": 5, "attention.head_count_kv": 5,
        "attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 16,
        "rope.freq_base": pytest.approx(CONFIG.rope_theta), "attention.layer_norm_rms_epsilon": pytest.approx(CONFIG.norm_eps),
        "expert_count": 3, "expert_used_count": 2}  # fmt: skip
    assert fields["general.architecture"] == "llama" and fields["tokenizer.ggml.pre"] == "gpt-2"
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    tokens = fields["tokenizer.ggml.tokens"]
    assert {token: tokens.index(token) for token in tokenizer["model"]["vocab"]} == tokenizer["model"]["vocab"]
    assert tokens[300:] == [f"[unused{index}]" for index in range(300, 320)]
    assert fields["tokenizer.ggml.token_type"][0] == gguf.TokenType.CONTROL
    assert fields["tokenizer.ggml.eos_token_id"] == 0 and fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    assert 'PARAMETER num_ctx 256\nPARAMETER stop "<|endoftext|>"' in (tmp_path / "Modelfile").read_text()


def test_nothing_is_left_of_an_export_that_failed(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "expert-001.safetensors").unlink()
    with pytest.raises(StorageError, match="expert-001"):
        export_gguf(model_dir, tmp_path / "out" / "m.gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_says_what_it_wrote(model_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    done = CliRunner().invoke(main, ["export", str(model_dir), "--gguf", str(target), "--type", "q8_0"])
    assert done.exit_code == 0, done.output
    assert str(target) in done.output and "Modelfile" in done.output and target.is_file()
    shutil.rmtree(model_dir)
    missing = CliRunner().invoke(main, ["export", str(model_dir), "--gguf", str(target)])
    assert missing.exit_code != 0 and target.is_file()
