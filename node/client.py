"""The coordinator as seen from a node: the only file of the node that touches the generated messages.

Plain values in, plain values out (`node/messages.py`). What is transient is tried again, with a growing pause and a
line for the owner before every pause; what is not becomes the `ForgeError` that the coordinator named. A deadline is
about progress (no answer to a small question, no bytes of a stream), never about how long the whole may take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import hashlib
import math
import os
from pathlib import Path
import threading
import time
from typing import Any, TypeVar

import grpc
from modularforge.v1 import fleet_pb2 as pb
from modularforge.v1 import fleet_pb2_grpc
from tenacity import RetryCallState

from forge.errors import NetworkError, ProtocolError, storage_errors
from forge.files import hash_file
from forge.invitation import KEY_HEADER, PROOF_HEADER, SECRET_HEADER, proof_message
from forge.vocabulary import CHUNK_BYTES, PROTOCOL_VERSION, SMALLEST_CHUNK_BYTES
from node.connection import (
    MAX_SENTENCES,
    Patience,
    StalledError,
    Watchdog,
    asks_again,
    first_error,
    forge_error,
    is_transient,
    may_be_dead,
    printable,
    retrying,
    why,
)
from node.identity import Identity
from node.link import Link
from node.machine import MachineProfile
from node.messages import Assignment, Blob, Done, Joined, Order, Progress, Receipt, RunSummary, Verdict, Wait
from node.throttle import Throttle

#: Longest pause that a coordinator can ask for, between two heartbeats or two questions for work.
LONGEST_PAUSE_SECONDS = 3600.0

_VERDICTS = {
    pb.Receipt.VERDICT_PENDING: Verdict.PENDING,
    pb.Receipt.VERDICT_ACCEPTED: Verdict.ACCEPTED,
    pb.Receipt.VERDICT_REJECTED: Verdict.REJECTED,
}
_ORDERS = {
    pb.HeartbeatResponse.ORDER_FINISH: Order.FINISH,
    pb.HeartbeatResponse.ORDER_ABANDON: Order.ABANDON,
}

T = TypeVar("T")
OnBytes = Callable[[int, int], None]


class FleetClient:
    """One node's connection to its coordinator.

    Args:
        link: where the coordinator is and how it is known.
        identity: the node's key.
        name: the node's name, for people to read.
        ram_bytes: what the owner allows.
        on_wait: told in one sentence what is waited for, before every pause.
        version: the version of this software.
        patience: the waits.
        sleep: pauses for that many seconds.
        upload: how fast shards are sent.
        download: how fast files of the run are fetched.
    """

    def __init__(self, link: Link, *, identity: Identity, name: str, ram_bytes: int, on_wait: Callable[[str], None],
                 version: str = "", patience: Patience | None = None, sleep: Callable[[float], None] = time.sleep,
                 upload: Throttle | None = None, download: Throttle | None = None) -> None:  # fmt: skip
        self._link = link
        self._identity = identity
        self._name = name
        self._ram_bytes = ram_bytes
        self._version = version
        self._on_wait = on_wait
        self._patience = patience or Patience()
        self._sleep = sleep
        self._up, self._down = upload or Throttle(), download or Throttle()
        self._chunk = CHUNK_BYTES  # Bytes of a message of the next stream.
        self._credential = ""
        self._machine: MachineProfile | None = None
        self._run_id: str | None = None
        self._channel: grpc.Channel | None = None
        self._stub: Any = None

    @property
    def address(self) -> str:
        """Where the coordinator answers, `HOST:PORT`."""
        return self._link.address

    def close(self) -> None:
        """Close the connection."""
        if self._channel is not None:
            self._channel.close()

    def join(self, machine: MachineProfile) -> Joined:
        """Register this node; the same key always becomes the same node.

        Raises:
            NetworkError: nobody answers within `Patience.first_connection`, the first time.
            ProtocolError: the coordinator speaks another version.
            AccessError: it refuses this node, or is not the one that this node knows.
        """
        self._machine = machine
        limit = self._patience.first_connection if self._run_id is None else None
        response = self._retry("to join", self._join_once, limit)
        self._link.remember()
        return Joined(node_id=response.node_id, run=RunSummary(
            run_id=response.run.run_id, name=response.run.name, phase=response.run.phase,
            config_fingerprint=response.run.config_fingerprint, config_json=response.run.config_json))  # fmt: skip

    def lease(self, preferred_partitions: list[int]) -> Assignment | Wait | Done:
        """Ask for work; a node that holds a lease gets that one back."""
        assert self._machine is not None, "join first"
        request = pb.LeaseRequest(machine=self._profile(self._machine), preferred_partitions=preferred_partitions)
        response = self._unary("for work", "Lease", request)
        kind = response.WhichOneof("answer")
        if kind == "assignment":
            return _assignment(response.assignment)
        if kind == "wait":
            return Wait(reason=printable(response.wait.reason), retry_seconds=_seconds(response.wait.retry_seconds))
        if kind == "done":
            return Done(reason=printable(response.done.reason))
        raise ProtocolError(f"The coordinator at {self.address} answered with a kind of work that this node does not "
                            "know: update this node.")  # fmt: skip

    def heartbeat(self, lease_id: str, progress: Progress) -> tuple[Order, str]:
        """Report progress once, without trying again: the next heartbeat is the next try.

        Returns:
            The order, and the coordinator's reason for it.

        Raises:
            NetworkError: it was not answered.
            ForgeError: the coordinator refused it.
        """
        request = pb.HeartbeatRequest(lease_id=lease_id, progress=pb.Progress(
            step=progress.step, steps=progress.steps, loss=progress.loss, activity=progress.activity,
            tokens_per_second=progress.tokens_per_second, resident_bytes=progress.resident_bytes))  # fmt: skip
        try:
            response = self._with_credential(
                lambda: self._stub.Heartbeat(request, timeout=self._patience.unary, metadata=self._metadata()))
        except (grpc.RpcError, ValueError) as error:
            raise forge_error(error, self.address, "to note a heartbeat") from error
        return _ORDERS.get(response.order, Order.CONTINUE), printable(response.reason)

    def fetch_blob(self, sha256: str, size: int, target: Path, on_bytes: OnBytes | None = None) -> None:
        """Download a blob to `target`, going on from what `target`.part already holds.

        Args:
            sha256: hash (hex) that the content must have.
            size: its size in bytes.
            target: appears whole and verified, or not at all.
            on_bytes: called with (bytes held, size) after every chunk.

        Raises:
            StorageError: the disk is full or cannot be written.
            NetworkError: the content was damaged twice.
        """
        part = target.with_name(target.name + ".part")
        for last_try in (False, True):
            with storage_errors(target):
                part.parent.mkdir(parents=True, exist_ok=True)
                held = part.stat().st_size if part.exists() else 0
                if held > size:
                    part.unlink()
                    held = 0
                part.touch()
            begun, digest = held, hashlib.sha256()
            while held < size:
                offset = held
                held = self._retry(f"for the file {sha256[:12]}", lambda at=offset, into=digest: self._fetch(  # type: ignore[misc]
                    sha256, size, part, at, into, on_bytes))
            # Hashed as it came; what was there before is read again.
            if (hash_file(part) if begun else digest.hexdigest()) == sha256:
                with storage_errors(target):
                    os.replace(part, target)
                return
            with storage_errors(target):
                part.unlink()
            if not last_try:
                self._on_wait(f"the file {sha256[:12]} arrived damaged; downloading it again")
        raise NetworkError(f"The file {sha256[:12]} arrived damaged twice from {self.address}: tell the coordinator's "
                           "operator.")  # fmt: skip

    def open_upload(self, lease_id: str, sha256: str, size: int,
                    checkpoint: bool = False) -> tuple[int, Receipt | None]:  # fmt: skip
        """Bytes of the upload that the coordinator holds, and the receipt if the shard was already committed."""
        request = pb.OpenUploadRequest(lease_id=lease_id, sha256=sha256, size=size, checkpoint=checkpoint)
        response = self._unary("to open the upload", "OpenUpload", request)
        receipt = _receipt(response.receipt) if response.HasField("receipt") else None
        return int(response.offset), receipt

    def upload(self, lease_id: str, sha256: str, path: Path, on_bytes: OnBytes | None = None,
               checkpoint: bool = False) -> Receipt | None:  # fmt: skip
        """Send a shard, or a checkpoint, going on from what the coordinator already holds.

        Returns:
            The receipt if the shard had been committed before, else None.

        Raises:
            StorageError: the shard cannot be read.
            ShardError: the coordinator refuses the shard.
        """
        with storage_errors(path):
            size = path.stat().st_size
        held, delivered = -1, False

        def attempt() -> tuple[bool, Receipt | None]:
            nonlocal held, delivered
            offset, receipt = self.open_upload(lease_id, sha256, size, checkpoint)
            if receipt is not None or offset >= size:
                return True, receipt
            progressed = offset > held
            if delivered and not progressed:
                raise NetworkError(f"The coordinator at {self.address} took the shard's bytes but does not hold them: "
                                   "its log says why.")  # fmt: skip
            held, delivered = offset, False
            if offset:
                self._on_wait(f"the coordinator holds {offset:,} of the shard's {size:,} bytes; going on from there")
            try:
                self._send(lease_id, sha256, path, size, offset, on_bytes)
                delivered = True
            except (grpc.RpcError, StalledError) as error:
                if not (progressed and is_transient(error)):
                    raise
                self._on_wait(f"the upload was cut ({why(error)}); asking how much of it arrived")
            return False, None

        while True:
            done, receipt = self._retry("to take the shard", attempt)
            if done:
                return receipt

    def commit(self, lease_id: str, sha256: str, manifest: bytes, signature: bytes) -> Receipt:
        """Hand the uploaded shard in, or ask again for the verdict on it."""
        request = pb.CommitRequest(lease_id=lease_id, sha256=sha256, manifest=manifest, signature=signature)
        return _receipt(self._unary("for the receipt", "Commit", request).receipt)

    def release(self, lease_id: str, reason: str) -> None:
        """Give a lease back. One short try: a lease that is not given back expires by itself."""
        request = pb.ReleaseRequest(lease_id=lease_id, reason=reason)
        try:
            self._stub.Release(request, timeout=self._patience.goodbye, metadata=self._metadata())
        except (grpc.RpcError, ValueError):
            pass

    def hand_over(self, lease_id: str, checkpoint: Path, on_bytes: OnBytes | None = None) -> None:
        """Send a checkpoint for the next node, and give the lease back with it.

        Raises:
            ForgeError: the coordinator does not want it.
        """
        sha256 = hash_file(checkpoint)
        self.upload(lease_id, sha256, checkpoint, on_bytes, checkpoint=True)
        self._unary("to take the checkpoint", "Release", pb.ReleaseRequest(
            lease_id=lease_id, reason="handed over", checkpoint_sha256=sha256))  # fmt: skip

    # --- one attempt each -------------------------------------------------------------------------------------------

    def _join_once(self) -> pb.JoinResponse:
        assert self._machine is not None
        if self._channel is None:
            self._connect()
        key = self._identity.public_key
        request = pb.JoinRequest(protocol_version=PROTOCOL_VERSION, public_key=key, name=self._name,
                                 machine=self._profile(self._machine))  # fmt: skip
        headers = [(KEY_HEADER, key), (PROOF_HEADER, self._identity.sign(proof_message(self._link.ca_fingerprint)))]
        headers += [(SECRET_HEADER, self._link.secret)] if self._link.secret is not None else []
        response: pb.JoinResponse = self._stub.Join(request, timeout=self._patience.unary, metadata=headers)
        theirs = response.run.protocol_version
        if theirs != PROTOCOL_VERSION:
            raise ProtocolError(f"The coordinator at {self.address} speaks version {theirs} of the protocol and this "
                                f"node version {PROTOCOL_VERSION}: update the older of the two.")  # fmt: skip
        if self._run_id not in (None, response.run.run_id):
            raise ProtocolError(f"The coordinator at {self.address} now serves another run ({response.run.name!r}): "
                                   "run the same command again to join that one.")  # fmt: skip
        self._credential, self._run_id = response.credential, response.run.run_id
        return response

    def _with_credential(self, attempt: Callable[[], T]) -> T:
        """One attempt; a coordinator that has forgotten this node is joined again first."""
        try:
            return attempt()
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAUTHENTICATED or self._run_id is None:
                raise
        self._join_once()
        return attempt()

    def _fetch(self, sha256: str, size: int, part: Path, offset: int, digest: hashlib._Hash,
               on_bytes: OnBytes | None) -> int:  # fmt: skip
        """Append to `part`, and to `digest`, what one stream brings; returns the bytes held. A cut after some is no error."""
        held = offset
        request = pb.FetchBlobRequest(sha256=sha256, offset=offset, chunk_bytes=self._chunk)
        call: Any = self._stub.FetchBlob(request, metadata=self._metadata())
        with Watchdog(call, self._patience.stream) as watchdog, storage_errors(part), open(part, "ab") as file:
            try:
                with self._sized():
                    for message in call:
                        watchdog.alive()
                        data = message.data  # Each look at it makes another copy.
                        file.write(data)
                        digest.update(data)
                        self._down.take(len(data), watchdog.alive)
                        held += len(data)
                        if on_bytes is not None:
                            on_bytes(held, size)
                        if held > size:
                            break
            except grpc.RpcError as error:
                if held == offset or not is_transient(error):
                    raise
                self._on_wait(f"the download of {sha256[:12]} was cut at {held:,} of {size:,} bytes; going on")
            finally:
                call.cancel()
                file.flush()
                os.fsync(file.fileno())
        if held == offset or held > size:
            raise NetworkError(f"The coordinator at {self.address} sent {held} bytes of the file {sha256[:12]}, "
                               f"which has {size}: tell its operator.")  # fmt: skip
        return held

    def _send(self, lease_id: str, sha256: str, path: Path, size: int, offset: int, on_bytes: OnBytes | None) -> None:
        """Send one stream from `offset` to the end."""
        watched, chunk = threading.Event(), self._up.chunk(self._chunk)

        def messages() -> Iterator[pb.UploadRequest]:
            watched.wait()
            with open(path, "rb") as file:
                file.seek(offset)
                data, at = file.read(chunk), offset
                while data:
                    self._up.take(len(data), watchdog.alive)
                    first = at == offset
                    yield pb.UploadRequest(lease_id=lease_id if first else "", sha256=sha256 if first else "",
                                           offset=offset if first else 0, data=data)  # fmt: skip
                    at += len(data)
                    watchdog.alive()
                    if on_bytes is not None:
                        on_bytes(at, size)
                    data = file.read(chunk)

        call: Any = self._stub.Upload.future(messages(), metadata=self._metadata())
        with Watchdog(call, self._patience.stream) as watchdog, self._sized():
            watched.set()
            try:
                call.result()
            except grpc.FutureCancelledError as error:
                raise StalledError("no bytes for too long") from error
            finally:
                call.cancel()

    @contextmanager
    def _sized(self) -> Iterator[None]:
        """Halve the next stream's messages when this one breaks, double them when it does not.

        Nothing is kept of a message that was cut: where the line breaks more often than one gets through, smaller ones do.
        """
        try:
            yield
        except (grpc.RpcError, StalledError) as error:
            if is_transient(error) and not asks_again(error):
                self._chunk = max(SMALLEST_CHUNK_BYTES, self._chunk // 2)
            raise
        self._chunk = min(CHUNK_BYTES, 2 * self._chunk)

    # --- trying again -----------------------------------------------------------------------------------------------

    def _unary(self, what: str, method: str, request: Any) -> Any:
        return self._retry(what, lambda: getattr(self._stub, method)(
            request, timeout=self._patience.unary, metadata=self._metadata()))  # fmt: skip

    def _retry(self, what: str, attempt: Callable[[], T], limit: float | None = None) -> T:
        """Try until it works, `limit` seconds have passed, or the error is not a transient one."""
        try:
            tries = retrying(self._patience, limit, lambda state: self._before_pause(what, state), self._sleep)
            return tries(lambda: self._with_credential(attempt))
        except (grpc.RpcError, StalledError) as error:
            first = first_error(error, self.address, limit) if limit is not None else None
            raise first or forge_error(error, self.address, what) from error

    def _before_pause(self, what: str, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        pause = state.next_action.sleep if state.next_action is not None else 0.0
        if self._channel is not None and (may_be_dead(error) or self._link.moved()):
            old = self._channel
            self._connect()
            old.close()
        self._on_wait(
            f"waiting for the coordinator at {self.address} {what}: {why(error)}; trying again in {pause:.1f} s")

    def _connect(self) -> None:
        self._channel = self._link.open()
        self._stub = fleet_pb2_grpc.FleetServiceStub(self._channel)

    def _metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return (("forge-credential", self._credential),)

    def _profile(self, machine: MachineProfile) -> pb.MachineProfile:
        return pb.MachineProfile(hostname=machine.hostname, platform=machine.platform, cores=machine.cores,
                                 memory_bytes=machine.memory_bytes, ram_limit_bytes=self._ram_bytes,
                                 device=machine.device, version=self._version)  # fmt: skip


def _assignment(message: pb.Assignment) -> Assignment:
    if message.WhichOneof("work") != "expert":
        raise ProtocolError("The coordinator assigned a kind of work that this node does not know: update this node.")
    work = message.expert
    return Assignment(
        lease_id=message.lease_id, partition=work.partition, partition_tokens=work.partition_tokens,
        shared=_blob(work.shared), shared_ffn=_blob(work.shared_ffn), train_tokens=_blob(work.train_tokens),
        heartbeat_seconds=_seconds(message.heartbeat_seconds),
        checkpoint=_blob(work.checkpoint) if work.HasField("checkpoint") else None)  # fmt: skip


def _seconds(said: float) -> float:
    """A pause that the coordinator asks for, as one that can be waited: no NaN, nothing endless."""
    return min(max(said, 0.0), LONGEST_PAUSE_SECONDS) if math.isfinite(said) else 0.0


def _blob(message: pb.Blob) -> Blob:
    return Blob(sha256=message.sha256, size=message.size)


def _receipt(message: pb.Receipt) -> Receipt:
    reasons = tuple(printable(reason) for reason in message.reasons[:MAX_SENTENCES])
    return Receipt(sha256=message.sha256, partition=message.partition, reasons=reasons, wanted=tuple(message.wanted),
                   verdict=_VERDICTS.get(message.verdict, Verdict.PENDING))  # fmt: skip
