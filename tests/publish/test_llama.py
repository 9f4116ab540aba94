"""llama.cpp as the oracle of our GGUF files: the same logits, the same greedy text, the same perplexity.

Its Python binding compiles for ten minutes or more, so it is in no extra: `make test-llama` installs it and runs this file.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forge.config import ModelConfig
from forge.data.tokenizer import load_tokenizer, train_tokenizer
from forge.evaluate.generate import generate_ids
from forge.model.moe import MixtureLM
from forge.publish.gguf import export_gguf
from tests.model.conftest import write_mixture

llama_cpp: Any = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make test-llama` does it")

CONFIG = ModelConfig(vocab_size=300, d_model=64, d_ff=192, n_layers=2, n_heads=4, n_experts=3, top_k=2, max_seq_len=256)
TEXT = "the quick brown fox jumps over the lazy dog and then some more words follow it across the field " * 40


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = write_mixture(tmp_path / "model", CONFIG)
    train_tokenizer([TEXT, TEXT.upper()], 300).save(str(directory / "tokenizer.json"))
    return directory


def logits(path: Path, tokens: list[int], cache: str = "F16") -> Any:
    """What llama.cpp computes. It keeps keys and values as float16 unless told otherwise, also for a file of float32."""
    kind = getattr(llama_cpp, f"GGML_TYPE_{cache}")
    with contextlib.closing(llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1,
                                            type_k=kind, type_v=kind)) as llama:  # fmt: skip
        llama.eval(tokens)
        return np.array(llama.scores[: len(tokens)])


@torch.inference_mode()
def ours(directory: Path, tokens: list[int]) -> Any:
    model = MixtureLM.load(directory)
    return (model(torch.tensor([tokens]))[0] @ model.head_weight.T).numpy()


def perplexity(logits_TV: Any, tokens: list[int]) -> float:
    shifted = logits_TV[:-1] - logits_TV[:-1].max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(np.exp(-log_p[np.arange(len(tokens) - 1), tokens[1:]].mean()))


def test_the_same_logits(model_dir: Path, tmp_path: Path) -> None:
    export_gguf(model_dir, tmp_path / "m.gguf", "f32")
    tokens = load_tokenizer(model_dir / "tokenizer.json").encode(TEXT).ids[:200]
    expected = ours(model_dir, tokens)
    assert expected.std() > 0.5
    errors = {cache: np.abs(logits(tmp_path / "m.gguf", tokens, cache) - expected).max() for cache in ("F32", "F16")}
    print(f"f32: largest difference of a logit, by the cache's type: {errors}; standard deviation {expected.std():.2f}")
    assert errors["F32"] < 1e-3 and errors["F16"] < 0.2


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_the_same_greedy_text(model_dir: Path, tmp_path: Path, kind: Any) -> None:
    export_gguf(model_dir, tmp_path / "m.gguf", kind)
    tokens = load_tokenizer(model_dir / "tokenizer.json").encode(TEXT).ids[:32]
    expected = generate_ids(MixtureLM.load(model_dir), tokens, 32, temperature=0.0)
    written = list(tokens)
    for _ in range(32):
        written.append(int(logits(tmp_path / "m.gguf", written)[-1].argmax()))
    print(f"{kind}: {len(expected)} greedy tokens compared")
    assert len(expected) == 32 and written[32:] == expected


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 0.005), ("f16", 0.005), ("q8_0", 0.05)])
def test_the_perplexity_is_ours(model_dir: Path, tmp_path: Path, kind: Any, tolerance: float) -> None:
    export_gguf(model_dir, tmp_path / "m.gguf", kind)
    tokens = load_tokenizer(model_dir / "tokenizer.json").encode(TEXT).ids[:200]
    found, expected = perplexity(logits(tmp_path / "m.gguf", tokens), tokens), perplexity(ours(model_dir, tokens), tokens)
    print(f"{kind}: perplexity {found:.2f}, ours {expected:.2f} ({found / expected - 1:+.3%})")
    assert found == pytest.approx(expected, rel=tolerance)


def test_the_modelfile_beside_it_names_the_file(model_dir: Path, tmp_path: Path) -> None:
    export_gguf(model_dir, tmp_path / "m.gguf")
    words = dict(line.split(maxsplit=1) for line in (tmp_path / "Modelfile").read_text().splitlines())
    with contextlib.closing(llama_cpp.Llama(str(tmp_path / words["FROM"]), vocab_only=True, verbose=False)) as llama:
        assert llama.metadata["general.architecture"] == "llama"


def test_the_tokenizer_is_ours(model_dir: Path, tmp_path: Path) -> None:
    export_gguf(model_dir, tmp_path / "m.gguf")
    with contextlib.closing(llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)) as llama:
        for text in (TEXT[:90], "Ünïcode, 日本語 and 12345  spaces\n\ttabs", "it's we'll"):
            assert llama.tokenize(text.encode(), add_bos=False) == load_tokenizer(model_dir / "tokenizer.json").encode(text).ids
