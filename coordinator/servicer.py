"""The wire: protobuf messages to plain values and back, errors to statuses. The server's only file with messages.

A `ForgeError` becomes a status with its sentence and its code in the trailing metadata (`forge-error-code`); its detail
and everything unexpected go to the log and never to the peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
import logging
from typing import Any, NoReturn

import grpc
from modularforge.v1 import admin_pb2, admin_pb2_grpc, fleet_pb2_grpc
from modularforge.v1 import fleet_pb2 as pb

from coordinator import handlers
from coordinator.auth import CredentialError
from coordinator.blobs import UploadInterruptedError
from coordinator.handlers import Desk, InvalidRequestError, NotPublishedError
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
from forge.errors import ForgeError, StorageError
from forge.vocabulary import PROTOCOL_VERSION

#: Full names of the services, for the health check.
SERVICES = tuple(file.services_by_name[name].full_name for file, name in (
    (pb.DESCRIPTOR, "FleetService"), (admin_pb2.DESCRIPTOR, "AdminService")))  # fmt: skip
CREDENTIAL_KEY = "forge-credential"
ERROR_KEY = "forge-error-code"

#: The first class that an error belongs to decides. ABORTED asks the node to try again: its work must not be lost
#: because this machine's disk is full or a stream was overtaken.
_STATUS: tuple[tuple[type[ForgeError], grpc.StatusCode], ...] = (
    (CredentialError, grpc.StatusCode.UNAUTHENTICATED),
    (InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotPublishedError, grpc.StatusCode.NOT_FOUND),
    (UploadInterruptedError, grpc.StatusCode.ABORTED),
    (StorageError, grpc.StatusCode.ABORTED),
    (ForgeError, grpc.StatusCode.FAILED_PRECONDITION),
)
#: Sent instead of a `StorageError`'s own sentence, which names paths of this machine.
STORAGE_SENTENCE = "the coordinator cannot use its disk or database just now; its operator sees why"

_VERDICTS = {"pending": pb.Receipt.VERDICT_PENDING, "accepted": pb.Receipt.VERDICT_ACCEPTED,
             "rejected": pb.Receipt.VERDICT_REJECTED}  # fmt: skip
_ORDERS = {"continue": pb.HeartbeatResponse.ORDER_CONTINUE, "finish": pb.HeartbeatResponse.ORDER_FINISH,
           "abandon": pb.HeartbeatResponse.ORDER_ABANDON}  # fmt: skip

_log = logging.getLogger(__name__)


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
        self._report = report

    @contextmanager
    def _answering(self, context: grpc.ServicerContext) -> Iterator[None]:
        try:
            yield
        except ForgeError as error:
            self._refuse(context, error)
        except Exception:
            if not context.is_active():
                raise  # The peer went away in the middle: there is nobody to answer, and gRPC ends the call.
            _log.exception("a call failed")
            self._report("a call from a node failed unexpectedly; the log says why")
            context.abort(grpc.StatusCode.INTERNAL, "The coordinator failed to answer; its log says why.")

    def _refuse(self, context: grpc.ServicerContext, error: ForgeError) -> NoReturn:
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        sentence = str(error)
        if isinstance(error, StorageError):
            self._report(sentence)
            sentence = STORAGE_SENTENCE
        context.set_trailing_metadata(((ERROR_KEY, error.code),))
        context.abort(status, sentence)
        raise AssertionError("abort raises")

    def _node(self, context: grpc.ServicerContext) -> NodeRecord:
        given = next((value for key, value in context.invocation_metadata() if key == CREDENTIAL_KEY), "")
        return handlers.authenticate(self._desk, given if isinstance(given, str) else "")


class FleetServicer(_Servicer, fleet_pb2_grpc.FleetServiceServicer):
    """What nodes call."""

    def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        """Register a node."""
        with self._answering(context):
            joined = handlers.join(JoinRequest(
                protocol_version=request.protocol_version, public_key=request.public_key, name=request.name,
                machine=_machine(request.machine)), self._desk)  # fmt: skip
            return pb.JoinResponse(node_id=joined.node_id, credential=joined.credential, run=_summary(joined.run))

    def Lease(self, request: pb.LeaseRequest, context: Any) -> pb.LeaseResponse:
        """Give work, or say what is waited for."""
        with self._answering(context):
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
        with self._answering(context):
            answer = handlers.heartbeat(
                HeartbeatRequest(lease_id=request.lease_id, progress=_progress(request.progress)),
                self._node(context), self._desk)  # fmt: skip
            return pb.HeartbeatResponse(order=_ORDERS[answer.order], reason=answer.reason)

    def FetchBlob(self, request: pb.FetchBlobRequest, context: Any) -> Iterator[pb.FetchBlobResponse]:
        """Send a published blob."""
        with self._answering(context):
            self._node(context)
            for chunk in handlers.fetch_blob(request.sha256, request.offset, self._desk):
                yield pb.FetchBlobResponse(data=chunk)

    def OpenUpload(self, request: pb.OpenUploadRequest, context: Any) -> pb.OpenUploadResponse:
        """Say where an upload goes on."""
        with self._answering(context):
            opened = handlers.open_upload(
                OpenUploadRequest(lease_id=request.lease_id, sha256=request.sha256, size=request.size),
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
        with self._answering(context):
            receipt = handlers.commit(
                CommitRequest(lease_id=request.lease_id, sha256=request.sha256, manifest=request.manifest,
                              signature=request.signature), self._node(context), self._desk)  # fmt: skip
            return pb.CommitResponse(receipt=_receipt(receipt))

    def Release(self, request: pb.ReleaseRequest, context: Any) -> pb.ReleaseResponse:
        """Take a lease back."""
        with self._answering(context):
            handlers.release(request.lease_id, self._node(context), self._desk)
            return pb.ReleaseResponse()


class AdminServicer(_Servicer, admin_pb2_grpc.AdminServiceServicer):
    """What an operator calls."""

    def GetStatus(self, request: admin_pb2.GetStatusRequest, context: Any) -> admin_pb2.GetStatusResponse:
        """Tell the whole state of the run."""
        with self._answering(context):
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
                             for experts, mean, pooled in status.evaluations])  # fmt: skip


def _chunks(first: pb.UploadRequest, rest: Iterator[pb.UploadRequest]) -> Iterator[bytes]:
    yield first.data
    for message in rest:
        yield message.data


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
        shared_ffn=_blob(work.shared_ffn), train_tokens=_blob(work.train_tokens)))  # fmt: skip


def _blob(blob: Blob) -> pb.Blob:
    return pb.Blob(sha256=blob.sha256, size=blob.size)


def _receipt(receipt: Receipt) -> pb.Receipt:
    return pb.Receipt(sha256=receipt.sha256, partition=receipt.partition, verdict=_VERDICTS[receipt.verdict],
                      reasons=receipt.reasons)  # fmt: skip
