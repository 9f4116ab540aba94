"""Is a shard sound, and does it help? The cheap structural check first, then the losses in a child process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coordinator.jobs import RunJob
from coordinator.records import ShardRecord
from forge.checkpoint.inspection import inspect_shard
from forge.errors import ShardError
from forge.files import RunDirectory


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The verdict on a shard; losses are nats a token on the partition's validation documents."""

    accepted: bool
    reasons: tuple[str, ...] = ()
    loss: float | None = None
    shared_loss: float | None = None
    condemned: bool = True
    """Of a rejected one: whether the bytes are bad whoever hands them in, or only this node's word on them."""


def judge(shard: ShardRecord, run: RunDirectory, run_job: RunJob,
          on_progress: Callable[[dict[str, Any]], None]) -> Judgement:  # fmt: skip
    """Judge a shard whose bytes are in `run.blobs`.

    Raises:
        ForgeError: anything but a `ShardError`: it could not be judged, which says nothing about the shard.
        Stopped: the coordinator is being stopped.
    """
    path = run.blobs.path(shard.sha256)
    try:
        inspect_shard(run, shard.partition, path)
        arguments = {"run_dir": str(run.root), "partition": shard.partition, "shard": str(path)}
        result = run_job("validate", arguments, on_progress)
    except ShardError as error:
        return Judgement(accepted=False, reasons=(str(error),))
    return Judgement(accepted=bool(result["accepted"]), reasons=tuple(result["reasons"]), loss=result.get("loss"),
                     shared_loss=result.get("shared_loss"))  # fmt: skip
