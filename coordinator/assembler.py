"""From uploaded shards to the assembled model, one step at a time, by one thread.

`step` looks at what is on disk and in the database and does the most urgent thing that is missing there, so a
coordinator that was killed anywhere finds its work again by looking:

1. an expert in `model/` that is not accepted (any more) is taken out, and an accepted one that is missing put there;
2. a model with so many experts that was not evaluated is evaluated, then pushed;
3. the oldest shard without a verdict is judged;
4. with every shard accepted, the final evaluation ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import json
from typing import Any

from coordinator.activity import Activity
from coordinator.audits import Audits
from coordinator.jobs import RunJob
from coordinator.journal import Journal
from coordinator.records import ShardRecord
from coordinator.state import State
from coordinator.validate import Judgement, judge
from forge.checkpoint import assembly, provenance
from forge.checkpoint.manifest import parse_manifest, tokens_seen
from forge.config import RunConfig
from forge.errors import ForgeError, StorageError, storage_errors
from forge.files import RunDirectory
from forge.train.memory import process_bytes

#: How often a job that ends without a result is started again before the coordinator goes on without it.
ATTEMPTS = 3
#: Seconds before work is tried again that failed on this machine: a full disk, a child killed for its memory.
RETRY_SECONDS = 10.0
#: Seconds between two looks for something to do.
IDLE_SECONDS = 0.5

Push = Callable[[str], str]


class Assembler:
    """The steps from an uploaded shard to a finished run.

    Args:
        run: the run directory; its assembly was started.
        config: the run's config.
        state: says what is accepted and what waits.
        run_job: does the heavy work.
        activity: told what happens now.
        journal: told what happened.
        audits: has a part of a shard's training repeated.
        push: publishes the model directory with a commit message and returns the commit's address.
    """

    def __init__(self, *, run: RunDirectory, config: RunConfig, state: State, run_job: RunJob, activity: Activity,
                 journal: Journal, audits: Audits, push: Push | None = None) -> None:  # fmt: skip
        self._run, self._config, self._state, self._run_job = run, config, state, run_job
        self._activity, self._journal, self._audits, self._push = activity, journal, audits, push
        self._assembled: set[int] = set()
        self._in_place: dict[int, str] | None = None
        self._pushed: int | None = None
        self._failures: dict[tuple[int, bool], int] = {}
        self._swept = False
        #: Every shard is accepted, assembled and evaluated.
        self.done = False
        #: Why the newest push failed, if it did.
        self.push_error: ForgeError | None = None

    def step(self) -> float:
        """Do the most urgent thing; how many seconds to pause before the next step.

        Raises:
            ForgeError: the run cannot go on.
            Stopped: the coordinator is being stopped.
        """
        accepted = self._state.accepted_shards()
        experts = len(accepted)
        if experts < self._config.model.n_experts and self._activity.snapshot().phase in ("evaluate", "done"):
            self._activity.enter("experts")  # A shard was dropped: the run goes on.
        if not self._swept:
            self._delete_checkpoints()
        if (pause := self._take_out_strays(accepted)) is not None:
            return pause
        for shard in accepted:
            if shard.partition not in self._assembled:
                return self._assemble(shard)
        if not self._settled(experts, final=False):
            return self._evaluate(accepted, final=False)
        if self._push is not None and self._pushed != experts and (experts or self._pushed):
            self._push_model(experts)
        pending = self._audits.next_pending()
        if pending is not None:
            return self._judge(pending)
        if experts == self._config.model.n_experts and not self.done:
            return self._end(accepted)
        return IDLE_SECONDS

    def first_evaluation(self) -> float:
        """Evaluate the model without any expert, if that is missing; seconds to pause, 0 when nothing is to do."""
        accepted = self._state.accepted_shards()
        while (pause := self._take_out_strays(accepted)) is not None:
            if pause:
                return pause
        if accepted or self._settled(0, final=False):
            return 0.0
        return self._evaluate(accepted, final=False)

    def _take_out_strays(self, accepted: list[ShardRecord]) -> float | None:
        """Take an expert out that is in the model and not accepted any more; None when there is none."""
        if self._in_place is None:
            self._in_place = assembly.placed(self._run.model)
        wanted = {shard.partition: shard.sha256 for shard in accepted}
        stray = next((k for k, sha256 in self._in_place.items() if wanted.get(k) != sha256), None)
        if stray is None:
            return None
        try:
            assembly.withdraw(self._run, stray)
        except StorageError as error:
            return self._later("withdrawal-failed", f"cannot take expert {stray} out of the model", error)
        sha256 = self._in_place.pop(stray)
        self._assembled.discard(stray)
        self._failures.clear()
        self.done = False
        self._journal.event("withdrawn", f"expert {stray} is taken out of the model: its partition is open again",
                            partition=stray, sha256=sha256)  # fmt: skip
        return 0.0

    def _assemble(self, shard: ShardRecord) -> float:
        credit = {"node_id": shard.node_id if shard.public_key else None, "node_name": shard.node_name, "loss": shard.loss,
                  "shared_loss": shard.shared_loss, "tokens": tokens_seen(parse_manifest(shard.manifest))}  # fmt: skip
        try:
            provenance.keep(self._run, provenance.origin(
                self._run.blobs.path(shard.sha256), self._config, shard.partition, shard.manifest, sha256=shard.sha256,
                signature=shard.signature or None, public_key=shard.public_key or None), credit)  # fmt: skip
            assembly.accept(self._run, shard.partition, shard.sha256, credit)
        except StorageError as error:
            return self._later("assembly-failed", f"cannot put expert {shard.partition} into the model", error)
        self._assembled.add(shard.partition)
        if self._in_place is not None:
            self._in_place[shard.partition] = shard.sha256
        self._journal.event("assembled", f"expert {shard.partition} of {shard.node_name} is in the model "
                            f"({len(self._assembled)} of {self._config.model.n_experts})", partition=shard.partition,
                            sha256=shard.sha256, node=shard.node_name)  # fmt: skip
        return 0.0

    def _settled(self, experts: int, *, final: bool) -> bool:
        return (self._failures.get((experts, final), 0) >= ATTEMPTS
                or self._state.evaluated(experts, final=final))  # fmt: skip

    def _evaluate(self, accepted: list[ShardRecord], *, final: bool) -> float:
        """Evaluate the model with these experts; it says nothing if one of them was dropped meanwhile."""
        experts = len(accepted)
        self._activity.say(f"evaluating {self._model_with(experts)}", process_bytes(self._config, "evaluate"))
        try:
            arguments = {"run_dir": str(self._run.root), "final": final}
            row = self._run_job("evaluate", arguments, self._activity.progress)
        except ForgeError as error:
            if self._changed(accepted):
                return 0.0
            failures = self._failures[experts, final] = self._failures.get((experts, final), 0) + 1
            if final and failures >= ATTEMPTS:
                raise
            return self._later("evaluation-failed", f"cannot evaluate {self._model_with(experts)} "
                               f"(attempt {failures} of {ATTEMPTS})", error)  # fmt: skip
        finally:
            self._activity.say("")
        if self._changed(accepted):
            return 0.0
        self._state.record_evaluation(experts, row, final=final)
        perplexity = row.get("mean_perplexity")
        shown = f": perplexity {perplexity:.2f}" if isinstance(perplexity, int | float) else ""
        self._journal.event("evaluated", f"{self._model_with(experts)} is evaluated{shown}", experts=experts, final=final,
                            mean_perplexity=perplexity)  # fmt: skip
        return 0.0

    def _changed(self, accepted: list[ShardRecord]) -> bool:
        return [shard.id for shard in accepted] != [shard.id for shard in self._state.accepted_shards()]

    def _judge(self, shard: ShardRecord) -> float:
        who = f"expert {shard.partition} of {shard.node_name}"
        self._activity.say(f"validating {who}", process_bytes(self._config, "validate"))
        try:
            judgement = judge(shard, self._run, self._run_job, self._activity.progress)
            if judgement.accepted:
                judgement = self._audits.confirm(shard, judgement, self._run_job, self._activity.progress, self._journal.event)
        except ForgeError as error:
            attempts = self._state.count_attempt(shard.id)
            if attempts < ATTEMPTS:
                what = f"cannot validate {who} (attempt {attempts} of {ATTEMPTS})"
                return self._later("validation-failed", what, error)
            reason = f"the coordinator could not validate it in {ATTEMPTS} attempts; it is not the shard's fault"
            self._state.reject(shard.id, [reason], judged=False)
            self._journal.event("rejected", f"{who} is given up: {error}", partition=shard.partition, reasons=[reason])
            return 0.0
        finally:
            self._activity.say("")
        self._decide(shard, judgement, who)
        self._swept = False
        self._delete(self._audits.spent(shard))  # Not before the verdict is kept: who is killed in between looks at them again.
        return 0.0

    def _decide(self, shard: ShardRecord, judgement: Judgement, who: str) -> None:
        if judgement.accepted:
            # False when its node was revoked while it was being judged.
            if self._state.accept(shard.id, loss=judgement.loss, shared_loss=judgement.shared_loss):
                self._journal.event("accepted", f"{who} is accepted{_losses(judgement.loss, judgement.shared_loss)}",
                                    partition=shard.partition, sha256=shard.sha256, node=shard.node_name,
                                    loss=judgement.loss, shared_loss=judgement.shared_loss)  # fmt: skip
            return
        reasons = judgement.reasons or ("no reason was given",)
        self._state.reject(shard.id, reasons, again=not judgement.condemned)
        self._journal.event("rejected", f"{who} is rejected: {'; '.join(reasons)}", partition=shard.partition,
                            sha256=shard.sha256, node=shard.node_name, reasons=list(reasons))  # fmt: skip
        if not (judgement.condemned and self._state.uses(shard.sha256)):
            self._discard(shard)

    def _model_with(self, experts: int) -> str:
        return f"the model with {experts} of {self._config.model.n_experts} experts"

    def _discard(self, shard: ShardRecord) -> None:
        """Delete the bytes of a shard that was judged bad: the verdict is kept, or they are uploaded again."""
        if self._run.blobs.has(shard.sha256):
            if shard.sha256 in json.dumps(self._run.marker("publish")):
                return  # Somebody handed in a published file as a shard.
            with storage_errors(self._run.blobs.directory):
                self._run.blobs.path(shard.sha256).unlink(missing_ok=True)

    def _delete_checkpoints(self) -> None:
        """Delete what nodes left of partitions whose shard has been judged since, or that another one left more of."""
        self._delete(self._state.stale_checkpoints())
        self._swept = True

    def _delete(self, checkpoints: Iterable[str]) -> None:
        """Delete blobs that somebody called checkpoints, but none that is anything else as well."""
        published = json.dumps(self._run.marker("publish"))
        for sha256 in checkpoints:
            if sha256 not in published and not self._state.needs(sha256):
                with storage_errors(self._run.blobs.directory):
                    self._run.blobs.path(sha256).unlink(missing_ok=True)

    def _push_model(self, experts: int) -> None:
        assert self._push is not None
        final = self._state.evaluated(experts, final=True)
        message = f"{experts} of {self._config.model.n_experts} experts{', final evaluation' if final else ''}"
        self._pushed, self.push_error = experts, None
        self._activity.say("pushing the model")
        try:
            where = self._push(message)
            self._journal.event("pushed", f"{self._model_with(experts)} is pushed: {where}", experts=experts, url=where)
        except ForgeError as error:
            self.push_error = error
            then = "the same command pushes again" if final else "the run goes on and the next push carries it all"
            self._journal.event("push-failed", f"the push failed, {then}: {error}", experts=experts, error=str(error))
        finally:
            self._activity.say("")

    def _end(self, accepted: list[ShardRecord]) -> float:
        experts = len(accepted)
        self._activity.enter("evaluate")
        if not self._state.evaluated(experts, final=True):
            pause = self._evaluate(accepted, final=True)
            if self._push is not None and self._state.evaluated(experts, final=True):
                self._push_model(experts)
            return pause  # The next step ends the run, if all of them are accepted still.
        self._activity.enter("done")
        self.done = True
        self._journal.event("done", f"every expert has arrived: the model is in {self._run.model}", experts=experts)
        return 0.0

    def _later(self, event: str, what: str, error: ForgeError) -> float:
        self._journal.event(event, f"{what}: {error} Trying again in {RETRY_SECONDS:.0f} s.", error=str(error))
        self._activity.say(f"{what}; trying again soon")
        return RETRY_SECONDS


def _losses(loss: float | None, shared_loss: float | None) -> str:
    if loss is None or shared_loss is None:
        return ""
    return f": loss {loss:.4f} on its partition, {shared_loss:.4f} without it"


def progress_facts(event: dict[str, Any]) -> str:
    """A job's progress event in a few words."""
    words = [f"step {event['step']:,} of {event['steps']:,}"] if event.get("steps") else []
    words += [f"loss {event['loss']:.3f}"] if event.get("loss") is not None else []
    words += [f"{event['tokens_per_second']:,.0f} tokens/s"] if event.get("tokens_per_second") else []
    words += [str(event["message"])] if event.get("message") else []
    return ", ".join(words)
