"""What a node's data directory may hold: refused before a download, not found out in the middle of the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import os
from pathlib import Path

from forge.config import RunConfig
from forge.errors import StorageError
from forge.train.memory import MB, format_size
from node.messages import Blob

#: Bytes of a line of metrics.jsonl, one a step, and of everything else that is small.
_LINE_BYTES, _SMALL_BYTES = 192, 1 << 20


def training_bytes(config: RunConfig) -> int:
    """The most that training one expert writes into its work directory.

    A checkpoint holds weights and the optimiser's state in float32, and is written beside the one that it replaces; the
    shard is written beside the last one. A run that audits has one kept at the end of every part.
    """
    weights, phase = config.model.expert_parameters, config.train.expert
    checkpoint = weights * 4 * (2 if phase.optimizer == "muon" else 3)
    shard = weights * (2 if config.model.dtype == "bfloat16" else 4)
    kept = len(config.audit_steps()) * checkpoint
    return kept + checkpoint + max(checkpoint, shard) + config.steps("expert") * _LINE_BYTES + _SMALL_BYTES


def check_disk(limit: int, data_dir: Path, blobs: Iterable[Blob], work_dir: Path, config: RunConfig,
               discard: Callable[[], bool] = lambda: False) -> None:  # fmt: skip
    """Refuse an assignment that would take the data directory above the owner's limit.

    Args:
        limit: bytes that `data_dir` may hold.
        data_dir: the node's data directory.
        blobs: what the assignment is trained from, whether it is here or not.
        work_dir: where it is trained; what lies there already is part of what training writes.
        config: of the run.
        discard: deletes something that can be spared; False when there is nothing. Called while that may help.

    Raises:
        StorageError: it would nevertheless; the sentence names a limit that is enough.
    """
    needed = sum(blob.size for blob in blobs) + training_bytes(config)
    while (others := _beside(data_dir, blobs, work_dir)) + needed > limit:
        if needed <= limit and discard():
            continue
        enough = -(-(others + needed) // MB)
        kept = f" beside the {format_size(others)} that are there" if others >= MB else ""
        raise StorageError(f"--disk allows {data_dir} to hold {format_size(limit)}, and an expert of the run {config.name!r} "
                           f"needs {format_size(needed)}{kept}: use --disk {enough}M or more.")  # fmt: skip


def _beside(data_dir: Path, blobs: Iterable[Blob], work_dir: Path) -> int:
    """Bytes that the data directory holds of anything but an assignment."""
    own = [work_dir, *(path for blob in blobs for path in (data_dir / "blobs").glob(f"{blob.sha256}*"))]
    return held_bytes(data_dir) - sum(map(held_bytes, own))


def held_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a directory; 0 when it is not there."""
    if path.is_file():
        return path.stat().st_size
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(directory, name)).st_size
            except OSError:
                pass  # It went while we looked.
    return total
