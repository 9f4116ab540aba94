"""THE training loop: both phases run through it, and it reads top to bottom.

Shapes: B sequences of a micro-batch, T tokens, D model width, N = B*T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
import json
import math
from pathlib import Path
import time

import torch

from forge.config import PhaseConfig
from forge.data.packing import SequenceSampler
from forge.errors import TrainingError, storage_errors
from forge.files import write_bytes
from forge.model.layers import lookups_held
from forge.model.lm import DenseLM
from forge.train.loss import chunked_cross_entropy
from forge.train.optim import Optimizer, learning_rate
from forge.train.resume import load_checkpoint, save_checkpoint
from forge.vocabulary import CHECKPOINT_FILE, kept_file

Progress = Callable[..., None]

#: The reported loss is the mean over this many last steps: one batch alone is noise.
_REPORTED_STEPS = 20


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs to know beside the model and the data."""

    phase: PhaseConfig
    """Rates, clipping and the optimiser."""
    batch_size: int
    """Sequences of an optimiser step."""
    sequence_length: int
    """Tokens of a sequence."""
    micro_batch: int
    """Sequences of one forward and backward pass; decides memory, not the result."""
    directory: Path
    """Where checkpoint.safetensors and metrics.jsonl lie."""
    checkpoint_seconds: float
    """Seconds between checkpoints."""
    stage: str
    """Name for progress reports."""
    device: str = "cpu"
    """Torch device."""
    dtype: torch.dtype = torch.float32
    """Type of the matrix products."""
    keep: frozenset[int] = frozenset()
    """Steps after which a checkpoint is kept beside the one that training goes on from."""

    @property
    def steps(self) -> int:
        """Optimiser steps of the phase."""
        return math.ceil(self.phase.tokens / (self.batch_size * self.sequence_length))

    @property
    def checkpoint(self) -> Path:
        """The checkpoint file."""
        return self.directory / CHECKPOINT_FILE

    @property
    def metrics(self) -> Path:
        """One JSON line a step."""
        return self.directory / "metrics.jsonl"


@dataclass(frozen=True)
class LoopResult:
    """How far a phase got."""

    step: int
    steps: int
    loss: float
    tokens: int

    @property
    def finished(self) -> bool:
        """Whether every step was done; False after a request to stop."""
        return self.step == self.steps


def train(model: DenseLM, sampler: SequenceSampler, settings: LoopSettings, progress: Progress,
          should_stop: Callable[[], bool]) -> LoopResult:  # fmt: skip
    """Train the parameters of `model` that require gradients, from the last checkpoint to the last step.

    Killed at any instant and called again, it takes the same steps with the same numbers as if it never stopped (same
    machine, threads and micro-batch).

    Raises:
        TrainingError: a loss or gradient is not finite; the last checkpoint stays.
        StorageError: a checkpoint cannot be written.
    """
    with storage_errors(settings.directory):
        settings.directory.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())
    optimizer = Optimizer(parameters, settings.phase, settings.dtype)
    facts = load_checkpoint(settings.checkpoint, parameters, optimizer)
    step = 0 if facts is None else int(facts["step"])
    losses = _keep_metrics(settings.metrics, step)
    tokens_per_step = settings.batch_size * settings.sequence_length
    saved_at, started, first = time.monotonic(), time.monotonic(), step
    model.train()
    with storage_errors(settings.metrics), open(settings.metrics, "a", encoding="utf-8") as metrics:
        while step < settings.steps and not should_stop():
            loss, norm = _accumulate(model, sampler, settings, step, optimizer)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingError(f"The loss of step {step} of the {settings.stage} phase is not finite (loss {loss}, "
                                    f"gradient norm {norm}): lower the learning rate (now {settings.phase.learning_rate}), "
                                    "in a run of another `name=`: this one keeps its config.")  # fmt: skip
            rate = learning_rate(settings.phase, step, settings.steps)
            optimizer.step(rate)
            step += 1
            losses.append(loss)
            speed = (step - first) * tokens_per_step / (time.monotonic() - started)
            line = {"step": step, "loss": loss, "gradient_norm": norm, "learning_rate": rate,
                    "tokens": step * tokens_per_step, "tokens_per_second": round(speed, 1)}  # fmt: skip
            metrics.write(json.dumps(line) + "\n")
            progress(stage=settings.stage, step=step, steps=settings.steps, loss=_recent(losses), tokens_per_second=speed)
            if step in settings.keep:
                save_checkpoint(settings.directory / kept_file(step), optimizer, {"step": step})
            if time.monotonic() - saved_at > settings.checkpoint_seconds:
                metrics.flush()
                save_checkpoint(settings.checkpoint, optimizer, {"step": step})
                saved_at = time.monotonic()
        if step > first:
            metrics.flush()
            save_checkpoint(settings.checkpoint, optimizer, {"step": step})
    return LoopResult(step, settings.steps, _recent(losses), step * tokens_per_step)


def _accumulate(model: DenseLM, sampler: SequenceSampler, settings: LoopSettings, step: int,
                optimizer: Optimizer) -> tuple[float, float]:  # fmt: skip
    """Gradients of one whole batch, in micro-batches; returns the loss in nats and the gradient norm before clipping."""
    batch = torch.from_numpy(sampler.batch(step, settings.batch_size))  # (batch_size, T + 1)
    total = torch.zeros((), device=settings.device)
    with lookups_held(model):
        for start in range(0, settings.batch_size, settings.micro_batch):
            tokens = batch[start : start + settings.micro_batch].to(settings.device)
            inputs_BT, targets_BT = tokens[:, :-1], tokens[:, 1:]
            hidden_BTD = model(inputs_BT)
            loss = chunked_cross_entropy(hidden_BTD, model.head_weight, targets_BT, weight=len(tokens) / settings.batch_size)
            torch.autograd.backward(loss)
            total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(optimizer.parameters.values(), settings.phase.gradient_clip, foreach=False)
    return float(total), float(norm)


def _keep_metrics(path: Path, step: int) -> list[float]:
    """Drop the lines of steps that a killed process took after its last checkpoint; returns the losses of the rest."""
    if not path.is_file():
        return []
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            break  # A line that a kill cut off; nothing valid follows it.
    write_bytes(path, "".join(line + "\n" for line in kept).encode())
    return [json.loads(line)["loss"] for line in kept]


def _recent(losses: list[float]) -> float:
    recent = losses[-_REPORTED_STEPS:]
    return sum(recent) / len(recent) if recent else math.nan
