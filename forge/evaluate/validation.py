"""Is a shard worth having? What it is, then its loss on documents that no node has seen, then what it does to the others."""

from __future__ import annotations

from collections.abc import Sequence
import math
from pathlib import Path
from typing import Any

from forge.checkpoint.assembly import placed
from forge.checkpoint.inspection import inspect_shard
from forge.data.packing import evaluation_windows
from forge.data.tokens import TokenFile
from forge.errors import ShardError
from forge.evaluate.likeness import Weights, suspicions
from forge.evaluate.perplexity import Loss, document_losses, finite
from forge.evaluate.slices import mixture_losses
from forge.files import RunDirectory
from forge.model import names
from forge.model.lm import DenseLM, load_dense, read_tensors
from forge.vocabulary import END_OF_TEXT_ID, expert_file


def load_shared(run: RunDirectory, shard: Path | None = None, partition: int | None = None) -> DenseLM:
    """The run's shared components as a dense model, with the shared FFN or with the shard of `partition` in its place."""
    shared = run.marker("shared")
    assert shared is not None, "the shared stage comes before"
    blobs = run.blobs
    return load_dense(run.config.model, blobs.path(shared["shared"]["sha256"]),
                      shard or blobs.path(shared["shared_ffn"]["sha256"]), expert=partition)  # fmt: skip


def partition_loss(run: RunDirectory, model: DenseLM, token_blob: str, at_most: int) -> float | None:
    """Loss, in nats a token, on at most so many tokens of a token blob of the run; None when it holds no token."""
    windows = evaluation_windows(TokenFile(run.blobs.path(token_blob)), run.config.model.max_seq_len, END_OF_TEXT_ID, at_most)
    nats, tokens = document_losses(model, windows)
    return nats / tokens if tokens else None


def validate_shard(run: RunDirectory, partition: int, shard: Path) -> dict[str, Any]:
    """Judge a shard.

    It is accepted when nothing can be said against it as it lies there (`inspect_shard`), when its weights are of a sane size
    and not an accepted expert's again (`suspicions`), when its loss on the partition's validation documents is below that of the
    shared components by more than `assembly.margin` nats, and when no partition's loss in the assembled model rises by more
    than `assembly.tolerance` nats with it in place.

    Returns:
        accepted, reasons (sentences), loss and shared_loss in nats a token; `effect`, by how many nats a token every
        partition's loss in the assembled model changes, as far as it was measured.
    """
    published = run.marker("publish")
    assert published is not None, "the publish stage comes before"
    target = published["partitions"][partition]
    shared_loss = target["shared_loss"]
    verdict: dict[str, Any] = {"accepted": False, "reasons": [], "loss": None, "shared_loss": shared_loss, "effect": []}
    try:
        inspect_shard(run, partition, shard)
    except ShardError as error:
        return verdict | {"reasons": [str(error)]}
    if reasons := _suspicions(run, partition, shard):
        return verdict | {"reasons": reasons}
    # On the tokens that the shared components were measured on, although `evaluation` may have changed since.
    loss = partition_loss(run, load_shared(run, shard, partition), target["validation"]["sha256"], published["evaluation_tokens"])
    verdict["loss"] = loss
    margin = run.config.assembly.margin
    # A comparison with NaN is false, so a shard whose loss is not a number is not accepted either.
    if loss is not None and not loss < shared_loss - margin:
        reason = (f"its loss on the validation documents of partition {partition} is {loss:.4f} nats a token and must be "
                  f"below {shared_loss - margin:.4f}: the shared components alone reach {shared_loss:.4f}, and an expert has "
                  f"to be better by {margin:g}")  # fmt: skip
        return verdict | {"reasons": [reason]}
    before, after = mixture_losses(run, partition, shard)
    reasons = _harm(before, after, run.config.assembly.tolerance)
    effect = [finite(new.nats_per_token - old.nats_per_token) for old, new in zip(before, after, strict=True)]
    return verdict | {"accepted": not reasons, "reasons": reasons, "effect": effect}


def _suspicions(run: RunDirectory, partition: int, shard: Path) -> list[str]:
    model, published = run.config.model, run.marker("publish")
    assert published is not None, "the publish stage comes before"

    def read(path: Path, expert: int) -> Weights:
        read = read_tensors(path, names.expert_tensors(model, expert)).values()
        return dict(zip(names.ffn_tensors(model), read, strict=True))

    shared = read_tensors(run.blobs.path(published["shared_ffn"]["sha256"]), names.ffn_tensors(model))
    accepted = {other: read(run.model / expert_file(other), other) for other in placed(run.model) if other != partition}
    return suspicions(read(shard, partition), accepted, shared, copied=run.config.train.expert.init == "copy")


def _harm(before: Sequence[Loss], after: Sequence[Loss], tolerance: float) -> list[str]:
    """A sentence on the partition that suffers most, when one does by more than is tolerated."""
    changes = {partition: new.nats_per_token - old.nats_per_token
               for partition, (old, new) in enumerate(zip(before, after, strict=True)) if old.tokens}  # fmt: skip
    suffering = {partition: change for partition, change in changes.items() if not change <= tolerance}  # NaN included
    if not suffering:
        return []
    worst = max(suffering, key=lambda partition: suffering[partition] if math.isfinite(suffering[partition]) else math.inf)
    was, becomes = before[worst].nats_per_token, after[worst].nats_per_token
    return [f"in the assembled model the loss on the validation documents of partition {worst} rises from {was:.4f} to "
            f"{becomes:.4f} nats a token with it, and at most {tolerance:g} more is tolerated"]  # fmt: skip
