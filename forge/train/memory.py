"""The memory plan: predict the peak of a stage from the config alone, and choose what makes it fit `--ram`.

The choice is the micro-batch: gradients are accumulated over micro-batches, so the batch that an optimiser step sees, and
with it the result, stays what the config says. Nothing here imports torch: a node refuses before it downloads.
"""

from __future__ import annotations

from dataclasses import dataclass
import math
import re
from typing import Literal

from forge.config import ModelConfig, RunConfig
from forge.errors import ConfigError, MemoryBudgetError

Stage = Literal["shared", "expert", "evaluate"]

MB = 1 << 20
_FLOAT = 4
#: Interpreter, torch and what torch's optimisers import on first use: measured resident, CPU build of torch 2.13.
RUNTIME_BYTES = 345 * MB
#: Scientific libraries of the evaluation (matplotlib, tokenizers): measured resident on top of the runtime.
EVALUATION_LIBRARIES = 110 * MB
#: Rows of logits that exist at a time, three float32 copies each (logits, gradient, cast); see forge/train/loss.py.
LOSS_ROWS = 256
#: A micro-batch above this gains no speed on a CPU (measured at the default size) and only costs memory.
LARGEST_MICRO_BATCH = 4


@dataclass(frozen=True)
class Plan:
    """How a stage will run and what it will hold.

    All sizes in bytes; `parts` adds up to `peak_bytes`.
    """

    stage: str
    micro_batch: int
    parts: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """Predicted peak resident memory of the process that runs the stage."""
        return sum(self.parts.values())


def predict(config: RunConfig, stage: Stage, micro_batch: int) -> Plan:
    """Predict the peak of `stage` with sequences of `max_seq_len` tokens in micro-batches of `micro_batch`."""
    model = config.model
    parts = {"runtime": RUNTIME_BYTES}
    if stage == "evaluate":
        return Plan(stage, micro_batch, parts | {
            "libraries": EVALUATION_LIBRARIES,
            "weights": model.total_parameters * _FLOAT,
            "activations": _forward_bytes(model, micro_batch * model.max_seq_len),
            "loss": LOSS_ROWS * model.vocab_size * _FLOAT * 3,
        })  # fmt: skip
    phase = config.train.shared if stage == "shared" else config.train.expert
    hidden = model.expert_parameters + (model.attention_parameters if stage == "shared" else 0)
    rest = model.embedding_parameters + model.norm_parameters if stage == "shared" else 0
    slots = hidden * (1 if phase.optimizer == "muon" else 2) + rest * 2
    return Plan(stage, micro_batch, parts | {
        "weights": model.dense_parameters * _FLOAT,
        "gradients": (hidden + rest) * _FLOAT,
        "optimizer": slots * _FLOAT + _largest_matrix(model) * _FLOAT * 4,
        "activations": _saved_bytes(model, micro_batch * model.max_seq_len),
        "loss": LOSS_ROWS * model.vocab_size * _FLOAT * 3 + (model.embedding_parameters * _FLOAT if rest else 0),
    })  # fmt: skip


def plan(config: RunConfig, stage: Stage, ram_bytes: int) -> Plan:
    """The fastest plan of `stage` that fits `ram_bytes`.

    Raises:
        MemoryBudgetError: not even one sequence at a time fits; the sentence names the `--ram` that would do.
    """
    largest = min(LARGEST_MICRO_BATCH, config.train.batch_size)
    for micro_batch in range(largest, 0, -1):
        candidate = predict(config, stage, micro_batch)
        if candidate.peak_bytes <= ram_bytes and (micro_batch == 1 or config.train.batch_size % micro_batch == 0):
            return candidate
    needed = predict(config, stage, 1).peak_bytes
    raise MemoryBudgetError(
        f"{_STAGE_NAMES[stage]} of the run {config.name!r} needs {format_size(needed)} and --ram allows "
        f"{format_size(ram_bytes)}: use --ram {math.ceil(needed / (64 * MB)) * 64}M or more.")  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes from `8G`, `512M`, `1.5GiB` or a plain number; units are powers of 1024.

    Raises:
        ConfigError: the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"{text!r} is not a size: write for example 8G or 512M.")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def format_size(size: float) -> str:
    """A size for people: `380M`, `7.5G`."""
    return f"{size / MB:.0f}M" if size < 1024 * MB else f"{size / 1024 / MB:.1f}G"


_STAGE_NAMES = {"shared": "Training the shared components", "expert": "Training an expert", "evaluate": "Evaluation"}


def _saved_bytes(model: ModelConfig, tokens: int) -> int:
    """What autograd keeps for the backward pass of `tokens` tokens, and the largest temporary of it."""
    kv = model.kv_heads * model.head_dim
    layer = 7 * model.d_model + 4 * kv + 4 * model.ffn_width
    transient = 3 * model.ffn_width + 3 * model.d_model
    return tokens * _FLOAT * (model.n_layers * layer + transient + 3 * model.d_model)


def _forward_bytes(model: ModelConfig, tokens: int) -> int:
    return tokens * _FLOAT * (6 * model.d_model + 3 * model.ffn_width)


def _largest_matrix(model: ModelConfig) -> int:
    return model.d_model * max(model.ffn_width, model.d_model)
