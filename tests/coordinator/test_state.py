from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import sqlite3
import tempfile
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
import pytest

from coordinator.choice import MAX_REJECTIONS
from coordinator.records import CheckpointRecord, LeaseRecord, Receipt
from coordinator.state import ELSEWHERE, IN_FRONT, State
from forge.errors import ProtocolError, StorageError

from .fakes import LEASE_SECONDS, Clock

SHA = {name: format(ord(name), "064x") for name in "xyz"}


def granted(state: State, node: str, *preferred: int) -> LeaseRecord:
    lease = state.grant(node, preferred)
    assert lease is not None
    return lease


def submit(state: State, lease: LeaseRecord, sha: str) -> Receipt:
    return state.submit(lease.id, lease.node_id, sha256=SHA.get(sha, sha), size=5, manifest=b"{}", signature=b"s")


def states(state: State) -> list[str]:
    return [partition.state for partition in state.partitions()]


def pending_id(state: State) -> int:
    shard = state.next_pending()
    assert shard is not None
    return shard.id


def test_a_node_that_asks_again_gets_its_lease_again(state: State, clock: Clock) -> None:
    first = granted(state, "a")
    clock.now += 30
    again = granted(state, "a", 2)
    assert (again.id, first.fresh, again.fresh) == (first.id, True, False)
    assert again.expires_at == clock.now + LEASE_SECONDS
    assert states(state) == ["leased", "open", "open"]


def test_preferred_partitions_come_first_and_then_those_without_a_rejection(state: State) -> None:
    assert granted(state, "a", 9, 2).partition == 2
    lease = granted(state, "b")
    assert lease.partition == 0
    submit(state, lease, "x")
    state.reject(pending_id(state), ["too bad"])
    assert granted(state, "b").partition == 1


def test_every_partition_leased_means_no_lease(state: State) -> None:
    for node in "abc":
        granted(state, node)
    state.register_node("d", b"d" * 32, "node d", {})
    assert state.grant("d") is None
    assert (state.counts().leased, state.counts().next_expiry) == (3, LEASE_SECONDS)


def test_a_heartbeat_keeps_a_lease_and_silence_ends_it(state: State, clock: Clock) -> None:
    lease = granted(state, "a")
    clock.now += LEASE_SECONDS - 1
    assert state.heartbeat(lease.id, "a", {"step": 5}) == ("continue", "")
    clock.now += LEASE_SECONDS - 1
    assert state.partitions()[0].progress == {"step": 5}
    clock.now += 2
    assert state.counts().open == 3


def test_an_expired_lease_revives_while_nobody_took_its_partition(state: State, clock: Clock) -> None:
    lease = granted(state, "a")
    clock.now += LEASE_SECONDS + 1
    assert state.counts().open == 3
    assert state.heartbeat(lease.id, "a", {})[0] == "continue"
    assert states(state)[0] == "leased"
    clock.now += LEASE_SECONDS + 1
    assert granted(state, "b").partition == 0
    order, reason = state.heartbeat(lease.id, "a", {})
    assert (order, "another node" in reason) == ("abandon", True)


def test_heartbeats_of_unknown_or_foreign_leases_are_abandoned(state: State) -> None:
    assert state.heartbeat("nothing", "a", {})[0] == "abandon"
    assert state.heartbeat(granted(state, "a").id, "b", {})[0] == "abandon"
    with pytest.raises(ProtocolError):
        state.lease(granted(state, "a").id, "b")


def test_a_released_partition_is_open_again(state: State) -> None:
    lease = granted(state, "a")
    state.release(lease.id, "b")
    assert states(state)[0] == "leased"
    state.release(lease.id, "a")
    state.release(lease.id, "a")
    assert states(state)[0] == "open"
    assert state.heartbeat(lease.id, "a", {})[0] == "abandon"


def test_a_shard_is_accepted_once_and_asking_again_says_so(state: State) -> None:
    lease = granted(state, "a")
    assert submit(state, lease, "x").verdict == "pending"
    assert submit(state, lease, "x").verdict == "pending"
    assert states(state)[0] == "uploaded"
    shard = pending_id(state)
    assert state.accept(shard, loss=3.0, shared_loss=3.5)
    assert state.accept(shard, loss=9.0, shared_loss=9.0)
    state.reject(shard, ["too late for that"])
    assert submit(state, lease, "x").verdict == "accepted"
    assert [(s.partition, s.loss) for s in state.accepted_shards()] == [(0, 3.0)]
    assert state.nodes()[0].accepted == 1


def test_a_rejected_shard_reopens_its_partition_with_reasons(state: State) -> None:
    lease = granted(state, "a")
    submit(state, lease, "x")
    state.reject(pending_id(state), ["not finite"])
    assert (states(state)[0], state.partitions()[0].last_rejection) == ("open", ("not finite",))
    assert submit(state, lease, "x").reasons == ("not finite",)
    assert state.heartbeat(lease.id, "a", {}) == ("abandon", "its shard was rejected: not finite")
    assert state.nodes()[0].rejected == 1


def test_the_same_bytes_from_another_lease_have_the_same_verdict_and_end_it(state: State) -> None:
    submit(state, granted(state, "a"), "x")
    state.reject(pending_id(state), ["not finite"])
    lease = granted(state, "b")
    assert submit(state, lease, "x").verdict == "rejected"
    assert state.next_pending() is None
    assert states(state)[0] == "open"


def test_a_late_shard_is_welcome_unless_another_is_there(state: State, clock: Clock) -> None:
    late = granted(state, "a")
    clock.now += LEASE_SECONDS + 1
    current = granted(state, "b")
    assert current.partition == late.partition == 0
    assert submit(state, late, "x").verdict == "pending"
    assert state.heartbeat(current.id, "b", {})[0] == "continue"
    assert submit(state, current, "y") == Receipt(sha256=SHA["y"], partition=0, verdict="pending", reasons=(IN_FRONT,))
    assert granted(state, "b").partition == 1
    state.accept(pending_id(state), loss=None, shared_loss=None)
    assert submit(state, current, "y") == Receipt(sha256=SHA["y"], partition=0, verdict="rejected", reasons=(ELSEWHERE,))


def test_a_shard_in_the_queue_gets_its_turn_when_the_one_in_front_is_rejected(state: State, clock: Clock) -> None:
    late = granted(state, "a")
    clock.now += LEASE_SECONDS + 1
    current = granted(state, "b")
    submit(state, late, "x")
    submit(state, current, "y")
    state.reject(pending_id(state), ["bad"])
    assert submit(state, current, "y").verdict == "pending"
    assert states(state)[0] == "uploaded"


def test_the_other_lease_goes_on_when_a_late_shard_is_rejected_and_ends_when_it_is_accepted(
        state: State, clock: Clock) -> None:  # fmt: skip
    late = {}
    for node in "ab":
        late[node] = granted(state, node)
        clock.now += LEASE_SECONDS + 1
    current = granted(state, "c")
    submit(state, late["a"], "x")
    state.reject(pending_id(state), ["bad"])
    assert states(state)[0] == "leased"
    submit(state, late["b"], "z")
    state.accept(pending_id(state), loss=None, shared_loss=None)
    assert state.heartbeat(current.id, "c", {}) == ("abandon", ELSEWHERE)
    assert granted(state, "c").partition == 1


def test_a_node_is_not_given_what_it_failed_at_too_often(state: State) -> None:
    for attempt in range(MAX_REJECTIONS):
        submit(state, granted(state, "a", 0), format(attempt, "064x"))
        state.reject(pending_id(state), ["bad"])
    assert granted(state, "a", 0).partition == 1
    assert granted(state, "b").partition == 0


def test_leases_that_ended_take_no_more_bad_shards_than_new_ones(state: State, clock: Clock) -> None:
    leases = []
    for _ in range(MAX_REJECTIONS + 1):
        leases.append(granted(state, "a", 0))
        clock.now += LEASE_SECONDS + 1
    for attempt, lease in enumerate(leases[:-1]):
        submit(state, lease, format(attempt, "064x"))
        state.reject(pending_id(state), ["bad"])
        assert submit(state, lease, format(attempt, "064x")).reasons == ("bad",), "the same question has the same answer"
        with pytest.raises(ProtocolError, match="ask for a new one"):
            submit(state, lease, "x")
    with pytest.raises(ProtocolError, match="ask for a new one"):
        state.receipt(leases[-1].id, "a", SHA["x"])  # Before its bytes are sent.
    assert state.nodes()[0].rejected == MAX_REJECTIONS


def test_a_shard_that_could_not_be_judged_may_be_handed_in_again(state: State) -> None:
    lease = granted(state, "a")
    submit(state, lease, "x")
    shard = pending_id(state)
    assert [state.count_attempt(shard) for _ in range(2)] == [1, 2]
    state.reject(shard, ["the coordinator's fault"], judged=False)
    assert state.uses(SHA["x"])
    assert state.nodes()[0].rejected == 0
    again = granted(state, "a")
    assert submit(state, again, "x").verdict == "pending"
    assert state.count_attempt(pending_id(state)) == 1


def test_the_database_itself_refuses_a_second_acceptance(state: State, tmp_path: Path) -> None:
    submit(state, granted(state, "a"), "x")
    with sqlite3.connect(tmp_path / "forge.db") as raw:
        columns = "partition, slot, sha256, size, lease_id, node_id, manifest, signature, verdict, judged, reasons, attempts, received_at"  # noqa: E501
        values = f"SELECT partition, slot, 'other', size, lease_id, node_id, manifest, signature, 'accepted', 1, reasons, 0, 0 FROM shards"  # noqa: E501, F541
        with pytest.raises(sqlite3.IntegrityError, match="slot"):
            raw.execute(f"INSERT INTO shards ({columns}) {values}")
    raw.close()


def test_everything_is_there_after_a_restart(state: State, tmp_path: Path, clock: Clock) -> None:
    lease = granted(state, "a")
    submit(state, granted(state, "b"), "x")
    state.record_evaluation(0, {"mean_perplexity": 9.0})
    state.record_evaluation(0, {"mean_perplexity": 8.0})
    clock.now += LEASE_SECONDS + 1
    again = State(tmp_path / "forge.db", lease_seconds=LEASE_SECONDS, clock=clock)
    again.extend_leases()
    assert granted(again, "a").id == lease.id
    assert states(again) == ["leased", "uploaded", "open"]
    assert again.evaluations() == [{"experts": 0, "final": False, "mean_perplexity": 8.0}]
    assert again.evaluated(0) and not again.evaluated(0, final=True)
    again.close()


def test_a_database_of_another_version_is_refused(state: State, tmp_path: Path, clock: Clock) -> None:
    with sqlite3.connect(tmp_path / "forge.db") as raw:
        raw.execute("UPDATE schema_version SET version = 99")
    raw.close()
    with pytest.raises(StorageError, match="version 99"):
        State(tmp_path / "forge.db", lease_seconds=1, clock=clock)


def test_a_directory_without_a_database_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be used"):
        State(tmp_path / "missing" / "forge.db", lease_seconds=1)
    with pytest.raises(StorageError, match="nonsense"):
        State("nonsense://somewhere", lease_seconds=1)


def test_many_threads_get_each_partition_once(tmp_path: Path) -> None:
    state = State(tmp_path / "forge.db", lease_seconds=LEASE_SECONDS)
    state.open_partitions([{"partition": k, "tokens": 1} for k in range(8)])

    def work(number: int) -> int:
        state.register_node(f"n{number}", bytes(32), "n", {})
        lease = granted(state, f"n{number}")
        submit(state, lease, format(number, "064x"))
        return lease.partition

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(work, range(8))) == list(range(8))
    assert state.counts().uploaded == 8
    state.close()


def straggle(state: State, clock: Clock, step: int = 10) -> tuple[LeaseRecord, LeaseRecord]:
    """Two partitions were accepted after a minute each, and node c is at `step` of 100 of the third; the lease of c, and
    what a then gets.
    """
    slow = granted(state, "c", 2)
    for node in "ab":
        lease = granted(state, node)
        clock.now += 30
        submit(state, lease, "xy"[lease.partition])
        state.accept(pending_id(state), loss=None, shared_loss=None)
    state.heartbeat(slow.id, "c", {"activity": "training", "step": step, "steps": 100})
    return slow, granted(state, "a")


def test_a_straggler_is_backed_up_and_the_first_shard_counts(state: State, clock: Clock) -> None:
    slow, backup = straggle(state, clock)
    assert (backup.partition, backup.backup, slow.backup) == (2, True, False)
    assert granted(state, "a").id == backup.id
    assert state.grant("b") is None  # One backup is enough.
    assert state.heartbeat(slow.id, "c", {}) == state.heartbeat(backup.id, "a", {}) == ("continue", "")
    submit(state, backup, "z")
    assert state.heartbeat(slow.id, "c", {})[0] == "continue"
    state.accept(pending_id(state), loss=None, shared_loss=None)
    assert state.heartbeat(slow.id, "c", {}) == ("abandon", ELSEWHERE)
    assert state.counts().complete


def test_whoever_is_nearly_done_is_not_backed_up(state: State, clock: Clock) -> None:
    with pytest.raises(AssertionError):
        straggle(state, clock, step=90)


def test_the_first_to_be_accepted_is_no_measure_for_the_others(state: State, clock: Clock) -> None:
    leases = {node: granted(state, node) for node in "abc"}
    clock.now += 30
    submit(state, leases["a"], "x")
    state.accept(pending_id(state), loss=None, shared_loss=None)
    for node in "bc":  # They will need 75 seconds, and 45 more: longer than a took, but not longer than a node that begins now.
        state.heartbeat(leases[node].id, node, {"activity": "training", "step": 40, "steps": 100})
    assert state.grant("d") is None


def test_a_node_that_never_gets_there_is_backed_up_whatever_it_says(state: State, clock: Clock) -> None:
    with pytest.raises(AssertionError):
        straggle(state, clock, step=99)
    for _ in range(6):
        clock.now += 30
        lease = next(partition for partition in state.partitions() if partition.state == "leased")
        assert lease.node_id == "c"
        state.heartbeat(granted(state, "c").id, "c", {"activity": "training", "step": 99, "steps": 100})
    assert granted(state, "a").backup


@pytest.mark.parametrize("how", ["expired", "released", "revoked", "rejected"])
def test_a_backup_takes_the_place_of_the_lease_that_ends(state: State, clock: Clock, how: str) -> None:
    slow, backup = straggle(state, clock)
    if how == "expired":
        clock.now += LEASE_SECONDS - 1
        state.heartbeat(backup.id, "a", {})
        clock.now += 2
    elif how == "released":
        state.release(slow.id, "c")
    elif how == "revoked":
        state.revoke("c")
    else:
        submit(state, slow, "z")
        state.reject(pending_id(state), ["bad"])
    assert state.counts().leased == 1
    assert (state.partitions()[2].node_id, granted(state, "a").backup) == ("a", False)
    state.release(backup.id, "a")
    assert states(state)[2] == "open"


def test_a_backup_that_gives_up_leaves_the_first_lease_alone(state: State, clock: Clock) -> None:
    slow, backup = straggle(state, clock)
    state.release(backup.id, "a")
    assert state.heartbeat(slow.id, "c", {})[0] == "continue"
    assert state.partitions()[2].node_id == "c"


def left(step: int, name: str = "c") -> CheckpointRecord:
    return CheckpointRecord(sha256=format(step, "063x") + name, size=7, step=step)


def test_the_next_node_goes_on_from_what_was_left_furthest(state: State) -> None:
    lease = granted(state, "a")
    assert state.inherited(lease.id) is None
    assert state.release(lease.id, "a", left(5))
    assert not state.release(lease.id, "a", left(6))  # Once.
    second = granted(state, "b")
    assert (second.partition, state.inherited(second.id)) == (0, left(5))
    assert not state.release(second.id, "b", left(4))
    third = granted(state, "b")
    assert state.inherited(third.id) == left(5)
    assert state.release(third.id, "b", left(9))
    assert state.stale_checkpoints() == [left(5).sha256]
    assert (state.checkpoint_size(left(5).sha256), state.checkpoint_size(left(9).sha256)) == (None, 7)
    submit(state, granted(state, "b"), "x")
    state.accept(pending_id(state), loss=None, shared_loss=None)
    assert set(state.stale_checkpoints()) == {left(5).sha256, left(9).sha256}


def test_a_bad_checkpoint_is_blamed_on_who_left_it(state: State) -> None:
    for attempt in range(MAX_REJECTIONS):
        state.register_node(f"h{attempt}", bytes(32), "hostile", {})
        lease = granted(state, f"h{attempt}", 0)
        assert state.may_hand_over(f"h{attempt}") and state.release(lease.id, f"h{attempt}", left(attempt + 1))
        misled = granted(state, "a", 0)
        assert state.inherited(misled.id) == left(attempt + 1)
        submit(state, misled, format(attempt, "064x"))
        state.reject(pending_id(state), ["bad"])
        assert not state.may_hand_over(f"h{attempt}")
    last = granted(state, "a", 0)
    assert last.partition == 0 and state.inherited(last.id) is None
    assert state.nodes()[0].rejected == 0


def test_nobody_goes_on_from_what_a_revoked_node_left(state: State) -> None:
    for partition, node in enumerate("ab"):
        assert state.release(granted(state, node, partition).id, node, left(partition + 1, node))
    heir = granted(state, "c", 0)
    assert state.inherited(heir.id) == left(1, "a")
    state.revoke("a")
    assert state.inherited(heir.id) is None and state.stale_checkpoints() == [left(1, "a").sha256]
    state.release(heir.id, "c")
    assert state.inherited(granted(state, "c", 0).id) is None
    assert state.inherited(granted(state, "b", 1).id) == left(2, "b")


class Partitions(RuleBasedStateMachine):
    """Whatever happens in whatever order: every partition is accepted at most once, and none is ever lost."""

    leases = Bundle("leases")
    nodes = st.sampled_from("abc")

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.clock = Clock()
        self.state = self.open()
        self.state.open_partitions([{"partition": k, "tokens": 1} for k in range(2)])
        for node in "abc":
            self.state.register_node(node, node.encode() * 32, node, {})
        self.accepted: dict[int, str] = {}
        self.released: set[str] = set()

    def open(self) -> State:
        return State(Path(self.directory.name) / "forge.db", lease_seconds=LEASE_SECONDS, clock=self.clock)

    @rule(target=leases, node=nodes, preferred=st.lists(st.integers(0, 2), max_size=2))
    def grant(self, node: str, preferred: list[int]) -> Any:
        lease = self.state.grant(node, preferred)
        assert lease is None or lease.partition not in self.accepted
        return lease

    @rule(lease=leases, step=st.integers(0, 9))
    def heartbeat(self, lease: LeaseRecord | None, step: int) -> None:
        if lease is not None:
            told = {"activity": "training", "step": step, "steps": 9}
            order, reason = self.state.heartbeat(lease.id, lease.node_id, told)
            assert order == "continue" or reason
            if order == "continue" and not reason:
                assert self.state.lease(lease.id, lease.node_id).ended is None

    @rule(lease=consumes(leases), step=st.integers(0, 9))
    def release(self, lease: LeaseRecord | None, step: int) -> None:
        if lease is not None:
            self.state.release(lease.id, lease.node_id, left(step) if step else None)

    @rule(lease=leases, sha=st.sampled_from("xyz"))
    def commit(self, lease: LeaseRecord | None, sha: str) -> None:
        if lease is not None:
            judged_bad = self.state.lease(lease.id, lease.node_id).ended in ("rejected", "misled")
            try:
                receipt = submit(self.state, lease, sha)
            except ProtocolError:
                assert lease.partition not in self.accepted
                return
            held = self.accepted.get(lease.partition)
            assert (receipt.verdict == "accepted") == (held == SHA[sha] and not judged_bad)
            assert submit(self.state, lease, sha).verdict == receipt.verdict

    @rule(good=st.booleans(), judged=st.booleans())
    def judge(self, good: bool, judged: bool) -> None:
        shard = self.state.next_pending()
        if shard is None:
            return
        if good:
            assert self.state.accept(shard.id, loss=1.0, shared_loss=2.0)
            assert shard.partition not in self.accepted
            self.accepted[shard.partition] = shard.sha256
        else:
            self.state.reject(shard.id, ["bad"], judged=judged)

    @rule(seconds=st.sampled_from([1.0, LEASE_SECONDS + 1]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def restart(self) -> None:
        self.state.close()
        self.state = self.open()
        self.state.extend_leases()

    @invariant()
    def accepted_once_and_never_lost(self) -> None:
        accepted = self.state.accepted_shards()
        assert {shard.partition: shard.sha256 for shard in accepted} == self.accepted
        assert len(accepted) == len(self.accepted)

    @invariant()
    def every_partition_is_somewhere(self) -> None:
        counts = self.state.counts()
        assert counts.total == 2
        for partition in self.state.partitions():
            if partition.state == "open":
                assert partition.node_name == ""
            else:
                assert partition.node_name != ""
            assert (partition.state == "accepted") == (partition.id in self.accepted)

    def teardown(self) -> None:
        self.state.close()
        self.directory.cleanup()


TestPartitions = Partitions.TestCase
TestPartitions.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
