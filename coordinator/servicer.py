"""The wire: protobuf messages to plain values and back. The server's only file with messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
import itertools
import json
from typing import Any

import grpc
from modularforge.v1 import admin_pb2, admin_pb2_grpc, fleet_pb2_grpc
from modularforge.v1 import fleet_pb2 as pb

from coordinator import handlers
from coordinator.gate import CREDENTIAL_KEY
from coordinator.handlers import Desk, InvalidRequestError
from coordinator.messages import (
    Assignment,
    Blob,
    CommitRequest,
    Done,
    HeartbeatRequest,
    JoinRequest,
    LeaseRequest,
    Machine,
    OpenUploadRequest,
    Progress,
    RunSummary,
    Wait,
)
from coordinator.records import NodeRecord, Receipt
from coordinator.refusals import Refusals
from forge.invitation import KEY_HEADER, SECRET_HEADER
from forge.vocabulary import CHUNK_BYTES, PROTOCOL_VERSION

#: Bytes of a message that is not a chunk: the largest is a Commit with its manifest.
MAX_REQUEST_BYTES = 1 << 17

_VERDICTS = {"pending": pb.Receipt.VERDICT_PENDING, "accepted": pb.Receipt.VERDICT_ACCEPTED,
             "rejected": pb.Receipt.VERDICT_REJECTED}  # fmt: skip
_ORDERS = {"continue": pb.HeartbeatResponse.ORDER_CONTINUE, "abandon": pb.HeartbeatResponse.ORDER_ABANDON}


def register(server: grpc.Server, desk: Desk, report: Callable[[str], None]) -> None:
    """Offer both services on a server.

    Args:
        server: not started yet.
        desk: what the handlers work with.
        report: told in one sentence what only the operator may know, such as a full disk.
    """
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(FleetServicer(desk, report), server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(desk, report), server)


class _Servicer:
    def __init__(self, desk: Desk, report: Callable[[str], None]) -> None:
        self._desk = desk
        self._refusals = Refusals(report)

    @contextmanager
    def _answering(self, context: grpc.ServicerContext, request: Any = None) -> Iterator[None]:
        with self._refusals.answering(context):
            if request is not None and request.ByteSize() > MAX_REQUEST_BYTES:
                raise InvalidRequestError(f"A request has at most {MAX_REQUEST_BYTES:,} bytes.")
            yield

    def _node(self, context: grpc.ServicerContext) -> NodeRecord:
        return handlers.authenticate(self._desk, str(_header(context, CREDENTIAL_KEY) or ""))


class FleetServicer(_Servicer, fleet_pb2_grpc.FleetServiceServicer):
    """What nodes call."""

    def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        """Register a node."""
        with self._answering(context, request):
            joined = handlers.join(JoinRequest(
                protocol_version=request.protocol_version, public_key=request.public_key, name=request.name,
                machine=_machine(request.machine), proven_key=_header(context, KEY_HEADER) or b"",
                secret=_header(context, SECRET_HEADER)), self._desk)  # fmt: skip
            return pb.JoinResponse(node_id=joined.node_id, credential=joined.credential, run=_summary(joined.run))

    def Lease(self, request: pb.LeaseRequest, context: Any) -> pb.LeaseResponse:
        """Give work, or say what is waited for."""
        with self._answering(context, request):
            answer = handlers.lease(
                LeaseRequest(machine=_machine(request.machine),
                             preferred_partitions=tuple(request.preferred_partitions)),
                self._node(context), self._desk)  # fmt: skip
            if isinstance(answer, Wait):
                return pb.LeaseResponse(wait=pb.Wait(reason=answer.reason, retry_seconds=answer.retry_seconds))
            if isinstance(answer, Done):
                return pb.LeaseResponse(done=pb.Done(reason=answer.reason))
            return pb.LeaseResponse(assignment=_assignment(answer))

    def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:
        """Keep a lease alive."""
        with self._answering(context, request):
            answer = handlers.heartbeat(
                HeartbeatRequest(lease_id=request.lease_id, progress=_progress(request.progress)),
                self._node(context), self._desk)  # fmt: skip
            return pb.HeartbeatResponse(order=_ORDERS[answer.order], reason=answer.reason)

    def FetchBlob(self, request: pb.FetchBlobRequest, context: Any) -> Iterator[pb.FetchBlobResponse]:
        """Send a published blob."""
        with self._answering(context, request):
            for chunk in handlers.fetch_blob(request.sha256, request.offset, request.chunk_bytes,
                                             self._node(context), self._desk):  # fmt: skip
                yield pb.FetchBlobResponse(data=chunk)

    def OpenUpload(self, request: pb.OpenUploadRequest, context: Any) -> pb.OpenUploadResponse:
        """Say where an upload goes on."""
        with self._answering(context, request):
            opened = handlers.open_upload(
                OpenUploadRequest(lease_id=request.lease_id, sha256=request.sha256, size=request.size,
                                  checkpoint=request.checkpoint),
                self._node(context), self._desk)  # fmt: skip
            receipt = None if opened.receipt is None else _receipt(opened.receipt)
            return pb.OpenUploadResponse(offset=opened.offset, receipt=receipt)

    def Upload(self, request_iterator: Iterator[pb.UploadRequest], context: Any) -> pb.UploadResponse:
        """Take a shard's bytes as they come."""
        with self._answering(context):
            node = self._node(context)
            first = next(request_iterator, None)
            if first is None:
                raise InvalidRequestError("An upload brings at least one message.")
            held = handlers.upload(first.lease_id, first.sha256, first.offset, _chunks(first, request_iterator), node,
                                   self._desk, context.cancel)  # fmt: skip
            return pb.UploadResponse(offset=held)

    def Commit(self, request: pb.CommitRequest, context: Any) -> pb.CommitResponse:
        """Take a shard in, or repeat its verdict."""
        with self._answering(context, request):
            receipt = handlers.commit(
                CommitRequest(lease_id=request.lease_id, sha256=request.sha256, manifest=request.manifest,
                              signature=request.signature), self._node(context), self._desk)  # fmt: skip
            return pb.CommitResponse(receipt=_receipt(receipt))

    def Release(self, request: pb.ReleaseRequest, context: Any) -> pb.ReleaseResponse:
        """Take a lease back."""
        with self._answering(context, request):
            handlers.release(request.lease_id, self._node(context), self._desk, request.checkpoint_sha256)
            return pb.ReleaseResponse()


class AdminServicer(_Servicer, admin_pb2_grpc.AdminServiceServicer):
    """What an operator calls."""

    def GetStatus(self, request: admin_pb2.GetStatusRequest, context: Any) -> admin_pb2.GetStatusResponse:
        """Tell the whole state of the run."""
        with self._answering(context, request):
            status = handlers.status(self._desk)
            return admin_pb2.GetStatusResponse(
                run=_summary(status.run), activity=status.activity, stage_progress=_progress_message(status.progress),
                partitions=[admin_pb2.PartitionStatus(
                    partition=part.id, state=part.state, tokens=part.tokens, node_name=part.node_name,
                    progress=pb.Progress(**part.progress), loss=part.loss or 0.0, shared_loss=part.shared_loss or 0.0,
                    last_rejection=part.last_rejection) for part in status.partitions],
                nodes=[admin_pb2.NodeStatus(
                    node_id=node.id, name=node.name, machine=pb.MachineProfile(**node.machine), idle_seconds=idle,
                    accepted=node.accepted, rejected=node.rejected)
                    for node, idle in zip(status.nodes, status.idle_seconds, strict=True)],
                evaluations=[admin_pb2.EvaluationPoint(experts=experts, mean_perplexity=mean, pooled_perplexity=pooled)
                             for experts, mean, pooled in status.evaluations],
                snapshot_json=json.dumps(self._desk.snapshots.take()))  # fmt: skip


def _header(context: grpc.ServicerContext, name: str) -> Any:
    return next((value for key, value in context.invocation_metadata() if key == name), None)


def _chunks(first: pb.UploadRequest, rest: Iterator[pb.UploadRequest]) -> Iterator[bytes]:
    for message in itertools.chain((first,), rest):
        data = message.data  # Each look at it makes another copy.
        if len(data) > CHUNK_BYTES:
            raise InvalidRequestError(f"A chunk has at most {CHUNK_BYTES:,} bytes.")
        yield data


def _machine(message: pb.MachineProfile) -> Machine:
    return Machine(hostname=message.hostname, platform=message.platform, cores=message.cores, device=message.device,
                   memory_bytes=message.memory_bytes, ram_limit_bytes=message.ram_limit_bytes,
                   version=message.version)  # fmt: skip


def _progress(message: pb.Progress) -> Progress:
    return Progress(step=message.step, steps=message.steps, loss=message.loss, activity=message.activity,
                    tokens_per_second=message.tokens_per_second, resident_bytes=message.resident_bytes)  # fmt: skip


def _progress_message(progress: Progress) -> pb.Progress:
    return pb.Progress(**asdict(progress))


def _summary(run: RunSummary) -> pb.RunSummary:
    return pb.RunSummary(run_id=run.run_id, name=run.name, config_fingerprint=run.config_fingerprint,
                         config_json=run.config_json, phase=run.phase, protocol_version=PROTOCOL_VERSION)  # fmt: skip


def _assignment(work: Assignment) -> pb.Assignment:
    return pb.Assignment(lease_id=work.lease_id, heartbeat_seconds=work.heartbeat_seconds, expert=pb.ExpertWork(
        partition=work.partition, partition_tokens=work.partition_tokens, shared=_blob(work.shared),
        shared_ffn=_blob(work.shared_ffn), train_tokens=_blob(work.train_tokens),
        checkpoint=None if work.checkpoint is None else _blob(work.checkpoint)))  # fmt: skip


def _blob(blob: Blob) -> pb.Blob:
    return pb.Blob(sha256=blob.sha256, size=blob.size)


def _receipt(receipt: Receipt) -> pb.Receipt:
    return pb.Receipt(sha256=receipt.sha256, partition=receipt.partition, verdict=_VERDICTS[receipt.verdict],
                      reasons=receipt.reasons, wanted=receipt.wanted)  # fmt: skip
