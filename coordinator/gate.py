"""The gate: who calls is known before a byte of what it sends is read.

A stranger's headers are bounded (8 KiB) and its messages are never asked for, so it costs a connection and what fits
into the connection's window. What each method asks for:

    Health/Check             nothing; the answer is the same whatever the question
    FleetService/Join        a proof, made with the node's key, and that the key is known or the invitation valid
    AdminService/*           the operator's credential, which is made from the run directory's secret
    everything else          a node's credential, and that it is within its quota
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from coordinator.auth import OPERATOR, CredentialError
from coordinator.handlers import Desk, InvalidRequestError
from coordinator.refusals import Refusals
from forge.errors import AccessError, ForgeError
from forge.invitation import KEY_HEADER, PROOF_HEADER, SECRET_HEADER, proof_message
from forge.signature import node_id_of, verify_signature

CREDENTIAL_KEY = "forge-credential"
#: Characters of a credential; ours have 81.
MAX_CREDENTIAL = 200
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
JOIN, ADMIN = "/modularforge.v1.FleetService/Join", "/modularforge.v1.AdminService/"


class Gate(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """Stands before every service of a server.

    Args:
        desk: knows nodes, credentials and quotas.
        ca_fingerprint: what proofs are bound to; empty where nothing is encrypted.
        report: told in one sentence what only the operator may know.
    """

    def __init__(self, desk: Desk, ca_fingerprint: bytes, report: Callable[[str], None]) -> None:
        self._desk, self._message, self._refusals = desk, proof_message(ca_fingerprint), Refusals(report)

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        """The handler of a call, or one that refuses it."""
        handler, method = continuation(handler_call_details), handler_call_details.method
        if method == HEALTH_CHECK:
            return grpc.stream_unary_rpc_method_handler(_healthy, response_serializer=_serialize)
        if handler is None:
            return None
        headers = dict(handler_call_details.invocation_metadata)
        if method == JOIN:
            return self._join(handler, headers)
        try:
            self._admit(method, headers)
        except ForgeError as error:
            return self._refusals.unread(error)
        return handler

    def _admit(self, method: str, headers: dict[str, Any]) -> None:
        given = str(headers.get(CREDENTIAL_KEY, ""))[:MAX_CREDENTIAL]
        who = self._desk.credentials.check(given)
        if (who == OPERATOR) != method.startswith(ADMIN):
            raise CredentialError("This credential is good for other calls than this one.")
        if who != OPERATOR:
            self._desk.quotas.call(who)

    def _join(self, handler: Any, headers: dict[str, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """Like the handler, but it looks at the headers, in a thread of its own, before it reads the message."""
        def join(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            with self._refusals.answering(context):
                key = headers.get(KEY_HEADER, b"")
                if not verify_signature(key, self._message, headers.get(PROOF_HEADER, b"")):
                    raise AccessError("This node did not prove that it holds its key: install the same version of "
                                      "ModularForge on both, and give --insecure to both or to neither.")  # fmt: skip
                node_id = node_id_of(key)
                self._desk.state.check_guest(node_id, headers.get(SECRET_HEADER))
                self._desk.quotas.call(node_id)
                request = next(requests, None)
                if request is None:
                    raise InvalidRequestError("A node that joins says who it is.")
            return handler.unary_unary(request, context)

        return grpc.stream_unary_rpc_method_handler(join, handler.request_deserializer, handler.response_serializer)


def _healthy(_: Any, context: grpc.ServicerContext) -> health_pb2.HealthCheckResponse:
    return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


def _serialize(answer: health_pb2.HealthCheckResponse) -> bytes:
    return bytes(answer.SerializeToString())
