"""The checkpoint of an unfinished expert, as one node leaves it and another goes on from it. No torch, and nothing is unpickled.

It is what `forge/train/resume.py` writes: weights and the optimiser's state in float32, and the next step in the metadata. Who
made it is not known to be honest. So it is bounded, its tensors are exactly the ones that training saves, and all are finite;
what it holds beyond that is judged as the shard is that comes of it: a bad one wastes the time of who went on from it.
"""

from __future__ import annotations

import json
from pathlib import Path

from forge.checkpoint.safetensors_header import MAX_HEADER_BYTES, read_header, tensors_finite
from forge.config import RunConfig
from forge.errors import ShardError
from forge.model import names

#: What the optimisers keep for a matrix (`forge/train/muon.py`, `forge/train/adamw.py`); True where it is a scalar.
_SLOTS = {"muon": {"momentum_buffer": False}, "adamw": {"exp_avg": False, "exp_avg_sq": False, "step": True}}


def largest_checkpoint(config: RunConfig) -> int:
    """Bytes that a checkpoint of an expert may have."""
    slots = len(_SLOTS[config.train.expert.optimizer])
    return config.model.expert_parameters * 4 * (1 + slots) + MAX_HEADER_BYTES


def check_checkpoint(path: Path, config: RunConfig) -> int:
    """The next step of a checkpoint that training can go on from.

    Raises:
        ShardError: it is no checkpoint of an unfinished expert of this config.
        StorageError: it cannot be read.
    """
    try:
        header = read_header(path)
    except ShardError as error:  # Its sentence names a path of this machine, and this one travels.
        raise ShardError("The checkpoint is not a sound safetensors file.", detail=str(error)) from error
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in names.ffn_tensors(config.model).items():
        expected[f"model.{name}"] = tuple(shape)
        for slot, scalar in _SLOTS[config.train.expert.optimizer].items():
            expected[f"optimizer.{name}.{slot}"] = () if scalar else tuple(shape)
    if {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()} != {
            name: ("F32", shape) for name, shape in expected.items()}:  # fmt: skip
        raise ShardError("The checkpoint does not hold the tensors of an expert of this run in training.")
    if (offender := tensors_finite(path)) is not None:
        raise ShardError(f"The checkpoint holds a value that is not finite in the tensor {offender}.")
    try:
        step = json.loads(header.metadata["facts"])["step"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ShardError("The checkpoint does not say its step.", detail=str(error)) from error
    if type(step) is not int or not 0 < step < config.steps("expert"):
        raise ShardError(f"The checkpoint is of no step between the first and the last of {config.steps('expert'):,}.")
    return step
