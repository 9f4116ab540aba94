"""Who gets in, and what they may ask for, over real gRPC and TLS."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
import json
import threading
from typing import Any

from click.testing import CliRunner
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from modularforge.v1 import admin_pb2, admin_pb2_grpc
from modularforge.v1 import fleet_pb2 as pb
import pytest

from coordinator.auth import OPERATOR
from coordinator.authority import Authority
from coordinator.cli import main
from coordinator.quotas import Limits
from coordinator.serve import WORKERS
from forge.checkpoint.assembly import is_placeholder
from forge.files import claimed
from forge.invitation import RETRY_HEADER, SECRET_HEADER, Invitation
from forge.vocabulary import CHUNK_BYTES, PROTOCOL_VERSION, expert_file

from .conftest import World
from .fakes import FakeNode, invite, make_shard, sha256_of, until
from .test_service import refusal

DENIED, UNKNOWN = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED
ACCEPTED, PENDING = pb.Receipt.VERDICT_ACCEPTED, pb.Receipt.VERDICT_PENDING


def stranger(world: World, name: str, invitation: Invitation | None = None) -> FakeNode:
    assert world.coordinator is not None
    node = FakeNode(world.coordinator.address, name, world.root, invitation)
    world.nodes.append(node)
    return node


def operate(world: World, *command: str) -> str:
    done = CliRunner().invoke(main, [*command, "--run-dir", str(world.root)])
    assert done.exit_code == 0, done.output
    return done.stdout


def uses(world: World) -> list[tuple[int, str]]:
    assert world.coordinator is not None
    return [(row.used, row.state) for row in world.coordinator._desk.state.invitations()]


def test_who_has_no_valid_invitation_is_refused_and_told_why(world: World) -> None:
    invitation = invite(world.root)
    wrong = Invitation(addresses=invitation.addresses, fingerprint=invitation.fingerprint, secret=bytes(32))
    assert refusal(stranger(world, "a", wrong).join)[:2] == (DENIED, "access")
    assert "not one of this run" in refusal(stranger(world, "a", wrong).join)[2]
    node = stranger(world, "a")
    request = pb.JoinRequest(protocol_version=PROTOCOL_VERSION, public_key=node.public_key, name="a")
    bare = tuple(header for header in node.joining if header[0] != SECRET_HEADER)
    code, error, sentence = refusal(lambda: node.stub.Join(request, metadata=bare))
    assert (code, error) == (DENIED, "access") and "forge-coordinator token create" in sentence
    assert world.coordinator is not None and world.coordinator._desk.state.nodes() == []


def test_an_invitation_expires_is_used_up_and_can_be_revoked(world: World) -> None:
    once, twice, short = invite(world.root), invite(world.root, uses=2), invite(world.root, expires="1m")
    first = stranger(world, "a", once)
    assert first.join().node_id == first.join().node_id
    assert (1, "used up") in uses(world), "the same key takes one use, however often it asks"
    assert "good once and is used up" in refusal(stranger(world, "b", once).join)[2]
    assert stranger(world, "a", twice).join() and (0, "valid") in uses(world), "a known key needs no invitation"
    world.clock.now = 4e9  # seconds; the commands wrote real times
    assert "expired on" in refusal(stranger(world, "b", short).join)[2]
    world.clock.now = 0
    invitation_id = next(line.split()[0] for line in operate(world, "token", "list").splitlines() if "0/2" in line)
    assert "is revoked" in operate(world, "token", "revoke", invitation_id)
    assert "was revoked" in refusal(stranger(world, "b", twice).join)[2]
    assert first.ask().WhichOneof("answer"), "nodes that came before stay"
    gone = CliRunner().invoke(main, ["token", "revoke", "nothing", "--run-dir", str(world.root)])
    assert gone.exit_code == 3 and "There is no invitation 'nothing'" in gone.stderr


def test_two_nodes_cannot_both_take_the_last_use(world: World) -> None:
    invitation = invite(world.root, uses=3)
    nodes = [stranger(world, f"n{k}", invitation) for k in range(8)]
    barrier = threading.Barrier(len(nodes))

    def race(node: FakeNode) -> bool:
        barrier.wait()
        try:
            return bool(node.join())
        except grpc.RpcError as error:
            assert error.code() == DENIED
            return False

    with ThreadPoolExecutor(len(nodes)) as pool:
        assert sum(pool.map(race, nodes)) == 3
    assert uses(world) == [(3, "used up")]


def test_a_proof_for_another_coordinator_or_another_key_is_none(world: World, make_world: Callable[[], World]) -> None:
    elsewhere = Invitation(addresses=["x:1"], fingerprint=Authority(world.root / "other").fingerprint,
                           secret=invite(world.root).secret)  # fmt: skip
    assert "did not prove" in refusal(stranger(world, "a", elsewhere).join)[2]
    victim, thief = world.node("victim"), stranger(world, "thief")
    request = pb.JoinRequest(protocol_version=PROTOCOL_VERSION, public_key=victim.public_key, name="victim")
    assert refusal(lambda: thief.stub.Join(request, metadata=thief.joining))[0] == grpc.StatusCode.INVALID_ARGUMENT
    mixed = (victim.joining[0], *thief.joining[1:])
    assert "did not prove" in refusal(lambda: thief.stub.Join(request, metadata=mixed))[2]


def test_a_strangers_message_is_never_read(world: World) -> None:
    node, sent = stranger(world, "a"), 0

    def endless() -> Iterator[pb.UploadRequest]:
        nonlocal sent
        while sent < 200:
            sent += 1
            yield pb.UploadRequest(lease_id="x", sha256="y", data=bytes(CHUNK_BYTES))

    assert refusal(lambda: node.stub.Upload(endless(), metadata=node.metadata))[0] == UNKNOWN
    assert sent * CHUNK_BYTES < 10 << 20
    large = pb.JoinRequest(name="n" * (8 << 20))
    assert refusal(lambda: node.stub.Join(large))[:2] == (DENIED, "access")
    heavy = (("forge-credential", "x" * 20_000),)
    assert refusal(lambda: node.stub.Lease(pb.LeaseRequest(), metadata=heavy))[0] in (
        grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)  # fmt: skip
    assert stranger(world, "b").join()


def test_the_status_is_for_who_can_read_the_run_directory(world: World) -> None:
    node = world.node("laptop")
    admin = admin_pb2_grpc.AdminServiceStub(node.channel)
    for metadata in ((), node.metadata):
        ask = partial(admin.GetStatus, admin_pb2.GetStatusRequest(), metadata=metadata)
        assert refusal(ask)[:2] == (UNKNOWN, "protocol")
    assert world.coordinator is not None
    node.credential = world.coordinator._desk.credentials.issue(OPERATOR)
    assert admin.GetStatus(admin_pb2.GetStatusRequest(), metadata=node.metadata).run.name == "tiny"
    assert refusal(node.ask)[0] == UNKNOWN


def test_a_revoked_node_is_out_at_once_and_its_lease_is_open(world: World) -> None:
    node, other = world.node("laptop"), world.node("desktop")
    lease = node.lease(1)
    assert "laptop is revoked; its 0 accepted shards stay" in operate(world, "nodes", "revoke", "laptop")
    for call in (lambda: node.heartbeat(lease.lease_id), node.ask, node.join,
                 lambda: node.fetch(lease.expert.shared.sha256)):  # fmt: skip
        code, error, sentence = refusal(call)
        assert (code, error) == (DENIED, "access") and "was revoked by the coordinator's operator" in sentence
    assert other.lease(1).expert.partition == 1
    assert "revoked" in next(line for line in operate(world, "nodes", "list").splitlines() if " laptop " in line)
    unknown = CliRunner().invoke(main, ["nodes", "revoke", "nobody", "--run-dir", str(world.root)])
    assert unknown.exit_code == 3 and "There is no node 'nobody'" in unknown.stderr


def test_a_name_that_two_nodes_have_needs_an_id(world: World) -> None:
    first, second = world.node("laptop"), stranger(world, "other")
    second.name = "laptop"
    ids = {first.join().node_id, second.join().node_id}
    both = CliRunner().invoke(main, ["nodes", "revoke", "laptop", "--run-dir", str(world.root)])
    assert both.exit_code == 3 and all(node_id in both.stderr for node_id in ids)
    operate(world, "nodes", "revoke", second.join().node_id)
    assert refusal(second.ask)[0] == DENIED and first.ask()


def hand_in(world: World, node: FakeNode, partition: int) -> None:
    assignment, shard = node.lease(partition), make_shard(world.run, partition)
    node.hand_in(assignment, shard, world.run_id)
    assert node.verdict(assignment, shard, world.run_id).verdict == ACCEPTED


def test_accepted_shards_of_a_revoked_node_stay_or_leave_the_model(make_world: Callable[[], World]) -> None:
    world = make_world()
    coordinator = world.start(exit_when_done=False)
    bad, good = world.node("bad"), world.node("good")
    hand_in(world, good, 0)
    hand_in(world, bad, 1)
    hand_in(world, bad, 2)
    until(lambda: good.join().run.phase == "done")
    assert "experts 1, 2 leave the model" in operate(world, "nodes", "revoke", "bad", "--drop-shards")
    experts = [world.run.model / expert_file(k) for k in range(3)]
    until(lambda: [is_placeholder(path) for path in experts] == [False, True, True])
    until(lambda: good.join().run.phase == "experts")
    assert [part.state for part in coordinator._desk.state.partitions()] == ["accepted", "open", "open"]
    until(lambda: [row["experts"] for row in coordinator._desk.state.evaluations()] == [0, 1])
    world.stop()
    world.start()
    good = world.node("good")
    for partition in (1, 2):  # the very same bytes: what was wrong is who made them
        hand_in(world, good, partition)
    until(lambda: good.join().run.phase == "done")
    assert [is_placeholder(path) for path in experts] == [False] * 3


def test_shards_are_dropped_while_no_coordinator_runs(make_world: Callable[[], World]) -> None:
    world = make_world()
    world.start()
    bad = world.node("bad")
    hand_in(world, bad, 1)
    until(lambda: world.jobs.calls.count("evaluate") == 2)
    world.stop()
    with claimed(world.root):  # `forge run`, say
        refused = CliRunner().invoke(main, ["nodes", "revoke", "bad", "--drop-shards", "--run-dir", str(world.root)])
    assert refused.exit_code == 6 and "Another forge" in refused.stderr
    assert not is_placeholder(world.run.model / expert_file(1))
    said = operate(world, "nodes", "revoke", "bad", "--drop-shards")
    assert "expert 1 leaves the model and is trained anew" in said
    assert is_placeholder(world.run.model / expert_file(1))
    world.start()
    world.node("good")
    manifest = json.loads((world.run.model / "modularforge.json").read_text())
    assert [row["sha256"] for row in manifest["experts"]] == [None] * 3


def test_a_shard_that_waits_for_its_verdict_goes_with_its_node(make_world: Callable[[], World]) -> None:
    world = make_world()
    proceed = threading.Event()
    world.jobs.before = lambda what: None if what != "validate" else (proceed.wait(20), None)[1]
    world.start()
    node = world.node("laptop")
    assignment, shard = node.lease(1), make_shard(world.run, 1)
    assert node.hand_in(assignment, shard, world.run_id).verdict == PENDING
    until(lambda: "validate" in world.jobs.calls)
    operate(world, "nodes", "revoke", "laptop")
    proceed.set()
    other = world.node("desktop")
    assert other.lease(1).expert.partition == 1
    assert not any("is accepted" in line for line in world.said)


def test_too_many_calls_are_told_when_to_come_again(make_world: Callable[[], World]) -> None:
    world = make_world()
    world.start(limits=Limits(calls_per_second=0.5, burst=100))
    node, other = world.node("busy"), world.node("quiet")
    with pytest.raises(grpc.RpcError) as caught:
        for _ in range(1000):  # A slow machine gives some back meanwhile.
            node.ask()
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and "more than" in error.details()
    assert 1.0 <= float(dict(error.trailing_metadata())[RETRY_HEADER]) <= 2.0
    assert other.ask()


def test_an_invitation_gives_its_uses_times_what_a_node_may_have(make_world: Callable[[], World]) -> None:
    """So the quota of an invitation is bounded by `--uses`: leases, calls and bytes are counted for each of its nodes."""
    world = make_world()
    world.start(limits=Limits(calls_per_second=0.01, burst=40))
    until(lambda: world.jobs.calls.count("evaluate"))
    invitation = invite(world.root, uses=2)
    first, second, third = (stranger(world, name, invitation) for name in ("ada", "ben", "eve"))
    first.join(), second.join()
    assert "used up" in refusal(third.join)[2]
    leases = until(lambda: {node.ask().assignment.lease_id for node in (first, second)} - {""})
    again = {node.lease().lease_id for node in (first, second)}
    assert len(leases) == 2 and again == leases, "one each, however often they ask"
    with pytest.raises(grpc.RpcError) as caught:
        for _ in range(60):
            first.ask()
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and second.ask()


def test_bytes_on_their_way_are_bounded_by_node(make_world: Callable[[], World]) -> None:
    world = make_world()
    world.start(limits=Limits(bytes_in_flight=4 * CHUNK_BYTES, retry_seconds=7.0))
    node, other = world.node("greedy"), world.node("modest")
    sha256 = node.lease(1).expert.train_tokens.sha256  # three chunks and a bit
    request = pb.FetchBlobRequest(sha256=sha256)
    running: Any = node.stub.FetchBlob(request, metadata=node.metadata)
    next(running)
    with pytest.raises(grpc.RpcError) as caught:
        node.fetch(sha256)
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert float(dict(error.trailing_metadata())[RETRY_HEADER]) == 7.0
    assert sha256_of(other.fetch(sha256)) == sha256
    running.cancel()
    until(lambda: _works(lambda: node.fetch(sha256)))


def test_transfers_leave_threads_for_small_calls(make_world: Callable[[], World]) -> None:
    assert Limits().transfers < WORKERS
    world = make_world()
    world.start(limits=Limits(transfers=1, retry_seconds=7.0))
    node, other = world.node("first"), world.node("second")
    sha256 = node.lease(1).expert.train_tokens.sha256
    running: Any = node.stub.FetchBlob(pb.FetchBlobRequest(sha256=sha256), metadata=node.metadata)
    next(running)
    with pytest.raises(grpc.RpcError) as caught:
        other.fetch(sha256)
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and "busy with 1 transfers" in error.details()
    assert float(dict(error.trailing_metadata())[RETRY_HEADER]) == 7.0
    running.cancel()
    until(lambda: _works(lambda: other.fetch(sha256)))


def test_one_node_has_a_few_of_all_transfers(world: World) -> None:
    node, other = world.node("greedy"), world.node("modest")
    request = pb.FetchBlobRequest(sha256=node.lease(1).expert.train_tokens.sha256)
    running: list[Any] = [node.stub.FetchBlob(request, metadata=node.metadata) for _ in range(Limits().own_transfers)]
    for call in running:
        next(call)
    assert "has 4 transfers under way" in refusal(lambda: node.fetch(request.sha256))[2]
    assert sha256_of(other.fetch(request.sha256)) == request.sha256
    for call in running:
        call.cancel()
    until(lambda: _works(lambda: node.fetch(request.sha256)))


@contextmanager
def silent(node: FakeNode, method: str, metadata: Any, number: int) -> Iterator[list[Any]]:
    """So many calls that begin and never send their message."""
    over = threading.Event()

    def never() -> Iterator[bytes]:
        over.wait()
        yield from ()

    begin: Any = node.channel.stream_unary(f"/modularforge.v1.FleetService/{method}", None, None)
    calls: list[Any] = [begin.future(never(), metadata=metadata) for _ in range(number)]
    try:
        yield calls
    finally:
        for call in calls:
            call.cancel()
        over.set()


@pytest.mark.parametrize("method", ["Upload", "FetchBlob", "Heartbeat", "Join"])
def test_one_node_has_a_few_of_all_threads(world: World, method: str) -> None:
    node, other, most = world.node("silent"), world.node("loud"), Limits().calls
    with silent(node, method, node.joining if method == "Join" else node.metadata, 3 * most) as calls:
        until(lambda: sum(call.done() for call in calls) == 2 * most)
        refused = [call.exception() for call in calls if call.done()]
        assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert all(float(dict(error.trailing_metadata())[RETRY_HEADER]) == 5.0 for error in refused)
        assert "has 8 calls that are not answered yet" in refusal(node.ask)[2] and other.ask()
    until(lambda: _works(node.ask))


def test_who_was_invited_and_does_not_join_keeps_nobody_else_out(make_world: Callable[[], World]) -> None:
    """Keys cost nothing: those that came with one invitation are counted together."""
    world = make_world()
    world.start(limits=Limits(joins=2))
    world.node("first")
    invitation = invite(world.root, uses=100)
    nodes = [stranger(world, f"n{number}", invitation) for number in range(4)]
    with ExitStack() as all_of_them:
        calls = [call for node in nodes for call in all_of_them.enter_context(silent(node, "Join", node.joining, 1))]
        until(lambda: sum(call.done() for call in calls) == 2)
        assert "This invitation has 2 calls" in refusal(stranger(world, "late", invitation).join)[2]
        assert stranger(world, "other").join() and world.nodes[0].join()
    late = stranger(world, "late", invitation)
    until(lambda: _works(late.join))


def test_only_what_nodes_and_operators_call_is_offered(world: World) -> None:
    node = world.node("laptop")
    watch = health_pb2_grpc.HealthStub(node.channel).Watch(health_pb2.HealthCheckRequest(), metadata=node.metadata)
    assert refusal(lambda: next(watch))[0] == grpc.StatusCode.UNIMPLEMENTED


def _works(call: Callable[[], object]) -> bool:
    try:
        return bool(call())
    except grpc.RpcError:
        return False


def test_a_secret_is_nowhere_but_with_who_was_invited(world: World) -> None:
    text = operate(world, "token", "create", "--uses", "2", "--name", "for ada").strip()
    secret = Invitation.parse(text).secret
    node = stranger(world, "ada", Invitation.parse(text))
    node.join()
    refusal(stranger(world, "x", Invitation(addresses=["y:1"], fingerprint=bytes(32), secret=secret)).join)
    forms = [secret, secret.hex().encode(), base64.b64encode(secret)[:-2], base64.urlsafe_b64encode(secret)[:-2],
             text.encode(), repr(secret)[2:-1].encode()]  # fmt: skip
    contents = {}
    for path in world.root.rglob("*"):
        with suppress(FileNotFoundError, IsADirectoryError):  # The coordinator works on: files come and go.
            contents[path] = path.read_bytes()
    assert {"forge.db", "events.jsonl"} <= {path.name for path in contents}
    assert not [path for path, content in contents.items() if any(form in content for form in forms)]
    assert not any(text in line for line in world.said)
    assert "for ada" in operate(world, "token", "list")


def test_invitations_can_be_made_before_the_first_start(make_world: Callable[[], World]) -> None:
    world = make_world()
    command = ["token", "create", "--run-dir", str(world.root), "--address", "192.0.2.1:7433"]
    text = CliRunner().invoke(main, command).stdout.strip()
    assert Invitation.parse(text).addresses == ("192.0.2.1:7433",)
    world.start()
    assert stranger(world, "early bird", Invitation.parse(text)).join()
