"""The evaluation of a whole model directory with a real tokenizer and token files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from forge.config import EvaluationConfig
from forge.data.tokenizer import load_tokenizer, token_bytes
from forge.data.tokens import TokenWriter
from forge.errors import DataError
from forge.evaluate.heldout import COMPARED_MIN_TOKENS, HeldOut, Measured
from forge.evaluate.perplexity import Loss, figures, measure
from forge.evaluate.report import evaluate_model
from forge.model.moe import MixtureLM
from forge.vocabulary import ALONE, ORACLE, OURS, SHARED, UNIFORM
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
    return evaluate_model(directory, files, directory / "tokenizer.json", CONFIG, **{"final": False, **options})


def held_out(files: list[Path], config: EvaluationConfig = CONFIG) -> HeldOut:
    return HeldOut.of(files, TINY.model_copy(update={"n_experts": 3}), config)


def test_a_row_says_what_was_measured(directory: Path, token_files: list[Path]) -> None:
    told: list[dict[str, Any]] = []
    alone = Measured([Loss(60.0, 10, 10), Loss(50.0, 10, 20), Loss()], [Loss(60.0, 10, 10), Loss(50.0, 10, 20), Loss()])
    row = run(directory, token_files, arrived=[2], shared=alone, progress=lambda **event: told.append(event))
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    first, second, empty = row["partitions"]
    assert (row["experts"], row["arrived"], row["matrix"], row["samples"]) == (1, [2], None, [])
    assert row["mean_loss"] == pytest.approx((first["loss"] + second["loss"]) / 2)
    assert row["mean_perplexity"] == pytest.approx(math.exp(row["mean_loss"]))
    assert row["shared_mean_loss"] == pytest.approx(5.5) and row["shared_pooled_loss"] == pytest.approx(5.5)
    assert row["shared_pooled_bits_per_byte"] == pytest.approx(110 / 30 / math.log(2))
    assert first["perplexity"] == pytest.approx(math.exp(first["loss"]))
    assert empty["loss"] is None and empty["tokens"] == 0 and empty["shared_loss"] is None
    total = first["loss"] * first["tokens"] + second["loss"] * second["tokens"]
    assert row["pooled_loss"] == pytest.approx(total / (first["tokens"] + second["tokens"]))
    text_bytes = sum(len(text.encode()) for texts in TEXTS for text in texts)
    assert row["pooled_bits_per_byte"] == pytest.approx(total / math.log(2) / text_bytes)
    assert row["router"]["tokens"] == first["tokens"] + second["tokens"]
    assert [event["step"] for event in told] == [1, 2, 3, 3]
    assert list(row["rivals"]) == [SHARED, UNIFORM, OURS, ORACLE]
    assert row["explanation"] and all(sentence.endswith(".") for sentence in row["explanation"])


def test_the_final_row_has_a_matrix_and_samples(directory: Path, token_files: list[Path]) -> None:
    row = run(directory, token_files, final=True)
    assert row["experts"] == 3
    assert [[value is None for value in line] for line in row["matrix"]] == [[False, False, True]] * 3
    assert [sample["partition"] for sample in row["samples"]] == [0, 1, 0]
    assert row["samples"][0]["prompt"] == TEXTS[0][0][:16]
    assert row["samples"][2]["prompt"] == TEXTS[0][1]
    assert row["samples"] == run(directory, token_files, final=True)["samples"]


def test_rivals_are_measured_on_the_windows_that_ours_is_compared_on(tmp_path: Path, directory: Path) -> None:
    """With four times the least number of tokens each third window is compared, and no window is lost or doubled."""
    paths = [tmp_path / "0.tokens", tmp_path / "1.tokens", tmp_path / "2.tokens"]
    for number, path in enumerate(paths):
        with TokenWriter(path, TINY.vocab_size) as writer:
            for length in range(40, 160, 5):
                writer.append([1 + (number * 7 + position * length) % 255 for position in range(length)])
    config = EvaluationConfig(tokens=4 * COMPARED_MIN_TOKENS, samples=0)
    windows = held_out(paths, config)
    assert windows.stride == 3
    every, compared, others = ([tuple(window) for window in of(1)]
                               for of in (windows.windows, windows.compared, windows.others))  # fmt: skip
    assert sorted(compared + others) == sorted(every) and compared == every[::3]

    model, sizes = MixtureLM.load(directory), token_bytes(load_tokenizer(directory / "tokenizer.json"))
    row = evaluate_model(directory, paths, directory / "tokenizer.json", config, final=True)
    rivals = row["rivals"]
    assert list(rivals) == [*(ALONE.format(expert) for expert in range(3)), UNIFORM, OURS, ORACLE]
    expected: dict[str, list[Loss]] = {
        UNIFORM: [measure(model, windows.compared(p), sizes, gate="uniform") for p in range(3)],
        OURS: [measure(model, windows.compared(p), sizes) for p in range(3)],
        ORACLE: [measure(model, windows.compared(p), sizes, only_expert=p) for p in range(3)],
        ALONE.format(2): [measure(model, windows.compared(p), sizes, only_expert=2) for p in range(3)],
    }
    for name, losses in expected.items():
        assert rivals[name] == {key: pytest.approx(value, rel=1e-5) for key, value in figures(losses).items()}
    assert row["compared_tokens"] == sum(loss.tokens for loss in expected[OURS]) < row["router"]["tokens"]
    whole = [measure(model, windows.windows(p), sizes) for p in range(3)]
    assert row["mean_loss"] == pytest.approx(figures(whole)["mean_loss"], rel=1e-5)
    assert [row["matrix"][p][p] for p in range(3)] == rivals[ORACLE]["losses"]


def test_experts_that_have_not_arrived_are_measured_once(directory: Path, token_files: list[Path]) -> None:
    """They are one FFN: the second placeholder's row is the first one's, even here, where it is another expert."""
    row = run(directory, token_files, final=True, arrived=[1])
    assert list(row["rivals"]) == [ALONE.format(1), UNIFORM, OURS, ORACLE]
    assert row["matrix"][0] == row["matrix"][2] != row["matrix"][1]


def test_nothing_held_out_is_one_sentence(directory: Path, token_files: list[Path]) -> None:
    with pytest.raises(DataError, match="No partition has held-out documents"):
        run(directory, token_files[2:])
