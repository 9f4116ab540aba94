"""From errors to statuses: what a peer hears when it is refused.

A `ForgeError` becomes a status with its sentence and its code in the trailing metadata (`forge-error-code`); its detail
and everything unexpected go to the log and never to the peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import logging
from typing import Any, NoReturn

import grpc

from coordinator.auth import CredentialError
from coordinator.blobs import UploadInterruptedError
from coordinator.handlers import InvalidRequestError, NotPublishedError
from coordinator.quotas import QuotaError
from forge.errors import AccessError, ForgeError, StorageError
from forge.invitation import RETRY_HEADER

ERROR_KEY = "forge-error-code"

#: The first class that an error belongs to decides. ABORTED asks the node to try again: its work must not be lost
#: because this machine's disk is full or a stream was overtaken.
_STATUS: tuple[tuple[type[ForgeError], grpc.StatusCode], ...] = (
    (CredentialError, grpc.StatusCode.UNAUTHENTICATED),
    (AccessError, grpc.StatusCode.PERMISSION_DENIED),
    (QuotaError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotPublishedError, grpc.StatusCode.NOT_FOUND),
    (UploadInterruptedError, grpc.StatusCode.ABORTED),
    (StorageError, grpc.StatusCode.ABORTED),
    (ForgeError, grpc.StatusCode.FAILED_PRECONDITION),
)
#: Sent instead of a `StorageError`'s own sentence, which names paths of this machine.
STORAGE_SENTENCE = "the coordinator cannot use its disk or database just now; its operator sees why"

_log = logging.getLogger(__name__)


class Refusals:
    """Ends calls that cannot be answered.

    Args:
        report: told in one sentence what only the operator may know, such as a full disk.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report

    @contextmanager
    def answering(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Turn what the block raises into the end of the call."""
        try:
            yield
        except ForgeError as error:
            self.refuse(context, error)
        except Exception:
            if not context.is_active():
                raise  # The peer went away in the middle: there is nobody to answer, and gRPC ends the call.
            _log.exception("a call failed")
            self._report("a call from a node failed unexpectedly; the log says why")
            context.abort(grpc.StatusCode.INTERNAL, "The coordinator failed to answer; its log says why.")

    def refuse(self, context: grpc.ServicerContext, error: ForgeError) -> NoReturn:
        """End a call with an error's status and sentence."""
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        sentence = str(error)
        if isinstance(error, StorageError):
            self._report(sentence)
            sentence = STORAGE_SENTENCE
        trailing = [(ERROR_KEY, error.code)]
        if isinstance(error, QuotaError):
            trailing.append((RETRY_HEADER, f"{error.retry_seconds:.3f}"))
        context.set_trailing_metadata(tuple(trailing))
        context.abort(status, sentence)
        raise AssertionError("abort raises")

    def unread(self, error: ForgeError) -> grpc.RpcMethodHandler[Any, Any]:
        """A handler that refuses without reading what the peer sends: a stream is read only when it is asked for."""
        def refuse(_: Any, context: grpc.ServicerContext) -> NoReturn:
            self.refuse(context, error)

        return grpc.stream_unary_rpc_method_handler(refuse)
