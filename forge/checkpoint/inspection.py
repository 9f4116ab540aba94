"""What can be said against a shard without running it. Cheap: one pass over its bytes for each question, no torch."""

from __future__ import annotations

from pathlib import Path

from forge.checkpoint.assembly import placed
from forge.checkpoint.provenance import kept
from forge.checkpoint.safetensors_header import tensors_sha256
from forge.checkpoint.shard import verify_shard
from forge.errors import ShardError, StorageError
from forge.files import RunDirectory
from forge.model import names


def inspect_shard(run: RunDirectory, partition: int, shard: Path) -> None:
    """Check that a shard belongs to this run and partition, is whole and finite, and is nobody's shard again.

    Raises:
        ShardError: it is not; the sentence says what is wrong.
        StorageError: a file cannot be read.
    """
    published = run.marker("publish")
    if published is None:
        raise StorageError(f"{run.root} has not published its shared components: finish the publish stage first.")
    config = run.config
    verify_shard(shard, config, partition=partition, run_id=run.run_id, shared_sha256=published["shared"]["sha256"])
    content = tensors_sha256(shard, names.expert_tensors(config.model, partition))
    shared_ffn = run.blobs.path(published["shared_ffn"]["sha256"])
    if content == tensors_sha256(shared_ffn, names.ffn_tensors(config.model)):
        raise ShardError(f"The shard {shard.name} is the shared FFN again, untrained.")
    for other, sha256 in placed(run.model).items():
        if other != partition and kept(run, other, sha256).tensors_sha256 == content:
            raise ShardError(f"The shard {shard.name} holds the very tensors of the accepted expert {other}: the expert of "
                             f"partition {partition} has to be trained on that partition.")  # fmt: skip
