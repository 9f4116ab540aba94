from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from forge.config import ModelConfig, PhaseConfig
from forge.errors import StorageError, TrainingError
from forge.model.lm import DenseLM
from forge.train.loop import LoopSettings, train

MODEL = ModelConfig(vocab_size=300, d_model=32, d_ff=64, n_layers=2, n_heads=2, n_experts=2, max_seq_len=16)


class CountingSampler:
    """Sequences that a small model learns at once; a pure function of the step, as the real one is."""

    def batch(self, step: int, batch_size: int) -> np.ndarray:
        starts = np.random.default_rng(step).integers(0, 20, size=(batch_size, 1))
        return (starts + np.arange(17)) % 20


def _model() -> DenseLM:
    model = DenseLM(MODEL)
    model.initialise(torch.Generator().manual_seed(0))
    return model


def _settings(directory: Path, *, micro_batch: int = 4, steps: int = 24, rate: float = 0.01,
              optimizer: str = "muon", checkpoint_seconds: float = 0.0) -> LoopSettings:  # fmt: skip
    phase = PhaseConfig(tokens=steps * 4 * 16, learning_rate=rate, optimizer=optimizer)
    return LoopSettings(phase=phase, batch_size=4, sequence_length=16, micro_batch=micro_batch, directory=directory,
                        checkpoint_seconds=checkpoint_seconds, stage="test")  # fmt: skip


def _silent(**fields: object) -> None:
    """Progress that nobody reads."""


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_loss_falls(tmp_path: Path, optimizer: str) -> None:
    train(_model(), CountingSampler(), _settings(tmp_path, optimizer=optimizer), _silent, lambda: False)  # type: ignore[arg-type]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 24
    assert losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    whole, parts = _model(), _model()
    train(whole, CountingSampler(), _settings(tmp_path / "a", optimizer=optimizer), _silent, lambda: False)  # type: ignore[arg-type]
    for limit in (5, 1, 9, 99):
        parts = _model()  # What a new process starts from: the checkpoint must bring back everything.
        stop = iter([False] * limit + [True]).__next__
        result = train(parts, CountingSampler(), _settings(tmp_path / "b", optimizer=optimizer), _silent,  # type: ignore[arg-type]
                       stop)  # fmt: skip
    assert result.finished
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    first, second = ((tmp_path / d / "metrics.jsonl").read_text().splitlines() for d in "ab")
    assert [json.loads(line)["loss"] for line in first] == [json.loads(line)["loss"] for line in second]


def test_steps_after_the_last_checkpoint_are_taken_again_and_counted_once(tmp_path: Path) -> None:
    settings = _settings(tmp_path, checkpoint_seconds=1e9)
    train(_model(), CountingSampler(), settings, _silent, iter([False] * 6 + [True]).__next__)  # type: ignore[arg-type]
    with open(settings.metrics, "a") as file:
        file.write('{"step": 7, "loss": 9.9}\n{"step": 8, "lo')  # What a kill leaves.
    train(_model(), CountingSampler(), settings, _silent, lambda: False)  # type: ignore[arg-type]
    steps = [json.loads(line)["step"] for line in settings.metrics.read_text().splitlines()]
    assert steps == list(range(1, 25))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_micro_batch_does_not_change_the_result(tmp_path: Path, optimizer: str) -> None:
    losses = []
    for micro_batch in (1, 4):
        directory = tmp_path / str(micro_batch)
        train(_model(), CountingSampler(), _settings(directory, micro_batch=micro_batch, optimizer=optimizer), _silent,  # type: ignore[arg-type]
              lambda: False)  # fmt: skip
        losses.append([json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()])
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1e-4)


def test_frozen_parameters_stay_and_cost_no_state(tmp_path: Path) -> None:
    model = _model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    train(model, CountingSampler(), _settings(tmp_path), _silent, lambda: False)  # type: ignore[arg-type]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".mlp." in name}
    assert all(p.grad is None for name, p in model.named_parameters() if ".mlp." not in name)


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    model = _model()
    with torch.no_grad():
        model.head_weight[3, 3] = float("nan")
    before = model.state_dict()["model.norm.weight"].clone()
    with pytest.raises(TrainingError, match="is not finite.*lower the learning rate"):
        train(model, CountingSampler(), _settings(tmp_path), _silent, lambda: False)  # type: ignore[arg-type]
    assert torch.equal(model.state_dict()["model.norm.weight"], before)


def test_a_damaged_checkpoint_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    with pytest.raises(StorageError, match="is damaged or belongs to another model"):
        train(_model(), CountingSampler(), _settings(tmp_path), _silent, lambda: False)  # type: ignore[arg-type]
