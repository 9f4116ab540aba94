"""Every call with whatever its message can hold, over real gRPC: an answer or one documented refusal, and nothing breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
import grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modularforge.v1 import admin_pb2, admin_pb2_grpc
from modularforge.v1 import fleet_pb2 as pb
import pytest

from forge.invitation import KEY_HEADER, PROOF_HEADER, SECRET_HEADER
from forge.vocabulary import PROTOCOL_VERSION

from .conftest import World
from .fakes import FakeNode, make_shard, sha256_of

#: What a node may be told. INTERNAL and UNKNOWN would be an exception that nobody foresaw.
DOCUMENTED = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND,
              grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.ABORTED,
              grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED}  # fmt: skip
FUZZ = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
TEXT = st.text(max_size=12) | st.sampled_from(["", "\0", "../../etc/passwd", "0" * 32, "f" * 64, "F" * 64, "é" * 300, "1" * 5000,
                                               "'; DROP TABLE nodes", "\x1b[2J", "\u202e", "\ud7ff"])  # fmt: skip
BYTES = st.binary(max_size=40) | st.sampled_from([b"", bytes(32), bytes(64), b"{}", b"[" * 5000, b'{"partition": 1e999}',
                                                  b"\xff\xfe", bytes(1 << 16)])  # fmt: skip
_WHOLE = {FieldDescriptor.TYPE_UINT32: (0, (1 << 32) - 1), FieldDescriptor.TYPE_UINT64: (0, (1 << 64) - 1),
          FieldDescriptor.TYPE_INT32: (-(1 << 31), (1 << 31) - 1), FieldDescriptor.TYPE_INT64: (-(1 << 63), (1 << 63) - 1)}


def values(field: FieldDescriptor, known: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Anything that a field can hold, and now and then what would be right in it."""
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        any_value: st.SearchStrategy[Any] = fields(field.message_type, known)
    elif field.type in _WHOLE:
        low, high = _WHOLE[field.type]
        any_value = st.integers(low, high) | st.sampled_from([low, high, 0, 1, 2, 3])
    elif field.type == FieldDescriptor.TYPE_BOOL:
        any_value = st.booleans()
    elif field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        any_value = st.floats(width=32)
    else:
        any_value = BYTES if field.type == FieldDescriptor.TYPE_BYTES else TEXT
    if field.name in known:
        any_value = st.just(known[field.name]) | any_value
    return st.lists(any_value, max_size=4) if field.is_repeated else any_value


def fields(message: Descriptor | None, known: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A message as keyword arguments, with any of its fields missing."""
    assert message is not None
    return st.fixed_dictionaries({}, optional={field.name: values(field, known) for field in message.fields})


def survives(call: Callable[[], Any]) -> None:
    """The call is answered, or refused as documented and in a sentence."""
    try:
        call()
    except grpc.RpcError as error:
        assert error.code() in DOCUMENTED, error
        said = error.details() or ""
        assert len(said) < 600 and "Traceback" not in said and "Exception" not in said, said


@pytest.fixture
def node(world: World) -> FakeNode:
    """A node with a lease and a half-sent shard, so that calls get as far as they can."""
    node = world.node("laptop")
    lease_id = node.lease(1).lease_id
    shard = make_shard(world.run, 1)
    node.open(lease_id, shard)
    node.send(lease_id, shard[:1000], sha256=sha256_of(shard))
    return node


def alive(node: FakeNode, world: World) -> None:
    """After all of that a shard of the same node is accepted, and the log knows of no unforeseen error."""
    node.join()
    assignment = node.lease()
    shard = make_shard(world.run, assignment.expert.partition)
    assert node.hand_in(assignment, shard, world.run_id).verdict != pb.Receipt.VERDICT_REJECTED
    assert not any("failed unexpectedly" in line for line in world.said), world.said


UNARY: dict[str, Any] = {"Lease": pb.LeaseRequest, "Heartbeat": pb.HeartbeatRequest, "OpenUpload": pb.OpenUploadRequest,
         "Commit": pb.CommitRequest, "Release": pb.ReleaseRequest}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_any_request(world: World, node: FakeNode, name: str) -> None:
    known = {"lease_id": node.lease().lease_id, "sha256": sha256_of(make_shard(world.run, 1)),
             "size": len(make_shard(world.run, 1))}  # fmt: skip

    @FUZZ
    @given(request=fields(UNARY[name].DESCRIPTOR, known))
    def fuzz(request: dict[str, Any]) -> None:
        survives(lambda: getattr(node.stub, name)(UNARY[name](**request), metadata=node.metadata, timeout=60))

    fuzz()
    alive(node, world)


def test_any_request_for_a_blob(world: World, node: FakeNode) -> None:
    known = {"sha256": node.lease().expert.shared.sha256}

    @FUZZ
    @given(request=fields(pb.FetchBlobRequest.DESCRIPTOR, known))
    def fuzz(request: dict[str, Any]) -> None:
        survives(lambda: list(node.stub.FetchBlob(pb.FetchBlobRequest(**request), metadata=node.metadata, timeout=60)))

    fuzz()
    alive(node, world)


def test_any_stream_of_chunks(world: World, node: FakeNode) -> None:
    known = {"lease_id": node.lease().lease_id, "sha256": sha256_of(make_shard(world.run, 1)), "offset": 1000}

    @FUZZ
    @given(requests=st.lists(fields(pb.UploadRequest.DESCRIPTOR, known), max_size=3))
    def fuzz(requests: list[dict[str, Any]]) -> None:
        def messages() -> Iterator[pb.UploadRequest]:
            yield from (pb.UploadRequest(**request) for request in requests)

        survives(lambda: node.stub.Upload(messages(), metadata=node.metadata, timeout=60))

    fuzz()
    alive(node, world)


def test_any_introduction(world: World, node: FakeNode) -> None:
    known = {"protocol_version": PROTOCOL_VERSION, "public_key": node.public_key, "name": "laptop"}
    right = dict(node.joining)

    @FUZZ
    @given(request=fields(pb.JoinRequest.DESCRIPTOR, known), headers=st.fixed_dictionaries(
        {}, optional={key: st.just(right[key]) | BYTES for key in (KEY_HEADER, PROOF_HEADER, SECRET_HEADER)}))  # fmt: skip
    def fuzz(request: dict[str, Any], headers: dict[str, bytes]) -> None:
        headers = {key: value[:4000] for key, value in headers.items()}
        survives(lambda: node.stub.Join(pb.JoinRequest(**request), metadata=tuple(headers.items()), timeout=60))

    fuzz()
    alive(node, world)


def test_any_credential(world: World, node: FakeNode) -> None:
    admin = admin_pb2_grpc.AdminServiceStub(node.channel)

    @FUZZ
    @given(credential=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60) | st.sampled_from(
        [node.credential[:-1], node.credential + ".", node.credential.upper(), ".", ""]))  # fmt: skip
    def fuzz(credential: str) -> None:
        calls: list[tuple[Any, Any]] = [(node.stub.Lease, pb.LeaseRequest()), (admin.GetStatus, admin_pb2.GetStatusRequest())]
        for call, request in calls:
            with pytest.raises(grpc.RpcError) as refused:
                call(request, metadata=(("forge-credential", credential),), timeout=60)
            assert refused.value.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)

    fuzz()
    alive(node, world)


@pytest.mark.parametrize("name", [*UNARY, "Join"])
def test_bytes_that_are_no_message(world: World, node: FakeNode, name: str) -> None:
    call = node.channel.unary_unary(f"/modularforge.v1.FleetService/{name}", request_serializer=bytes,
                                    response_deserializer=bytes)  # fmt: skip
    headers = node.joining if name == "Join" else node.metadata
    for raw in (b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0b" * 200, bytes(200_000)):
        with pytest.raises(grpc.RpcError) as refused:
            call(raw, metadata=headers, timeout=60)
        assert refused.value.code() in DOCUMENTED | {grpc.StatusCode.INTERNAL}  # INTERNAL is gRPC's own word for it.
        assert "Traceback" not in (refused.value.details() or "")
    alive(node, world)
