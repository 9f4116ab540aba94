"""The evaluation of a whole model directory, and of texts of the user's, with a real tokenizer and token files."""

from __future__ import annotations

import json
import math
from pathlib import Path
import shutil
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from forge.config import EvaluationConfig
from forge.data.tokenizer import load_tokenizer
from forge.data.tokens import TokenWriter
from forge.errors import DataError, StorageError
from forge.evaluate.perplexity import Loss
from forge.evaluate.report import evaluate_model, evaluate_text, summary
from forge.model.moe import MixtureLM
from tests.evaluate.test_generate import byte_tokenizer
from tests.model.conftest import TINY, write_mixture

CONFIG = EvaluationConfig(tokens=400, samples=3, sample_tokens=8)
TEXTS: tuple[list[str], ...] = (["a first document about numbers 123", "another"], ["déjà vu, encore une fois"], [])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_mixture(tmp_path_factory.mktemp("model"), TINY.model_copy(update={"n_experts": 3}))
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def token_files(directory: Path) -> list[Path]:
    tokenizer = byte_tokenizer()
    paths = [directory / f"test-{number}.tokens" for number in range(len(TEXTS))]
    for path, texts in zip(paths, TEXTS, strict=True):
        with TokenWriter(path, TINY.vocab_size) as writer:
            for text in texts:
                writer.append(tokenizer.encode(text).ids)
    return paths


def run(directory: Path, files: list[Path], **options: Any) -> dict[str, Any]:
    options = {"final": False, "shared_losses": [6.0, 5.0, None], **options}
    return evaluate_model(directory, files, directory / "tokenizer.json", CONFIG, **options)


def test_a_row_says_what_was_measured(directory: Path, token_files: list[Path]) -> None:
    told: list[dict[str, Any]] = []
    row = run(directory, token_files, experts=1, progress=lambda **event: told.append(event))
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    first, second, empty = row["partitions"]
    assert (row["experts"], row["matrix"], row["samples"]) == (1, None, [])
    assert row["mean_loss"] == pytest.approx((first["loss"] + second["loss"]) / 2)
    assert row["mean_perplexity"] == pytest.approx(math.exp(row["mean_loss"]))
    assert row["shared_mean_loss"] == pytest.approx(5.5)
    assert first["perplexity"] == pytest.approx(math.exp(first["loss"]))
    assert empty["loss"] is None and empty["tokens"] == 0
    total = first["loss"] * first["tokens"] + second["loss"] * second["tokens"]
    assert row["pooled_loss"] == pytest.approx(total / (first["tokens"] + second["tokens"]))
    text_bytes = sum(len(text.encode()) for texts in TEXTS for text in texts)
    assert row["pooled_bits_per_byte"] == pytest.approx(total / math.log(2) / text_bytes)
    assert row["router"]["tokens"] == first["tokens"] + second["tokens"]
    assert [event["step"] for event in told] == [1, 2, 3]


def test_the_final_row_has_a_matrix_and_samples(directory: Path, token_files: list[Path]) -> None:
    row = run(directory, token_files, final=True)
    assert row["experts"] == 3
    assert [[value is None for value in line] for line in row["matrix"]] == [[False, False, True]] * 3
    assert [sample["partition"] for sample in row["samples"]] == [0, 1, 0]
    assert row["samples"][0]["prompt"] == TEXTS[0][0][:16]
    assert row["samples"][2]["prompt"] == TEXTS[0][1]
    assert row["samples"] == run(directory, token_files, final=True)["samples"]


def test_partitions_of_the_summary_are_compared_like_with_like() -> None:
    row = summary([Loss(10.0, 5, 20), Loss(30.0, 10, 40)], [2.5, None])
    assert row["shared_mean_loss"] is None and row["shared_mean_perplexity"] is None
    assert row["mean_loss"] == pytest.approx(2.5)
    assert row["pooled_loss"] == pytest.approx(40 / 15)


def test_nothing_held_out_is_one_sentence(directory: Path, token_files: list[Path]) -> None:
    with pytest.raises(DataError, match="No partition has held-out documents"):
        run(directory, token_files[2:], shared_losses=[None])


def test_text_is_measured_whole(directory: Path, tmp_path: Path) -> None:
    model, tokenizer = MixtureLM.load(directory), load_tokenizer(directory / "tokenizer.json")
    texts = ["what is this?", "déjà vu"]
    result = evaluate_text(directory, iter(texts))
    nats = 0.0
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([[0, *tokenizer.encode(text).ids]])
            logits = model(ids[:, :-1]) @ model.head_weight.T
            nats += float(F.cross_entropy(logits[0], ids[0, 1:], reduction="sum"))
    size = sum(len(text.encode()) for text in texts)
    assert (result["documents"], result["bytes"], result["tokens"]) == (2, size, size)
    assert result["loss"] == pytest.approx(nats / size, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    with pytest.raises(DataError, match="There is no text"):
        evaluate_text(directory, [])
    bare = shutil.copytree(directory, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.json"))
    with pytest.raises(StorageError, match="holds no tokenizer.json"):
        evaluate_text(bare, texts)


def test_a_text_longer_than_the_context_is_measured_in_windows(directory: Path) -> None:
    text = "x y " * TINY.max_seq_len
    assert evaluate_text(directory, [text])["tokens"] == len(text)
