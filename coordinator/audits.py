"""Which shards have a part of their training repeated before they are accepted, and what comes of it (`fleet.audit`).

A node signs, with its shard, the sha256 of the checkpoint at the end of every part of its training. Only then is it drawn by lot
whether a part is repeated, and which: by a secret of the coordinator and the signed bytes, so that asking again changes nothing
and nobody knows beforehand. The node hands in the checkpoints at the part's ends, a job repeats the steps between
(`forge/train/replay.py`), and a shard whose node is too far from that, or hands in nothing, is rejected like any other bad one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
import re
from typing import Any

from coordinator.auth import Credentials
from coordinator.jobs import RunJob
from coordinator.records import ShardRecord
from coordinator.state import State
from coordinator.validate import Judgement
from forge.checkpoint.handover import check_checkpoint, largest_checkpoint
from forge.checkpoint.manifest import parse_manifest
from forge.config import RunConfig
from forge.errors import ForgeError, ShardError
from forge.files import RunDirectory

#: What a node has to hand its checkpoints in: so many seconds, and those that a line of so many bytes a second needs.
PATIENCE_SECONDS, SLOWEST_LINE = 600.0, 50_000.0
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Sample:
    """The part of a training that is repeated: its first step, the step after its last, and the checkpoints there.

    `before` is None where nothing was trained before, `after` where the shard itself is the end.
    """

    first: int
    last: int
    before: str | None
    after: str | None

    @property
    def checkpoints(self) -> dict[str, int]:
        """sha256 -> step of what the node has to hand in."""
        ends = ((self.before, self.first), (self.after, self.last))
        return {sha256: step for sha256, step in ends if sha256 is not None}


class Audits:
    """Draws shards by lot and judges their training.

    Args:
        run: the run directory; checkpoints arrive among its blobs.
        config: the run's config.
        state: says what waits.
        credentials: the coordinator's secret, which draws.
        clock: seconds since the epoch.
    """

    def __init__(self, *, run: RunDirectory, config: RunConfig, state: State, credentials: Credentials,
                 clock: Callable[[], float]) -> None:  # fmt: skip
        self._run, self._config, self._state, self._credentials, self._clock = run, config, state, credentials, clock
        self._patience = PATIENCE_SECONDS + 2 * largest_checkpoint(config) / SLOWEST_LINE

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Refuse a manifest that does not commit to the checkpoints of its training, where this run audits.

        Raises:
            ShardError: it does not.
        """
        steps, said = self._config.audit_steps(), manifest.get("checkpoints")
        if not steps:
            return
        sound = isinstance(said, dict) and said.keys() == {str(step) for step in steps} and all(
            isinstance(sha256, str) and _SHA256.fullmatch(sha256) for sha256 in said.values())  # fmt: skip
        if not sound:
            raise ShardError(f"This run audits, and the manifest does not name the checkpoints of the steps "
                             f"{', '.join(map(str, steps))} of its training.")  # fmt: skip

    def sample(self, shard: ShardRecord) -> Sample | None:
        """The part of a shard's training that is repeated; None for most shards."""
        steps = self._config.audit_steps()
        if not steps:
            return None
        named = parse_manifest(shard.manifest).get("checkpoints")
        # A shard may have been committed before the run audited, or when it had other parts.
        if not isinstance(named, dict) or named.keys() != {str(step) for step in steps}:
            return None
        drawn = self._credentials.draw(shard.manifest)
        if int.from_bytes(drawn[:8], "big") >= self._config.fleet.audit * (1 << 64):
            return None
        ends = [0, *steps, self._config.steps("expert")]
        part = int.from_bytes(drawn[8:16], "big") % (len(ends) - 1)
        first, last = ends[part], ends[part + 1]
        return Sample(first, last, named.get(str(first)), named.get(str(last)))

    def checkpoints(self, shard: ShardRecord) -> list[str]:
        """sha256 of the checkpoints that the audit of a shard is made with."""
        sample = self.sample(shard)
        return [] if sample is None else list(sample.checkpoints)

    def spent(self, shard: ShardRecord) -> list[str]:
        """The same when the shard has its verdict, without those that another shard waits with."""
        own = self.checkpoints(shard)
        if not own:
            return []
        others = {sha256 for other in self._state.pending_shards() if other.id != shard.id for sha256 in self.checkpoints(other)}
        return [sha256 for sha256 in own if sha256 not in others]

    def wanted(self, lease_id: str) -> tuple[str, ...]:
        """sha256 of the checkpoints that the node of a lease still has to hand in."""
        if not self._config.fleet.audit:
            return ()
        return tuple(sha256 for shard in self._state.pending_shards(lease_id) for sha256 in self._missing(shard))

    def needs(self, sha256: str) -> bool:
        """Whether a shard that waits for its verdict is audited with this checkpoint."""
        return bool(self._config.fleet.audit) and any(
            sha256 in self.checkpoints(shard) for shard in self._state.pending_shards())  # fmt: skip

    def next_pending(self) -> ShardRecord | None:
        """The oldest shard whose verdict need not wait for its node any more."""
        if not self._config.fleet.audit:
            return self._state.next_pending()
        return next((shard for shard in self._state.pending_shards()
                     if not self._missing(shard) or self._clock() > shard.received_at + self._patience), None)  # fmt: skip

    def confirm(self, shard: ShardRecord, judgement: Judgement, run_job: RunJob, on_progress: Callable[[dict[str, Any]], None],
                note: Callable[..., None]) -> Judgement:  # fmt: skip
        """The judgement of a shard that helps, after an audit of its training if it was drawn.

        Args:
            shard: a shard that was found to help.
            judgement: which says so.
            run_job: repeats the training.
            on_progress: told how far that is.
            note: records an event: its name, a sentence and its facts.

        Raises:
            ForgeError: it could not be repeated, which says nothing about the shard.
            Stopped: the coordinator is being stopped.
        """
        sample = self.sample(shard)
        if sample is None:
            return judgement
        steps = f"steps {sample.first:,} to {sample.last:,}"
        try:
            found = self._repeat(shard, sample, run_job, on_progress)
        except ShardError as error:
            reason = f"the audit of its training, {steps}: {str(error).rstrip('.')}"
            return replace(judgement, accepted=False, condemned=False, reasons=(reason,))
        facts = f"its weights are {found['distance']:.2g} and its momenta {found['momentum']:.2g} from what came out"
        note("audited", f"{steps} of expert {shard.partition} of {shard.node_name} were repeated: {facts}",
             partition=shard.partition, node=shard.node_name, first=sample.first, last=sample.last,
             distance=found["distance"], momentum=found["momentum"])  # fmt: skip
        if found["within"]:
            return judgement
        return replace(judgement, accepted=False, condemned=False, reasons=(
            f"it was not trained as it says: {steps} were repeated from its checkpoint, and {facts}: rounding explains less",))

    def _repeat(self, shard: ShardRecord, sample: Sample, run_job: RunJob,
                on_progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:  # fmt: skip
        if self._missing(shard):
            raise ShardError("its node was asked for the checkpoints and did not hand them in.")
        for sha256, step in sample.checkpoints.items():
            if (found := check_checkpoint(self._run.blobs.path(sha256), self._config)) != step:
                raise ShardError(f"the checkpoint of step {step:,} says that it is of step {found:,}.")
        before, after = (None if sha256 is None else str(self._run.blobs.path(sha256))
                         for sha256 in (sample.before, sample.after or shard.sha256))  # fmt: skip
        result = run_job("replay", {"run_dir": str(self._run.root), "partition": shard.partition, "first": sample.first,
                                    "last": sample.last, "before": before, "after": after}, on_progress)  # fmt: skip
        if not result["finished"]:
            raise ForgeError("The repeated training stopped before its end.")
        return result

    def _missing(self, shard: ShardRecord) -> list[str]:
        return [sha256 for sha256 in self.checkpoints(shard) if not self._run.blobs.has(sha256)]
