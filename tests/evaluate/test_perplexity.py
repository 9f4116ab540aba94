"""Losses equal a plain cross-entropy, however the windows are batched, and add up as they should."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from forge.evaluate.perplexity import Loss, document_losses, equal_weight_mean, figures, measure, pooled
from forge.model.lm import load_dense
from forge.model.moe import MixtureLM, Routing
from forge.vocabulary import SHARED_FILE
from tests.model.conftest import TINY, write_mixture


def windows(count: int = 40, seed: int = 0) -> list[npt.NDArray[Any]]:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 60, count)  # a window of one token predicts nothing
    return [random.integers(0, TINY.vocab_size, length).astype(np.uint16) for length in lengths]


@torch.inference_mode()
def plain(model: Any, batch: list[npt.NDArray[Any]], **options: Any) -> float:
    total = 0.0
    for window in batch:
        if len(window) > 1:
            tokens = torch.from_numpy(window.astype(np.int64))[None]
            logits = model(tokens[:, :-1], **options) @ model.head_weight.T
            total += float(F.cross_entropy(logits[0], tokens[0, 1:], reduction="sum"))
    return total


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixture(tmp_path_factory.mktemp("model"), TINY, same_ffn=False)


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_batches_and_padding_change_nothing(directory: Path, batch_tokens: int) -> None:
    model, held_out = MixtureLM.load(directory), windows()
    nats, tokens = document_losses(model, iter(held_out), batch_tokens=batch_tokens)
    assert tokens == sum(len(window) - 1 for window in held_out)
    assert nats == pytest.approx(plain(model, held_out), rel=1e-6)


def test_overrides_reach_the_model(directory: Path) -> None:
    model, held_out = MixtureLM.load(directory), windows(6)
    for options in ({"gate": "uniform"}, {"only_expert": 1}):
        nats, _ = document_losses(model, held_out, **options)
        assert nats == pytest.approx(plain(model, held_out, **options), rel=1e-6)


def test_a_mixture_of_copies_has_the_loss_of_the_dense_model(tmp_path: Path) -> None:
    write_mixture(tmp_path, TINY, same_ffn=True)
    dense = load_dense(TINY, tmp_path / SHARED_FILE, tmp_path / "ffn.safetensors")
    one, two = measure(dense, windows()), measure(MixtureLM.load(tmp_path), windows())
    assert one.nats_per_token == pytest.approx(two.nats_per_token, abs=1e-6)


def test_bytes_are_those_of_the_predicted_tokens(directory: Path) -> None:
    sizes_V = np.arange(TINY.vocab_size)
    held_out = [np.array([300, 1, 2]), np.array([7, 5])]
    assert measure(MixtureLM.load(directory), held_out, sizes_V).bytes == 1 + 2 + 5


def test_padding_is_marked_for_the_observer(directory: Path) -> None:
    seen = []

    def observe(routing: list[Routing], kept_N: Tensor) -> None:
        assert len(routing) == TINY.n_layers
        assert routing[0].experts_NK.shape == (len(kept_N), TINY.top_k)
        seen.append((len(kept_N), int(kept_N.sum())))

    measure(MixtureLM.load(directory), [np.arange(11), np.arange(5)], observe=observe)
    assert seen == [(20, 14)]


def test_units_and_means() -> None:
    loss = Loss(nats=20 * math.log(2), tokens=10, bytes=40)
    assert loss.nats_per_token == pytest.approx(2 * math.log(2))
    assert loss.perplexity == pytest.approx(4)
    assert loss.bits_per_byte == pytest.approx(0.5)
    other = Loss(nats=10.0, tokens=1)
    assert pooled([loss, other]) == Loss(loss.nats + 10.0, 11, 40)
    assert equal_weight_mean([loss, other, Loss()]) == pytest.approx((loss.nats_per_token + 10) / 2)
    assert math.isnan(Loss().perplexity) and math.isnan(Loss().bits_per_byte) and math.isnan(equal_weight_mean([]))
    assert Loss(1e6, 1).perplexity == math.inf


def test_figures_are_json_and_weigh_partitions_alike() -> None:
    row = figures([Loss(10.0, 5, 20), Loss(30.0, 10, 40), Loss()])
    assert row["losses"] == [2.0, 3.0, None]
    assert row["mean_loss"] == pytest.approx(2.5) and row["mean_perplexity"] == pytest.approx(math.exp(2.5))
    assert row["pooled_loss"] == pytest.approx(40 / 15)
    assert row["pooled_bits_per_byte"] == pytest.approx(40 / math.log(2) / 60)
    assert figures([Loss(1e6, 1)])["mean_perplexity"] is None and figures([])["mean_loss"] is None
