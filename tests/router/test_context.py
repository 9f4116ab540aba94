"""The context head: silent while the shared components learn, then what the router needs to know of the text so far."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.naive_bayes import MultinomialNB
import torch

from forge.config import ModelConfig, PhaseConfig
from forge.model.lm import DenseLM
from forge.router.context import add_context, count_tokens, evidence, running_mean
from forge.router.fit import bayes_rows
from forge.router.stage import temperatures
from forge.router.statistics import Array, gate_inputs
from forge.train.loss import chunked_cross_entropy
from forge.train.optim import Optimizer

PARTITIONS = 4
Windows = list[npt.NDArray[np.int64]]


def model_config(kv_heads: int, channels: int = 8) -> ModelConfig:
    return ModelConfig(vocab_size=300, d_model=40, d_ff=64, n_layers=3, n_heads=6, head_dim=8, n_kv_heads=kv_heads,
                       n_experts=PARTITIONS, max_seq_len=32, context_channels=channels)  # fmt: skip


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


def counts(partitions: int = PARTITIONS) -> Array:
    return np.stack([count_tokens(text(partition, 0), 300) for partition in range(partitions)])


def everything() -> Windows:
    return [window for partition in range(PARTITIONS) for window in text(partition, 0, 4)]


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
    add_context(model, counts(), everything())
    after = model(tokens) @ model.head_weight.T
    assert model.model.embed_tokens.weight[:, -model.config.context_channels :].any()
    torch.testing.assert_close(after, before, rtol=0, atol=2e-6)


def test_every_gate_reads_the_mean_evidence_of_the_text_so_far(model: DenseLM) -> None:
    add_context(model, counts(), everything())
    evidence_VR, basis_KR = evidence(counts(), PARTITIONS - 1)
    rows_KD = bayes_rows(model.config, counts())
    (window,) = text(1, 1, count=1)
    expected_TK = running_mean(evidence_VR[window[:-1]]) @ basis_KR.T
    for _, layers in gate_inputs(model, [window]):
        for x_TD in layers:
            logits_TK = x_TD @ rows_KD.T
            # The norm divides by the length of each token's stream, which moves no token's order of the partitions, and the
            # token's own evidence is written too, quietly.
            cosine_T = (logits_TK * expected_TK).sum(1) / np.linalg.norm(logits_TK, axis=1) / np.linalg.norm(expected_TK, axis=1)
            assert cosine_T[4:].min() > 0.97


def test_the_evidence_is_what_scikit_learn_finds() -> None:
    """At the end of a document, with raw counts and the same smoothing, ours is naive Bayes's posterior of its tokens."""
    windows = [window for k in range(PARTITIONS) for window in text(k, 0)]
    documents_NV = np.stack([np.bincount(window, minlength=300) for window in windows])
    labels_N = np.repeat(np.arange(PARTITIONS), 30)
    counts_KV = np.stack([documents_NV[labels_N == k].sum(axis=0) for k in range(PARTITIONS)]).astype(float)
    theirs = MultinomialNB(alpha=1e-9, fit_prior=False).fit(counts_KV + 500 * _share(counts_KV), np.arange(PARTITIONS))
    odds_KV = theirs.feature_log_prob_ - theirs.feature_log_prob_.mean(axis=0)
    evidence_VR, basis_KR = evidence(counts_KV, PARTITIONS - 1)
    seen_V = counts_KV.sum(axis=0) > 0
    np.testing.assert_allclose((evidence_VR @ basis_KR.T)[seen_V], odds_KV.T[seen_V], atol=1e-9)
    assert not evidence_VR[~seen_V].any()


def _share(counts_KV: Array) -> Array:
    share_V: Array = (counts_KV.sum(axis=0) + 1) / (counts_KV.sum() + counts_KV.shape[1])
    return share_V


def test_a_word_that_fills_one_document_counts_less_than_one_that_is_in_many() -> None:
    (often,) = [count_tokens([np.array([7] * 20)], 10)]
    spread = count_tokens([np.array([7])] * 20, 10)
    assert often[7] == pytest.approx(np.log(21)) and spread[7] == pytest.approx(20 * np.log(2))
    assert often.sum() == often[7]


def test_counts_add_up_so_that_a_partition_can_join() -> None:
    more = text(2, 7)
    together = count_tokens([*text(2, 0), *more], 300)
    np.testing.assert_allclose(together, count_tokens(text(2, 0), 300) + count_tokens(more, 300))


def test_the_router_names_the_partition_of_a_text(model: DenseLM) -> None:
    add_context(model, counts(), everything())
    rows_KD = bayes_rows(model.config, counts())
    right = total = 0
    for partition in range(PARTITIONS):
        for _, layers in gate_inputs(model, text(partition, 1)):
            # From the eighth token of each window on.
            chosen = (list(layers)[-1] @ rows_KD.T).argmax(axis=1).reshape(-1, 32)[:, 8:]
            right, total = right + int((chosen == partition).sum()), total + chosen.size
    assert right / total > 0.85


def test_fewer_channels_than_partitions_keep_the_directions_that_tell_most() -> None:
    evidence_VR, basis_KR = evidence(counts(), 2)
    whole_VR, whole_KR = evidence(counts(), PARTITIONS - 1)
    assert evidence_VR.shape == (300, 2)
    np.testing.assert_allclose(evidence_VR, whole_VR[:, :2])
    np.testing.assert_allclose(basis_KR, whole_KR[:, :2])


def test_the_same_text_gives_the_same_head() -> None:
    first, second = trained(model_config(6)), trained(model_config(6))
    add_context(first, counts(), everything())
    add_context(second, counts(), everything())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(("channels", "partitions"), [(0, PARTITIONS), (8, 1)])
def test_without_channels_or_with_one_partition_nothing_changes(channels: int, partitions: int) -> None:
    model = trained(model_config(6, channels), steps=2)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    add_context(model, counts(partitions), everything())
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert not bayes_rows(model.config, counts(partitions)).any()


def test_a_share_of_the_held_out_tokens_gives_nearly_the_same_temperatures(model: DenseLM) -> None:
    counts_KV = counts()
    add_context(model, counts_KV, everything())
    rows = [bayes_rows(model.config, counts_KV)] * model.config.n_layers
    held_out = [text(partition, 3, 100) for partition in range(PARTITIONS)]
    factors, accuracies = temperatures(model, rows, held_out)
    some_factors, some_accuracies = temperatures(model, rows, held_out, 0.25)
    assert some_factors != factors
    assert some_factors == pytest.approx(factors, rel=0.1)
    assert some_accuracies == pytest.approx(accuracies, abs=0.03)
