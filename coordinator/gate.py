"""The gate: who calls is known before a byte of what it sends is read.

A stranger's headers are bounded (8 KiB) and its messages are never asked for, so it costs a connection and what fits
into the connection's window. A node's message is waited for once its call is counted. What each method asks for:

    Health/Check             nothing; the answer is the same whatever the question
    FleetService/Join        a proof, made with the node's key, and that the key is known or the invitation valid
    FleetService/*           a node's credential, and that it is within its quota
    AdminService/*           the operator's credential, which is made from the run directory's secret
    everything else          is not offered
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
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
FLEET, ADMIN = "/modularforge.v1.FleetService/", "/modularforge.v1.AdminService/"
JOIN = f"{FLEET}Join"


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
            return self._counted(handler, lambda: self._join(headers))
        try:
            who = self._admit(method, headers)
        except ForgeError as error:
            return self._refusals.unread(error)
        return handler if who == OPERATOR else self._counted(handler, lambda: self._desk.quotas.answering(who))

    def _admit(self, method: str, headers: dict[str, Any]) -> str:
        given = str(headers.get(CREDENTIAL_KEY, ""))[:MAX_CREDENTIAL]
        who = self._desk.credentials.check(given)
        if (who == OPERATOR) != method.startswith(ADMIN):
            raise CredentialError("This credential is good for other calls than this one.")
        if who != OPERATOR:
            self._desk.quotas.call(who)
        return who

    def _join(self, headers: dict[str, Any]) -> AbstractContextManager[None]:
        """Look at the headers of who joins; counts the call."""
        key = headers.get(KEY_HEADER, b"")
        if not verify_signature(key, self._message, headers.get(PROOF_HEADER, b"")):
            raise AccessError("This node did not prove that it holds its key: install the same version of "
                              "ModularForge on both, and give --insecure to both or to neither.")  # fmt: skip
        node_id = node_id_of(key)
        who = self._desk.state.check_guest(node_id, headers.get(SECRET_HEADER))
        self._desk.quotas.call(node_id)
        return self._desk.quotas.answering(who, joins=who != node_id)

    def _counted(self, handler: Any, count: Callable[[], AbstractContextManager[None]]) -> grpc.RpcMethodHandler[Any, Any]:
        """Like the handler, but in its thread it is counted before the message is read, and until it is answered."""
        behavior = handler.unary_unary or handler.unary_stream or handler.stream_unary

        @contextmanager
        def message(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            with ExitStack() as counted:
                with self._refusals.answering(context):
                    counted.enter_context(count())
                    request = requests if handler.request_streaming else next(requests, None)
                    if request is None:
                        raise InvalidRequestError("This call brings a message.")
                yield request

        def answer(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            with message(requests, context) as request:
                return behavior(request, context)

        def answers(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            with message(requests, context) as request:
                yield from behavior(request, context)

        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(answers, handler.request_deserializer, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(answer, handler.request_deserializer, handler.response_serializer)


def _healthy(_: Any, context: grpc.ServicerContext) -> health_pb2.HealthCheckResponse:
    return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


def _serialize(answer: health_pb2.HealthCheckResponse) -> bytes:
    return bytes(answer.SerializeToString())
