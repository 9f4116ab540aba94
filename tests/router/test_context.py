"""The context head: silent while the shared components learn, then what the router needs to know of the text so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
import torch

from forge.config import ModelConfig, PhaseConfig
from forge.model.lm import DenseLM
from forge.router.context import add_context, discriminants
from forge.router.fit import lda
from forge.router.statistics import LayerStatistics, collect, gate_inputs
from forge.train.loss import chunked_cross_entropy
from forge.train.optim import Optimizer

PARTITIONS = 4
Windows = list[npt.NDArray[np.int64]]


def model_config(kv_heads: int) -> ModelConfig:
    return ModelConfig(vocab_size=300, d_model=40, d_ff=64, n_layers=3, n_heads=6, head_dim=8, n_kv_heads=kv_heads,
                       n_experts=PARTITIONS, max_seq_len=32)  # fmt: skip


def trained(config: ModelConfig, steps: int = 20) -> DenseLM:
    model = DenseLM(config)
    model.initialise(torch.Generator().manual_seed(0))
    optimizer = Optimizer(dict(model.named_parameters()), PhaseConfig(tokens=1))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(0, config.vocab_size, (4, 33), generator=generator)
        hidden = model(tokens[:, :-1])
        torch.autograd.backward(chunked_cross_entropy(hidden.flatten(0, 1), model.head_weight, tokens[:, 1:].flatten()))
        optimizer.step(0.01)
    return model.eval().requires_grad_(False)


def text(partition: int, seed: int, count: int = 30) -> Windows:
    """Windows of a partition: its tokens overlap with the next one's, so that one token alone says little."""
    rng = np.random.default_rng(100 * seed + partition)
    return [rng.integers(40 * partition, 40 * partition + 160, 33) for _ in range(count)]


def partitions(seed: int = 0) -> Sequence[Callable[[], Windows]]:
    return [partial(text, partition, seed) for partition in range(PARTITIONS)]


@pytest.fixture(params=[6, 2], ids=["a key for every query", "grouped queries"])
def model(request: pytest.FixtureRequest) -> DenseLM:
    return trained(model_config(request.param))


def test_training_leaves_the_context_channels_and_the_context_head_at_zero(model: DenseLM) -> None:
    config, channels = model.config, slice(-model.config.context_channels, None)
    group = config.head_dim * (config.n_heads // config.kv_heads)
    for name, weight in model.named_parameters():
        assert weight.abs().sum() > 0
        if weight.ndim == 1 or name.endswith(("o_proj.weight", "w2.weight")):
            assert not weight[channels].any(), name
        else:
            assert not weight[:, channels].any(), name
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            assert not weight[-config.head_dim :].any(), name
        if name.endswith("q_proj.weight"):
            assert not weight[-group:].any(), name
        if name.endswith("o_proj.weight"):
            assert not weight[:, -group:].any(), name


def test_the_model_computes_what_it_did(model: DenseLM) -> None:
    tokens = torch.from_numpy(np.stack(text(0, 1)))
    before = model(tokens) @ model.head_weight.T
    add_context(model, partitions(), 1e-3)
    after = model(tokens) @ model.head_weight.T
    values = dict(model.named_parameters())["model.layers.0.self_attn.v_proj.weight"]
    assert values[-model.config.head_dim :].any()
    torch.testing.assert_close(after, before, rtol=0, atol=2e-6)


def accuracy(model: DenseLM) -> list[float]:
    """Held-out share of the tokens whose partition the discriminants of each layer's gate input name."""
    statistics = [LayerStatistics.empty(PARTITIONS, model.config.d_model) for _ in range(model.config.n_layers)]
    for partition in range(PARTITIONS):
        collect(model, partition, text(partition, 0), statistics)
    right, total = np.zeros(model.config.n_layers), 0
    for partition in range(PARTITIONS):
        for layers in gate_inputs(model, text(partition, 1)):
            total += len(layers[0])
            for index, x_ND in enumerate(layers):
                weights_KD, bias_K = lda(statistics[index], 1e-3)
                right[index] += ((x_ND @ weights_KD.T + bias_K).argmax(axis=1) == partition).sum()
    return [float(share) for share in right / total]


def test_the_router_sees_what_the_text_so_far_is_about(model: DenseLM) -> None:
    before = accuracy(model)
    add_context(model, partitions(), 1e-3)
    after = accuracy(model)
    assert all(later > sooner + 0.05 for sooner, later in zip(before, after, strict=True)), (before, after)


def test_the_same_text_gives_the_same_head() -> None:
    first, second = trained(model_config(6)), trained(model_config(6))
    add_context(first, partitions(), 1e-3)
    add_context(second, partitions(), 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_without_channels_nothing_changes() -> None:
    config = model_config(6).model_copy(update={"context_channels": 0})
    model = trained(config, steps=2)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    add_context(model, partitions(), 1e-3)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_discriminants_span_what_scikit_learn_finds() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(PARTITIONS), 250)
    x_ND = rng.normal(size=(len(labels), 6)) @ rng.normal(size=(6, 6)) + 2 * rng.normal(size=(PARTITIONS, 6))[labels]
    statistics = LayerStatistics.empty(PARTITIONS, 6)
    for partition in range(PARTITIONS):
        statistics.add(partition, x_ND[labels == partition])
    (ours_RD,) = discriminants([statistics], PARTITIONS - 1, 0.0)
    theirs_RD = LinearDiscriminantAnalysis(solver="eigen").fit(x_ND, labels).scalings_[:, : PARTITIONS - 1].T
    for ours_D, theirs_D in zip(ours_RD, theirs_RD, strict=True):
        cosine = abs(ours_D @ theirs_D) / np.linalg.norm(ours_D) / np.linalg.norm(theirs_D)
        assert cosine == pytest.approx(1.0, abs=1e-9)
