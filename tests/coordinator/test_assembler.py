from __future__ import annotations

from collections.abc import Callable, Iterator
import json
from pathlib import Path
import struct

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
import pytest
from safetensors.numpy import load, save

from coordinator.activity import Activity
from coordinator.assembler import ATTEMPTS, IDLE_SECONDS, RETRY_SECONDS, Assembler
from coordinator.audits import Audits
from coordinator.auth import Credentials
from coordinator.journal import Journal
from coordinator.state import State
from forge.checkpoint import assembly
from forge.checkpoint.verify import verify
from forge.errors import ForgeError, HubError, ShardError, StorageError
from forge.files import RunDirectory
from forge.model import names
from forge.signature import node_id_of

from .fakes import CONFIG, LEASE_SECONDS, Clock, FakeJobs, make_shard


def safetensors_metadata(shard: bytes) -> dict[str, str]:
    """The free-form strings in a shard's header."""
    (length,) = struct.unpack("<Q", shard[:8])
    return dict(json.loads(shard[8 : 8 + length])["__metadata__"])


class Bench:
    """A published run with its state, and an assembler that can be made anew as after a restart."""

    def __init__(self, root: Path) -> None:
        self.run, self.jobs, self.clock = RunDirectory.open(root, CONFIG), FakeJobs(), Clock()
        self.jobs("stage", {"run_dir": str(root), "stage": "publish"}, lambda _: None)
        self.jobs.calls.clear()
        assembly.start(self.run)
        self.state = State(self.run.database, lease_seconds=LEASE_SECONDS, clock=self.clock)
        self.state.open_partitions((self.run.marker("publish") or {})["partitions"])
        self.key = Ed25519PrivateKey.from_private_bytes(bytes(32))
        public = self.key.public_key().public_bytes_raw()
        self.laptop = node_id_of(public)
        self.state.register_node(self.laptop, public, "laptop", {})
        self.pushed: list[str] = []
        self.push_errors: list[ForgeError] = []
        self.restart()

    def restart(self, push: bool = False) -> None:
        audits = Audits(run=self.run, config=CONFIG, state=self.state, credentials=Credentials(bytes(32)), clock=self.clock)
        self.activity = Activity()
        self.activity.enter("experts")
        self.assembler = Assembler(
            run=self.run, config=CONFIG, state=self.state, run_job=self.jobs, activity=self.activity, audits=audits,
            journal=Journal(self.run.root / "events.jsonl", lambda _: None), push=self._push if push else None)  # fmt: skip

    def _push(self, message: str) -> str:
        if self.push_errors:
            raise self.push_errors.pop(0)
        self.pushed.append(message)
        return "https://hub/commit"

    def hand_in(self, partition: int, shard: bytes | None = None, node: str = "") -> str:
        shard = shard or make_shard(self.run, partition)
        path = self.run.work / "shard"
        path.write_bytes(shard)
        node = node or self.laptop
        lease = self.state.grant(node, [partition])
        assert lease is not None and lease.partition == partition
        sha256 = self.run.blobs.adopt(path)
        manifest = json.dumps({
            "run_id": self.run.run_id, "lease_id": lease.id, "partition": partition, "sha256": sha256, "tokens_seen": 1000,
            "shared_sha256": (self.run.marker("publish") or {})["shared"]["sha256"],
            "config_fingerprint": CONFIG.fingerprint}).encode()  # fmt: skip
        self.state.submit(lease.id, node, sha256=sha256, size=len(shard), signature=self.key.sign(manifest), manifest=manifest)
        self.clock.now += 1
        return sha256

    def settle(self) -> None:
        """Step until there is nothing to do; pauses are not slept."""
        for _ in range(50):
            if self.assembler.step() == IDLE_SECONDS:
                return

    @property
    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in (self.run.root / "events.jsonl").read_text().splitlines()]

    @property
    def arrived(self) -> dict[int, str]:
        return assembly.arrived(self.run.model)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "run")
    yield bench
    bench.state.close()


def test_shards_are_judged_assembled_and_evaluated_in_the_order_they_came(bench: Bench) -> None:
    shards = {partition: bench.hand_in(partition) for partition in (2, 0)}
    bench.settle()
    assert bench.jobs.calls == ["evaluate", "validate", "evaluate", "validate", "evaluate"]
    assert bench.arrived == shards
    assert [row["experts"] for row in bench.state.evaluations()] == [0, 1, 2]
    manifest = json.loads((bench.run.model / "modularforge.json").read_text())
    credit = next(row["credit"] for row in manifest["experts"] if row["partition"] == 2)
    assert (credit["node_name"], credit["tokens"], credit["loss"]) == ("laptop", 1000, 3.0)
    found = verify(bench.run.model)
    assert found.problems == []
    signed = {link.what for link in found.links if link.by == f"node {bench.laptop}"}
    assert signed == {"expert-000.safetensors", "expert-002.safetensors"}


def test_the_last_shard_brings_the_final_evaluation(bench: Bench) -> None:
    for partition in range(3):
        bench.hand_in(partition)
    bench.settle()
    assert bench.assembler.done
    assert [(row["experts"], row["final"]) for row in bench.state.evaluations()] == [
        (0, False), (1, False), (2, False), (3, False), (3, True)]  # fmt: skip
    bench.restart()
    bench.jobs.calls.clear()
    bench.settle()
    assert bench.assembler.done
    assert bench.jobs.calls == []


@pytest.mark.parametrize("shard", ["nan", "truncated", "foreign", "of another partition", "of other shared components"])
def test_a_bad_shard_is_rejected_without_running_it(bench: Bench, shard: str) -> None:
    good = make_shard(bench.run, 0)
    shards = {"nan": make_shard(bench.run, 0, poison=True), "truncated": good[:-10],
              "foreign": make_shard(bench.run, 0, run_id="f" * 32),
              "of another partition": make_shard(bench.run, 1),
              "of other shared components": make_shard(bench.run, 0, shared_sha256="f" * 64)}  # fmt: skip
    sha256 = bench.hand_in(0, shards[shard])
    bench.settle()
    partition = bench.state.partitions()[0]
    assert (partition.state, len(partition.last_rejection)) == ("open", 1)
    assert "validate" not in bench.jobs.calls
    assert not bench.run.blobs.has(sha256)
    assert bench.arrived == {}


def test_a_shard_that_does_not_help_is_rejected_with_the_reasons_of_the_job(bench: Bench) -> None:
    bench.jobs.verdicts = [{"accepted": False, "reasons": ["no better"]}, ShardError("worse")]
    bench.hand_in(0)
    bench.settle()
    assert bench.state.partitions()[0].last_rejection == ("no better",)
    bench.hand_in(1, make_shard(bench.run, 1))
    bench.settle()
    assert bench.state.partitions()[1].last_rejection == ("worse",)


def renamed_expert(bench: Bench, partition: int, to: int, **metadata: str) -> bytes:
    """The tensors of a partition's shard, to the byte, under the names and the metadata of another partition."""
    weights = load(make_shard(bench.run, partition))
    theirs = zip(names.expert_tensors(CONFIG.model, to), names.expert_tensors(CONFIG.model, partition), strict=True)
    header = safetensors_metadata(make_shard(bench.run, to)) | metadata
    return bytes(save({name: weights[old] for name, old in theirs}, header))


def test_an_accepted_experts_tensors_are_no_second_expert_whatever_their_header_says(bench: Bench) -> None:
    bench.hand_in(1)
    bench.settle()
    bench.jobs.calls.clear()
    bench.hand_in(0, renamed_expert(bench, 1, to=0, note="mine"))
    bench.settle()
    (reason,) = bench.state.partitions()[0].last_rejection
    assert "the very tensors of the accepted expert 1" in reason
    assert "validate" not in bench.jobs.calls
    # The same partition again is another matter: training is deterministic, so two nodes can make the same shard.
    bench.state.revoke(bench.laptop, drop_shards=True)
    bench.state.register_node("b", bytes(32), "desktop", {})
    bench.settle()
    bench.hand_in(1, renamed_expert(bench, 1, to=1, note="of another node"), node="b")
    bench.settle()
    assert bench.state.partitions()[1].state == "accepted"


def test_the_shared_ffn_under_an_experts_names_is_no_expert(bench: Bench) -> None:
    published = bench.run.marker("publish") or {}
    ffn = load(bench.run.blobs.path(published["shared_ffn"]["sha256"]).read_bytes())
    copy = dict(zip(names.expert_tensors(CONFIG.model, 0), (ffn[n] for n in names.ffn_tensors(CONFIG.model)), strict=True))
    bench.hand_in(0, bytes(save(copy, safetensors_metadata(make_shard(bench.run, 0)))))
    bench.settle()
    assert "the shared FFN again" in bench.state.partitions()[0].last_rejection[0]
    assert "validate" not in bench.jobs.calls


def test_a_published_file_handed_in_as_a_shard_is_not_deleted(bench: Bench) -> None:
    blob = (bench.run.marker("publish") or {})["shared_ffn"]["sha256"]
    assert bench.hand_in(0, bench.run.blobs.path(blob).read_bytes()) == blob
    bench.settle()
    assert bench.state.partitions()[0].last_rejection
    assert bench.run.blobs.has(blob)


def test_a_validation_that_dies_is_tried_again_and_is_nobodys_rejection(bench: Bench) -> None:
    bench.jobs.failures["validate"] = [ForgeError("killed by SIGKILL")]
    bench.hand_in(0)
    bench.settle()
    assert 0 in bench.arrived
    assert "validation-failed" in bench.events
    bench.jobs.failures["validate"] = [ForgeError("killed by SIGKILL")] * ATTEMPTS
    shard = make_shard(bench.run, 1)
    sha256 = bench.hand_in(1, shard)
    bench.settle()
    assert bench.state.partitions()[1].state == "open"
    assert "not the shard's fault" in bench.state.partitions()[1].last_rejection[0]
    assert bench.state.nodes()[0].rejected == 0
    assert bench.hand_in(1, shard) == sha256
    bench.settle()
    assert 1 in bench.arrived


def test_an_evaluation_that_dies_holds_nothing_up_and_is_redone_after_a_restart(bench: Bench) -> None:
    bench.jobs.failures["evaluate"] = [ForgeError("out of memory")] * ATTEMPTS
    bench.hand_in(0)
    bench.settle()
    assert [row["experts"] for row in bench.state.evaluations()] == [1]
    bench.state.record_evaluation(0, {})
    bench.jobs.failures["evaluate"] = [ForgeError("out of memory")] * ATTEMPTS
    bench.hand_in(1)
    bench.settle()
    assert not bench.state.evaluated(2)
    bench.restart()
    bench.settle()
    assert bench.state.evaluated(2)


def test_a_final_evaluation_that_keeps_dying_ends_the_run_with_its_error(bench: Bench) -> None:
    for partition in range(3):
        bench.hand_in(partition)
    while not bench.state.evaluated(3):
        bench.assembler.step()
    bench.jobs.failures["evaluate"] = [ForgeError("out of memory")] * ATTEMPTS
    assert bench.assembler.step() == RETRY_SECONDS
    with pytest.raises(ForgeError, match="out of memory"):
        bench.settle()


def drop_during(bench: Bench, evaluation: int, error: ForgeError | None = None) -> None:
    """Experts of two nodes, and the first expert's node is revoked with it during the n-th evaluation, which may then fail."""
    bench.state.register_node("b", bytes(32), "desktop", {})
    for partition, node in enumerate((bench.laptop, "b", "b")):
        bench.hand_in(partition, node=node)

    def before(_: str) -> None:
        if bench.jobs.calls.count("evaluate") == evaluation:
            bench.jobs.before = lambda _: None
            assert bench.state.revoke(bench.laptop, drop_shards=True) == [0]
            bench.jobs.failures["evaluate"] = [error] * ATTEMPTS if error is not None else []

    bench.jobs.before = before


def test_the_evaluation_of_a_model_that_held_a_dropped_shard_is_not_recorded(bench: Bench) -> None:
    drop_during(bench, evaluation=3)  # Of the model with two experts.
    bench.settle()
    assert sorted(bench.arrived) == [1, 2]
    assert bench.jobs.calls.count("evaluate") == 5  # With two other experts, also.
    assert [(row["experts"], row["contributions"][-1]["expert"]) for row in bench.state.evaluations()[1:]] == [(1, 1), (2, 2)]


@pytest.mark.parametrize("error", [None, ForgeError("killed by SIGKILL")])
@pytest.mark.parametrize("evaluation", [4, 5], ids=["last", "final"])
def test_a_run_that_loses_a_shard_in_its_last_evaluations_goes_on(bench: Bench, evaluation: int,
                                                                  error: ForgeError | None) -> None:  # fmt: skip
    bench.restart(push=True)
    drop_during(bench, evaluation, error)
    bench.settle()
    assert "done" not in bench.events and not bench.assembler.done
    assert bench.activity.snapshot().phase == "experts"
    assert sorted(bench.arrived) == [1, 2]
    bench.hand_in(0, node="b")
    bench.settle()
    assert bench.assembler.done and bench.events.count("done") == 1
    assert bench.pushed.count("3 of 3 experts, final evaluation") == 1
    assert [(row["experts"], row["final"]) for row in bench.state.evaluations()] == [
        (0, False), (2, False), (3, False), (3, True)]  # fmt: skip


def test_what_was_accepted_before_a_kill_is_assembled_after_it(bench: Bench) -> None:
    sha256 = bench.hand_in(0)
    shard = bench.state.next_pending()
    assert shard is not None
    bench.state.accept(shard.id, loss=3.0, shared_loss=3.5)
    assert bench.arrived == {}
    bench.restart()
    bench.settle()
    assert bench.arrived == {0: sha256}
    assert bench.state.evaluated(1)


def test_a_full_disk_at_assembly_is_waited_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.hand_in(0)
    accept: Callable[..., None] = assembly.accept
    failures = [StorageError("The disk is full.")]

    def full_once(*arguments: object) -> None:
        if failures:
            raise failures.pop()
        accept(*arguments)

    monkeypatch.setattr(assembly, "accept", full_once)
    bench.settle()
    assert 0 in bench.arrived
    assert "assembly-failed" in bench.events


def test_the_model_is_pushed_as_it_grows_and_a_failure_is_made_up_for_by_the_next_push(bench: Bench) -> None:
    bench.restart(push=True)
    bench.push_errors = [HubError("503")]
    bench.hand_in(0)
    bench.settle()
    assert bench.pushed == []
    assert "push-failed" in bench.events
    bench.hand_in(1)
    bench.hand_in(2)
    bench.settle()
    assert bench.pushed == ["2 of 3 experts", "3 of 3 experts", "3 of 3 experts, final evaluation"]
