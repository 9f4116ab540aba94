"""Features and difficulties of documents, against one document at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from forge.config import ModelConfig
from forge.data.features import document_difficulties, document_features
from forge.data.tokens import TokenFile, TokenWriter
from forge.model.lm import DenseLM
from forge.vocabulary import END_OF_TEXT_ID

SEQ_LEN = 12


@pytest.fixture
def model() -> DenseLM:
    made = DenseLM(ModelConfig(vocab_size=260, d_model=32, d_ff=96, n_layers=2, n_heads=4, max_seq_len=SEQ_LEN))
    made.initialise(torch.Generator().manual_seed(0))
    return made.eval().requires_grad_(False)


@pytest.fixture
def corpus(tmp_path: Path) -> TokenFile:
    rng = np.random.default_rng(0)
    with TokenWriter(tmp_path / "corpus.safetensors", 260) as writer:
        for length in (5, 0, 30, 12, 1, 13):
            writer.append(rng.integers(1, 64, length).tolist())
    return TokenFile(tmp_path / "corpus.safetensors")


def first_windows(corpus: TokenFile) -> list[torch.Tensor]:
    windows = [corpus.document(index)[:SEQ_LEN].tolist() or [END_OF_TEXT_ID] for index in range(len(corpus))]
    return [torch.tensor([[END_OF_TEXT_ID, *window]]) for window in windows]


def test_features_are_mean_hidden_states(model: DenseLM, corpus: TokenFile, tmp_path: Path) -> None:
    steps: list[int] = []
    found = document_features(model, corpus, SEQ_LEN, tmp_path / "f.f32", lambda step, **_: steps.append(step))
    expected = [model(window[:, :-1])[0].mean(dim=0).numpy() for window in first_windows(corpus)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert steps[-1] == len(corpus)


def test_difficulties_are_mean_losses(model: DenseLM, corpus: TokenFile) -> None:
    found = document_difficulties(model, corpus, SEQ_LEN, lambda **_: None)
    expected = [float(F.cross_entropy(model(window[:, :-1])[0] @ model.head_weight.T, window[0, 1:]))
                for window in first_windows(corpus)]  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=1e-5)
