"""Is a shard worth having? Its structure, then its loss on documents that no node has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forge.checkpoint.shard import verify_shard
from forge.data.packing import evaluation_windows
from forge.data.tokens import TokenFile
from forge.errors import ShardError
from forge.evaluate.perplexity import document_losses
from forge.files import RunDirectory
from forge.model.lm import DenseLM, load_dense
from forge.vocabulary import END_OF_TEXT_ID


def load_shared(run: RunDirectory, shard: Path | None = None, partition: int | None = None) -> DenseLM:
    """The run's shared components as a dense model, with the shared FFN or with the shard of `partition` in its place."""
    shared = run.marker("shared")
    assert shared is not None, "the shared stage comes before"
    blobs = run.blobs
    return load_dense(run.config.model, blobs.path(shared["shared"]["sha256"]),
                      shard or blobs.path(shared["shared_ffn"]["sha256"]), expert=partition)  # fmt: skip


def partition_loss(run: RunDirectory, model: DenseLM, token_blob: str) -> float | None:
    """Loss, in nats a token, on a token blob of the run; None when it holds no token."""
    config = run.config
    windows = evaluation_windows(TokenFile(run.blobs.path(token_blob)), config.model.max_seq_len, END_OF_TEXT_ID,
                                 config.evaluation.tokens)  # fmt: skip
    nats, tokens = document_losses(model, windows)
    return nats / tokens if tokens else None


def validate_shard(run: RunDirectory, partition: int, shard: Path) -> dict[str, Any]:
    """Judge a shard.

    It is accepted when its structure, values and origin are right (`verify_shard`) and its loss on the partition's
    validation documents is below that of the shared components by more than `assembly.margin` nats.

    Returns:
        accepted, reasons (sentences), loss and shared_loss in nats a token.
    """
    published = run.marker("publish")
    assert published is not None, "the publish stage comes before"
    target = published["partitions"][partition]
    shared_loss = target["shared_loss"]
    verdict: dict[str, Any] = {"accepted": False, "reasons": [], "loss": None, "shared_loss": shared_loss}
    try:
        verify_shard(shard, run.config, partition=partition, run_id=run.run_id,
                     shared_sha256=published["shared"]["sha256"])  # fmt: skip
    except ShardError as error:
        return verdict | {"reasons": [str(error)]}
    loss = partition_loss(run, load_shared(run, shard, partition), target["validation"]["sha256"])
    verdict["loss"] = loss
    margin = run.config.assembly.margin
    # A comparison with NaN is false, so a shard whose loss is not a number is not accepted either.
    if loss is not None and not loss < shared_loss - margin:
        reason = (f"its loss on the validation documents of partition {partition} is {loss:.4f} nats a token and must be "
                  f"below {shared_loss - margin:.4f}, which the shared components reach alone")  # fmt: skip
        return verdict | {"reasons": [reason]}
    return verdict | {"accepted": True}
