"""The agent: one loop that turns leases into accepted shards, and goes on from anywhere after any interruption.

    join -> settle finished shards -> lease -> download -> train (child process) -> upload -> commit -> settle -> ...

A finished shard is written down before it is sent, and stays written down until its verdict is known: finished work is
never lost. The same key is the same node, so a killed agent takes its lease back and trains on from the checkpoint.
While the owner wants the machine nothing is leased and nothing is trained; a lease that is held stays held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
import json
from pathlib import Path
from typing import Any

from forge.config import RunConfig, parse_config
from forge.errors import INTERRUPTED, ForgeError, ProtocolError, RunMismatchError, ShardError, TrainingError
from forge.files import hash_file, read_json
from forge.jobs import enforcement
from forge.system import peak_resident_bytes
from forge.train.memory import LIGHT_MB, MB, Plan, candidates, format_size, plan
from forge.vocabulary import CHECKPOINT_FILE, SHARD_FORMAT_VERSION
from node.cache import Cache, Submission, claimed
from node.client import FleetClient
from node.console import Console
from node.control import listening
from node.disk import check_disk
from node.guest import Guest
from node.handover import hand_over, inherit, leave, show_checkpoints
from node.heartbeat import Heartbeats
from node.identity import Identity
from node.machine import MachineProfile
from node.messages import Assignment, Done, Joined, Order, Progress, Receipt, Verdict, Wait
from node.worker import StopNow, Trained, Worker

#: Seconds between two questions for a verdict.
VERDICT_SECONDS = 2.0
#: Longest pause between two questions for work, whatever the coordinator proposes.
LONGEST_WAIT_SECONDS = 60.0
#: Seconds between two looks at whether the owner lets the node go on, and at the coordinator's orders meanwhile.
HOLD_SECONDS = 1.0
#: So many rejected shards in a row mean that something is wrong with this machine, not with one shard.
REJECTIONS_IN_A_ROW = 3


class LeaseLostError(Exception):
    """The coordinator does not want the work any more."""


class Agent:
    """One node at work.

    Args:
        client: the connection to the coordinator.
        identity: signs manifests.
        machine: what was measured.
        worker: trains.
        console: what the owner sees.
        data_dir: identity, downloads and work.
        name: the node's name, written into manifests.
        ram_bytes: what the owner allows.
        guest: whether the owner lets the node work.
        once: leave after one shard has its verdict.
        disk_bytes: what `data_dir` may hold; None is bounded by the disk only.
        sleep: pauses for that many seconds; the guest's way when None, which ends when the owner says something.
    """

    def __init__(self, *, client: FleetClient, identity: Identity, machine: MachineProfile, worker: Worker,
                 console: Console, data_dir: Path, name: str, ram_bytes: int, guest: Guest, once: bool = False,
                 disk_bytes: int | None = None, sleep: Callable[[float], None] | None = None) -> None:  # fmt: skip
        self._client, self._identity, self._machine, self._worker = client, identity, machine, worker
        self._console, self._data_dir, self._name, self._ram_bytes = console, data_dir, name, ram_bytes
        self._guest, self._once, self._disk_bytes, self._sleep = guest, once, disk_bytes, sleep or guest.wait
        self._lease: Assignment | None = None
        self._named: dict[str, str] | None = None
        self._accepted = self._rejected = self._rejected_in_a_row = 0
        self._last_reasons: tuple[str, ...] = ()

    def run(self) -> int:
        """Work until nothing is left to do (0), or the owner interrupts (130).

        Raises:
            ForgeError: something the owner has to know; the lease was given back, checkpoints are kept.
        """
        with claimed(self._data_dir), listening(self._data_dir, self._guest, self.facts):
            try:
                self._loop()
                return 0
            except KeyboardInterrupt as pressed:
                lease = None if isinstance(pressed, StopNow) else self._lease
                if lease is not None and leave(lease, self._cache, self._client, self._console.line, self._uploading(lease)):
                    self._lease = None
                self._release("stopped by its owner")
                self._console.line("Stopped. Checkpoints are kept: run the same command again to go on.")
                return INTERRUPTED
            except Exception as error:
                self._release(f"failed: {error.code if isinstance(error, ForgeError) else type(error).__name__}")
                raise
            finally:
                self._console.calm()
                if self._named is not None:  # Who never joined reads the error alone.
                    self._say_peak("agent", peak_resident_bytes(), LIGHT_MB["node"] * MB, None)
                self._client.close()

    def _loop(self) -> None:
        self._console.wait(f"joining the coordinator at {self._client.address}")
        joined = self._client.join(self._machine)
        config = self._understood(joined)
        # What cannot fit is refused before anything is leased or downloaded.
        self._config, self._predicted = config, self._choose_plan(config).peak_bytes
        self._config_tree, self._run = json.loads(joined.run.config_json), joined.run
        self._named = {"id": joined.run.run_id, "name": joined.run.name}
        self._cache = Cache(self._data_dir, joined.run.run_id)
        self._cache.prune()
        self._console.line(
            f"Joined the run {joined.run.name!r} as {self._name} on {self._machine.device}: an expert needs "
            f"{format_size(self._predicted)} of the {format_size(self._ram_bytes)} allowed.")  # fmt: skip
        self._console.line(enforcement(self._ram_bytes))
        while True:
            self._console.idle()
            self._settle()
            if self._once:
                self._settle_all()
                if self._accepted + self._rejected:
                    return self._leave_once()
            self._stand_by(None)
            if self._guest.leaving:
                self._settle_all()
                return self._console.line(f"Leaving, as `forge-node finish` asked. Shards of this node accepted: "
                                          f"{self._accepted}, rejected: {self._rejected}.")  # fmt: skip
            answer = self._client.lease(self._cache.checkpoints())
            if isinstance(answer, Done):
                self._settle_all()
                reason = (answer.reason or "the run is complete").rstrip(".")
                self._console.line(f"Nothing is left to do: {reason}. Shards of this node accepted: {self._accepted}, "
                                   f"rejected: {self._rejected}.")  # fmt: skip
                return None
            if isinstance(answer, Wait):
                self._console.wait(f"waiting for work: {answer.reason} (asks again in {answer.retry_seconds:.0f} s)")
                self._sleep(min(max(answer.retry_seconds, 0.0), LONGEST_WAIT_SECONDS))
                continue
            self._work(answer)

    def _understood(self, joined: Joined) -> RunConfig:
        try:
            config = parse_config(json.loads(joined.run.config_json), "The coordinator's config")
        except (ValueError, RecursionError) as error:
            raise ProtocolError("The coordinator sent a config that is not JSON: update the older of the two.",
                                detail=str(error)) from error  # fmt: skip
        if config.fingerprint != joined.run.config_fingerprint:
            raise ProtocolError("The coordinator understands its config differently than this node does: install the "
                                "same version of ModularForge on both.")  # fmt: skip
        return config

    def _choose_plan(self, config: RunConfig) -> Plan:
        """The plan to begin with: the fastest within --ram and within what is to spare now, or else the smallest.

        Raises:
            MemoryBudgetError: --ram allows no plan.
        """
        chosen = plan(config, "expert", self._ram_bytes)
        machine, spare = self._machine, self._machine.spare_bytes
        if spare >= self._ram_bytes:
            return chosen
        smallest = min(candidate.peak_bytes for candidate in candidates(config, "expert"))
        chosen = plan(config, "expert", max(min(spare, self._ram_bytes), smallest))
        what = (f"training is planned within {format_size(spare)}, which leaves you {format_size(machine.reserve_bytes)}"
                if chosen.peak_bytes <= spare else
                f"training takes the smallest plan, which needs {format_size(chosen.peak_bytes)} and may slow this machine "
                "down")  # fmt: skip
        self._console.line(f"Warning: {format_size(machine.free_bytes)} of memory is free now and --ram allows "
                           f"{format_size(self._ram_bytes)}: {what}; close something and start again for more.")  # fmt: skip
        return chosen

    def _leave_once(self) -> None:
        if self._rejected and not self._accepted:
            raise ShardError(f"The coordinator rejected the shard of this node: {'; '.join(self._last_reasons)}; run the "
                             "same command again to train another one.")  # fmt: skip
        self._console.line("One shard is handed in and accepted; leaving as --once asks.")

    # --- one lease --------------------------------------------------------------------------------------------------

    def _work(self, assignment: Assignment) -> None:
        """Download, train, hand in."""
        self._lease = assignment
        title = f"partition {assignment.partition}"
        self._console.line(f"Leased {title}: {assignment.partition_tokens:,} tokens.")
        with Heartbeats(self._client, assignment.lease_id, assignment.heartbeat_seconds, self._console.wait) as beats:
            try:
                arguments, work_dir = self._download(assignment, beats)
                if (work_dir / CHECKPOINT_FILE).is_file():
                    self._console.line(f"Going on with {title} from its checkpoint.")
                trained = self._train(arguments, work_dir, beats)
                if trained.peak_bytes:
                    self._say_peak(f"trainer of {title}", trained.peak_bytes, trained.predicted_bytes, self._ram_bytes)
                if trained.order is Order.ABANDON:
                    raise LeaseLostError(beats.reason)
            except LeaseLostError as error:
                self._lease = None
                self._console.line(f"The lease of {title} is lost ({error}); its checkpoint is kept.")
                return
            if trained.shard is None and self._guest.hurrying and hand_over(
                    assignment, self._cache, self._client, self._console.line, self._uploading(assignment, beats)):  # fmt: skip
                self._lease = None
                return
            if trained.shard is None:
                self._console.line(f"Stopped {title} at a checkpoint and gave the lease back.")
                self._release(beats.reason or "stopped before it was finished")
                return
            submission = self._submission(assignment, trained)
            self._cache.submit(submission)
            self._lease = None  # From here on the shard is what counts, not the lease.
            self._hand_in(submission, beats)

    def _train(self, arguments: dict[str, Any], work_dir: Path, beats: Heartbeats) -> Trained:
        """Train until the expert is finished or the lease ends, however often the owner wants the machine meanwhile."""
        trained = Trained(order=Order.FINISH)
        while self._stand_by(beats):
            # Until it has imported torch and taken a step, the training process says nothing.
            self._console.progress(f"partition {arguments['partition']}", Progress(activity="starting to train"))
            try:
                trained = self._worker.train(arguments, work_dir, beats, self._predicted)
            except TrainingError as error:
                if not self._cache.inherited(arguments["partition"]):
                    raise
                self._console.line(f"What another node left is of no use ({_clause(error)}): training begins anew.")
                self._cache.disown(arguments["partition"])
                continue
            # A plan that outgrew its memory once is not tried again with the next lease.
            self._predicted = min(self._predicted, trained.predicted_bytes)
            if not trained.held:
                return trained
        return replace(trained, order=beats.order)

    def _stand_by(self, beats: Heartbeats | None) -> bool:
        """Wait while the owner wants the machine; False when an order of the coordinator comes first.

        Without a lease (no `beats`), an owner who asks to leave is waited for no longer either.
        """
        held = False
        if beats is not None and self._guest.hurrying:
            return False
        while (hold := self._guest.hold()) is not None and not (beats is None and self._guest.leaving):
            if beats is not None:
                beats.stand_still()
            lease = " The lease is kept." if beats is not None else ""
            self._console.hold(f"Paused: {hold}.{lease}")
            held = True
            self._sleep(HOLD_SECONDS)
            if beats is not None and (beats.order is not Order.CONTINUE or self._guest.hurrying):
                return False
        if held:
            self._console.hold("The pause is over.")
        return True

    def _download(self, assignment: Assignment, beats: Heartbeats) -> tuple[dict[str, Any], Path]:
        """Fetch the files of an assignment; what the training process needs to know, and its work directory."""
        facts = {
            "run_id": self._run.run_id, "config_fingerprint": self._run.config_fingerprint, "config": self._config_tree,
            "partition": assignment.partition, "lease_id": assignment.lease_id,
            "shared_sha256": assignment.shared.sha256,
        }  # fmt: skip
        if self._disk_bytes is not None:
            check_disk(self._disk_bytes, self._data_dir, assignment.blobs, self._cache.work_dir(assignment.partition),
                       self._config, lambda: self._cache.discard(assignment.partition, self._console.line))  # fmt: skip
        work_dir = self._cache.begin(assignment, facts)
        self._cache.prune()
        total = sum(blob.size for blob in (*assignment.blobs, assignment.checkpoint) if blob is not None)
        before = 0

        def on_bytes(held: int, _: int) -> None:
            if beats.order is Order.ABANDON:
                raise LeaseLostError(beats.reason)
            self._show("downloading", assignment.partition, before + held, total, beats)

        for blob in assignment.blobs:
            self._cache.fetch(self._client, blob, on_bytes)
            before += blob.size
        inherit(assignment, self._cache, self._client, self._config, self._console.line, on_bytes)
        paths = {"shared": assignment.shared, "shared_ffn": assignment.shared_ffn,
                 "train_tokens": assignment.train_tokens}  # fmt: skip
        return facts | {key: str(self._cache.blobs.path(blob.sha256)) for key, blob in paths.items()}, work_dir

    def _submission(self, assignment: Assignment, trained: Trained) -> Submission:
        """The finished shard with its manifest: the child's facts, completed."""
        assert trained.shard is not None and trained.manifest is not None
        facts = read_json(trained.manifest)
        sha256 = hash_file(trained.shard)
        size = trained.shard.stat().st_size
        manifest = {
            "run_id": self._run.run_id, "lease_id": assignment.lease_id, "partition": assignment.partition,
            "sha256": sha256, "size": size, "tokens_seen": int(facts["tokens_seen"]),
            "final_loss": float(facts["final_loss"]), "node_name": self._name,
            "config_fingerprint": self._run.config_fingerprint, "shared_sha256": assignment.shared.sha256,
            "format_version": SHARD_FORMAT_VERSION, "checkpoints": facts.get("checkpoints") or {},
        }  # fmt: skip
        return Submission(lease_id=assignment.lease_id, partition=assignment.partition, sha256=sha256, size=size,
                          shard=str(trained.shard), manifest=json.dumps(manifest, sort_keys=True))  # fmt: skip

    # --- shards and verdicts ----------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Hand in every finished shard whose verdict is not known; asking again is how a verdict is learnt."""
        for submission in self._cache.submissions():
            self._hand_in(submission, None)

    def _settled_all(self) -> bool:
        return not self._cache.submissions()

    def _settle_all(self) -> None:
        while not self._settled_all():
            partitions = ", ".join(str(submission.partition) for submission in self._cache.submissions())
            self._console.wait(f"waiting for the verdict on partition {partitions}")
            self._sleep(VERDICT_SECONDS)
            self._settle()

    def _hand_in(self, submission: Submission, beats: Heartbeats | None) -> None:
        """Upload what is missing, commit, and act on the verdict."""
        partition, shard = submission.partition, Path(submission.shard)

        def on_bytes(held: int, size: int) -> None:
            self._show("uploading", partition, held, size, beats)

        try:
            receipt = self._client.upload(submission.lease_id, submission.sha256, shard, on_bytes)
            if receipt is None or receipt.verdict is Verdict.PENDING:
                manifest = submission.manifest.encode()
                receipt = self._client.commit(submission.lease_id, submission.sha256, manifest,
                                              self._identity.sign(manifest))  # fmt: skip
                show_checkpoints(submission, receipt.wanted, self._cache, self._client, self._console.line, on_bytes)
        except (ProtocolError, RunMismatchError, ShardError) as error:
            if isinstance(error, ProtocolError) or hash_file(shard) != submission.sha256:
                # The lease is unknown there, or the file is damaged here: the checkpoint makes the shard anew.
                self._console.line(f"Partition {partition}: the shard could not be handed in ({_clause(error)}); its "
                                   "checkpoint is kept.")  # fmt: skip
                self._cache.withdraw(partition)
                return self._count_rejection((_clause(error),))
            receipt = Receipt(sha256=submission.sha256, partition=partition, verdict=Verdict.REJECTED,
                              reasons=(_clause(error),))  # fmt: skip
        self._act_on(receipt, partition)

    def _act_on(self, receipt: Receipt, partition: int) -> None:
        if receipt.verdict is Verdict.PENDING:
            return
        misled = self._cache.inherited(partition)
        self._cache.finish(partition)
        if receipt.verdict is Verdict.ACCEPTED:
            self._accepted += 1
            self._rejected_in_a_row = 0
            self._console.line(f"Partition {partition}: the shard is accepted and credited to {self._name}.")
            return
        reasons = tuple(reason.rstrip(".") for reason in receipt.reasons) or ("no reason was given",)
        self._console.line(f"Partition {partition}: the shard is rejected: {'; '.join(reasons)}.")
        self._count_rejection(reasons, misled)

    def _count_rejection(self, reasons: tuple[str, ...], misled: bool = False) -> None:
        """Note a rejection; one that another node's checkpoint may have led to says nothing about this machine."""
        self._rejected += 1
        self._rejected_in_a_row += not misled
        self._last_reasons = reasons
        if self._rejected_in_a_row >= REJECTIONS_IN_A_ROW:
            raise ShardError(f"The coordinator refused {self._rejected_in_a_row} shards of this node in a row, the "
                             f"last because: {'; '.join(reasons)}; check this machine before it goes on.")  # fmt: skip

    # --- small things -----------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What `forge-node status` shows."""
        progress, budget = self._console.doing or (None, None)
        lease = self._lease
        return {
            "node": self._name, "coordinator": self._client.address, "run": self._named,
            "partition": lease and lease.partition, "progress": progress and asdict(progress),
            "memory": budget and asdict(budget), "sentence": self._console.sentence, "waits_for": self._console.waits_for,
            "accepted": self._accepted, "rejected": self._rejected,
        }  # fmt: skip

    def _show(self, activity: str, partition: int, done: int, total: int, beats: Heartbeats | None) -> None:
        progress = Progress(activity=activity, step=done, steps=total)
        if beats is not None:
            beats.update(progress)
        self._console.progress(f"partition {partition}", progress)

    def _uploading(self, lease: Assignment, beats: Heartbeats | None = None) -> Callable[[int, int], None]:
        return lambda held, size: self._show("uploading", lease.partition, held, size, beats)

    def _release(self, reason: str) -> None:
        if self._lease is not None:
            self._client.release(self._lease.lease_id, reason)
            self._lease = None

    def _say_peak(self, who: str, measured: int, predicted: int, allowed: int | None) -> None:
        limit = f", allowed {format_size(allowed)}" if allowed is not None else ""
        self._console.line(f"{who}: peak memory: measured {format_size(measured)} of predicted {format_size(predicted)}"
                           f"{limit}")  # fmt: skip


def _clause(error: ForgeError) -> str:
    return str(error).rstrip(".")
