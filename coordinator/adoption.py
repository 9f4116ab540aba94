"""Experts that this machine trained itself: `serve` on a run directory that `forge run` filled goes on with what is there.

They passed the same validation as every shard (`forge.pipeline.train_and_accept`), nobody signed them, and what `forge run` keeps
of where they come from says so. An expert in the model that a node signed, and that is not accepted, is one that was dropped.
"""

from __future__ import annotations

from typing import Any

from coordinator.records import LocalExpert
from coordinator.state import State
from forge.checkpoint import assembly, provenance
from forge.files import RunDirectory, read_json
from forge.vocabulary import MANIFEST_FILE


def adopt(run: RunDirectory, state: State) -> list[int]:
    """Accept the experts that `forge run` put into the model, with the evaluations of it; their partitions.

    Args:
        run: the run, whose assembly was started.
        state: gets them; its partitions are open.

    Raises:
        StorageError: the run directory cannot be read, or the database not be written.
    """
    known = {shard.partition: shard.sha256 for shard in state.accepted_shards()}
    found = [expert for partition, sha256 in assembly.placed(run.model).items()
             if known.get(partition) != sha256 and (expert := _local(run, partition, sha256)) is not None]  # fmt: skip
    adopted = [expert.partition for expert in sorted(found, key=lambda expert: (expert.made_at, expert.partition))
               if state.adopt(expert)]  # fmt: skip
    if adopted:
        _adopt_evaluations(run, state)
    return adopted


def _local(run: RunDirectory, partition: int, sha256: str) -> LocalExpert | None:
    if not run.blobs.has(sha256):
        return None
    origin = provenance.kept(run, partition, sha256)
    if origin.public_key is not None or origin.manifest is None:
        return None
    rows: list[dict[str, Any]] = read_json(run.model / MANIFEST_FILE)["experts"]
    credit = next(row["credit"] for row in rows if row["partition"] == partition)
    held = run.blobs.path(sha256).stat()
    return LocalExpert(partition=partition, sha256=sha256, size=held.st_size, manifest=origin.manifest.encode(),
                       loss=credit.get("loss"), shared_loss=credit.get("shared_loss"), made_at=held.st_mtime)  # fmt: skip


def _adopt_evaluations(run: RunDirectory, state: State) -> None:
    """Take the rows over whose experts are the first accepted ones: they need not be measured again."""
    path = run.reports / "evaluation.json"
    order = [shard.partition for shard in state.accepted_shards()]
    for row in read_json(path)["rows"] if path.is_file() else ():
        experts = len(row["arrived"])
        if sorted(row["arrived"]) == sorted(order[:experts]):
            for final in {False, bool(row["final"])}:
                if not state.evaluated(experts, final=final):
                    state.record_evaluation(experts, row, final=final)
