"""Repeating a part of a node's training: from the checkpoint that it kept at the beginning of the part to its end.

Training is a function of the shared components, the partition's tokens and the seed, up to rounding: threads, micro-batch and
the type of the products change the last bits, and every step carries them on. So what the node kept at the end of the part is
compared with what comes out here, in units of what the part learned. The measured distances are in docs/security.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
import math
from pathlib import Path
import shutil
from typing import Any

from safetensors import safe_open
import torch
from torch import Tensor

from forge.config import RunConfig, parse_config
from forge.errors import ShardError, storage_errors
from forge.model import names
from forge.train.expert import train_expert
from forge.train.loop import Progress
from forge.vocabulary import CHECKPOINT_FILE

#: Largest distance of an honest end of a part, over the matrices in units of what the part learned, and over the momenta in units
#: of their own length. Where it was measured (benchmarks/audit.py) bfloat16 and float32 were 0.0145 from each other, and a node
#: that left one step of nine out 0.33 from who did not.
TOLERANCE = 0.2
#: Smallest length that something is divided by.
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Part:
    """The steps of a training that are repeated, from `first` to the one before `last`."""

    first: int
    last: int
    before: Path | None
    """The node's checkpoint at `first`, structurally sound; None where nothing was trained before."""
    after: Path
    """Its checkpoint at `last`, or its shard where that is the end of the training."""


def replay(assignment: Mapping[str, Any], part: Part, work_dir: Path, ram_bytes: int, progress: Progress,
           should_stop: Callable[[], bool], device: str = "auto") -> dict[str, Any]:  # fmt: skip
    """Train a part of an expert's steps and compare with what its node says came of them.

    Args:
        assignment: as of `train_expert`.
        part: what to repeat.
        work_dir: emptied first; what is trained here lies in it.
        ram_bytes: memory that this process may use.
        progress: called with the keyword arguments of a progress event.
        should_stop: asked once a step; True stops.
        device: auto, cpu, cuda or mps.

    Returns:
        finished; and when it is, `distance` and `momentum`: the largest distance of a matrix and of its momentum from what came
        out here, as multiples of how far the part moved the matrix here, and of the momentum here (0 for a shard); `within`,
        whether that is tolerated.
    """
    with storage_errors(work_dir):
        shutil.rmtree(work_dir, ignore_errors=True)
        work_dir.mkdir(parents=True)
        if part.before is not None:
            shutil.copyfile(part.before, work_dir / CHECKPOINT_FILE)
    left = part.last - part.first

    def enough() -> bool:
        nonlocal left
        left -= 1
        return left < 0 or should_stop()

    outcome = train_expert(assignment, work_dir, ram_bytes, progress, enough, device)
    if outcome["step"] != part.last:
        return {"finished": False}
    config, partition = parse_config(assignment["config"]), int(assignment["partition"])
    weights, momenta = compare(config, partition, part, work_dir / CHECKPOINT_FILE, Path(assignment["shared_ffn"]))
    furthest, momentum = max(weights.values()), max(momenta.values(), default=0.0)
    return {"finished": True, "within": max(furthest, momentum) <= TOLERANCE, "distance": furthest,
            "momentum": momentum, "predicted_bytes": outcome["predicted_bytes"]}  # fmt: skip


def compare(config: RunConfig, partition: int, part: Part, ours: Path,
            shared_ffn: Path) -> tuple[dict[str, float], dict[str, float]]:  # fmt: skip
    """Distances of a node's matrices from ours after a part, and of their momenta, one matrix in memory at a time.

    Args:
        config: of the run.
        partition: of the expert.
        part: what was repeated.
        ours: the checkpoint that came out here.
        shared_ffn: what experts start as copies of.

    Raises:
        ShardError: what the node handed in lacks a tensor.
    """
    shard = dict(zip(names.ffn_tensors(config.model), names.expert_tensors(config.model, partition), strict=True))
    weights, momenta = {}, {}
    with ExitStack() as stack:
        mine, theirs, start = (stack.enter_context(safe_open(path, framework="pt"))
                               for path in (ours, part.after, part.before or shared_ffn))  # fmt: skip
        known = set(theirs.keys())
        for name, renamed in shard.items():
            here = mine.get_tensor(f"model.{name}")
            claimed = f"model.{name}" if f"model.{name}" in known else renamed
            if claimed not in known:
                raise ShardError(f"What the node handed in lacks the tensor {name}.")
            began = start.get_tensor(f"model.{name}" if part.before is not None else name)
            if part.before is None and config.train.expert.init == "random":
                began = torch.zeros_like(here)
            weights[name] = distance(here, theirs.get_tensor(claimed), here - began)
        for name in (name for name in mine.keys() if name.startswith("optimizer.") and name in known):  # noqa: SIM118
            if (value := mine.get_tensor(name)).ndim:
                momenta[name] = distance(value, theirs.get_tensor(name), value)
    return weights, momenta


def distance(ours: Tensor, theirs: Tensor, unit: Tensor) -> float:
    """Length of the difference of two tensors of one shape, as a multiple of the length of a third."""
    found = float((ours.double() - theirs.double()).norm()) / max(float(unit.double().norm()), _TINY)
    return found if math.isfinite(found) else math.inf
