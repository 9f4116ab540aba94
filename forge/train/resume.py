"""Checkpoints of a training phase: one safetensors file, replaced atomically, that brings back the exact next step.

The data order is a pure function of (seed, step) and nothing else in training is random, so the step in the metadata is
the data position and the random state. Frozen parameters are not saved: they come from their own files.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
import re
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
import torch
from torch import Tensor, nn

from forge.errors import StorageError, storage_errors
from forge.files import TEMPORARY_SUFFIX, remove_temporaries
from forge.train.optim import Optimizer


def save_checkpoint(path: Path, optimizer: Optimizer, facts: dict[str, Any]) -> None:
    """Write the trained parameters, the optimiser's state and `facts` (with the next `step`) to `path`.

    Raises:
        StorageError: the disk is full or read-only; the previous checkpoint stays.
    """
    tensors: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in optimizer.parameters.items()}
    tensors.update(optimizer.state_tensors())
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with storage_errors(path):
        try:
            save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, {"facts": json.dumps(facts)})
        except SafetensorError as error:
            # The library reports the system's errors as text, with their number.
            temporary.unlink(missing_ok=True)
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)


def load_checkpoint(path: Path, parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Any] | None:
    """Restore what `save_checkpoint` wrote and return its facts; None when there is no checkpoint.

    Raises:
        StorageError: the file is damaged or belongs to another model.
    """
    remove_temporaries(path.parent)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            facts: dict[str, Any] = json.loads(file.metadata()["facts"])
        with torch.no_grad():
            for name, parameter in parameters.items():
                if parameter.requires_grad:
                    parameter.copy_(tensors[f"model.{name}"])
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise StorageError(f"The checkpoint {path} is damaged or belongs to another model: delete it to start this phase "
                           "again.", detail=str(error)) from error  # fmt: skip
    optimizer.load_state_tensors(tensors)
    return facts

