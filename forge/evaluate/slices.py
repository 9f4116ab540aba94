"""What a shard does to every partition: losses of the assembled model on a slice of each one's validation documents.

A batch no token of which is routed to an expert, in any layer, cannot change when that expert does. So the loss of every
batch is kept with the experts that it asked (`reports/slices.json`), and a shard costs the batches that ask its expert:
with many partitions, few of them. The file is a cache: what it lacks is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from forge.checkpoint.assembly import placed
from forge.data.packing import batches, evaluation_windows
from forge.data.tokens import IntArray, TokenFile
from forge.errors import StorageError
from forge.evaluate.perplexity import BATCH_TOKENS, Loss, measure
from forge.files import RunDirectory, hash_file, read_json, write_json
from forge.model import names
from forge.model.lm import read_tensors
from forge.model.moe import MixtureLM, Routing
from forge.vocabulary import END_OF_TEXT_ID, SHARED_FILE


@dataclass(frozen=True)
class Measured:
    """A batch of a slice under some state of the assembled model."""

    partition: int
    nats: float
    tokens: int
    experts: list[int]
    """Those that a token of the batch was sent to, in any layer."""


def mixture_losses(run: RunDirectory, partition: int, shard: Path) -> tuple[list[Loss], list[Loss]]:
    """Losses of the assembled model on a slice of every partition's validation documents, as it is and with a shard in place.

    Every token takes the way that the router gives it: this is what the model's users would get.

    Args:
        run: the run, whose assembly was started.
        partition: whose expert the shard is.
        shard: the shard; it was inspected.
    """
    # A calibration changes the shared components too.
    files = {"shared": hash_file(run.model / SHARED_FILE)} | {str(k): sha256 for k, sha256 in placed(run.model).items()}
    model = MixtureLM.load(run.model)
    before = _kept(run, files)
    if before is None:
        before = [_measure(model, number, batch) for number, batch in _batches(run)]
    model.load_state_dict(read_tensors(shard, names.expert_tensors(run.config.model, partition)), strict=False, assign=True)
    after = [_measure(model, number, batch) if partition in old.experts else old
             for old, (number, batch) in zip(before, _batches(run), strict=True)]  # fmt: skip
    states = [(files, before), (files | {str(partition): hash_file(shard)}, after)]
    write_json(_path(run), [{"files": state, "batches": [asdict(row) for row in rows]} for state, rows in states])
    return _sums(run, before), _sums(run, after)


def _batches(run: RunDirectory) -> Iterator[tuple[int, list[IntArray]]]:
    published = run.marker("publish")
    assert published is not None, "the publish stage comes before"
    for number, files in enumerate(published["partitions"]):
        tokens = TokenFile(run.blobs.path(files["validation"]["sha256"]))
        windows = evaluation_windows(tokens, run.config.model.max_seq_len, END_OF_TEXT_ID, run.config.assembly.slice_tokens)
        for batch in batches(windows, BATCH_TOKENS):
            yield number, batch


def _measure(model: MixtureLM, partition: int, batch: list[IntArray]) -> Measured:
    asked: set[int] = set()

    def watch(routing: list[Routing], kept_N: Tensor) -> None:
        asked.update(*(layer.experts_NK[kept_N].flatten().tolist() for layer in routing))

    loss = measure(model, batch, observe=watch)
    return Measured(partition, loss.nats, loss.tokens, sorted(asked))


def _kept(run: RunDirectory, files: dict[str, str]) -> list[Measured] | None:
    """What was measured with these files in place."""
    try:
        states: list[dict[str, Any]] = read_json(_path(run))
    except StorageError:
        return None
    for state in states:
        if state.get("files") == files:
            return [Measured(**row) for row in state["batches"]]
    return None


def _path(run: RunDirectory) -> Path:
    return run.reports / "slices.json"


def _sums(run: RunDirectory, rows: Sequence[Measured]) -> list[Loss]:
    losses = [Loss()] * run.config.model.n_experts
    for row in rows:
        losses[row.partition] += Loss(row.nats, row.tokens)
    return losses
