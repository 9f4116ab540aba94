"""What the coordinator answers: plain requests in, plain answers or a `ForgeError` out. No wire, no threads, no clock.

Everything a peer sends is bounded here before it is used or stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
import json
import math
import re
import time
from typing import Any

from coordinator.activity import LONGEST_WAIT_SECONDS, SHORTEST_WAIT_SECONDS, Activity
from coordinator.audits import Audits
from coordinator.auth import CredentialError, Credentials
from coordinator.blobs import Uploads
from coordinator.curves import Curves
from coordinator.messages import (
    Assignment,
    Blob,
    CommitRequest,
    Done,
    HeartbeatAnswer,
    HeartbeatRequest,
    Joined,
    JoinRequest,
    LeaseRequest,
    Machine,
    OpenUploadRequest,
    Progress,
    RunSummary,
    Status,
    UploadOpened,
    Wait,
)
from coordinator.publication import Publication
from coordinator.quotas import Quotas
from coordinator.records import TRAINING, CheckpointRecord, Counts, NodeRecord, Receipt
from coordinator.snapshot import Snapshots
from coordinator.state import BEATS, State
from forge.checkpoint.handover import check_checkpoint
from forge.checkpoint.manifest import MAX_MANIFEST_BYTES, check_manifest
from forge.config import RunConfig
from forge.errors import AccessError, ProtocolError, ShardError
from forge.files import RunDirectory
from forge.signature import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, node_id_of, verify_signature
from forge.vocabulary import CHUNK_BYTES, PROTOCOL_VERSION, SMALLEST_CHUNK_BYTES

#: Bounds of what a peer may send: characters of a word about its machine, and entries of a list.
MAX_WORD, MAX_LIST = 200, 4096
MAX_NAME = 64
#: Largest integer that every database holds.
MAX_INTEGER = (1 << 63) - 1
#: Seconds until a node that waits for somebody's verdict asks again.
VERDICT_WAIT_SECONDS = 2.0
#: Questions for work in a second, at most, when every node of the run waits: each costs 2 ms of a processor.
WAITING_CALLS_PER_SECOND = 100.0

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LEASE_ID = re.compile(r"[0-9a-f]{32}")


class InvalidRequestError(ProtocolError):
    """A request that no node of ours sends."""


class NotPublishedError(ProtocolError):
    """A blob that this run does not publish."""


@dataclass(frozen=True)
class Desk:
    """What the handlers work with."""

    config: RunConfig
    run: RunDirectory
    run_id: str
    publication: Publication
    state: State
    uploads: Uploads
    credentials: Credentials
    activity: Activity
    clock: Callable[[], float]
    quotas: Quotas
    note: Callable[..., None]
    """Records an event: its name, a sentence for whoever watches, and its facts."""
    curves: Curves
    """The losses that heartbeats report."""
    snapshots: Snapshots
    """The run at one moment."""
    audits: Audits
    """Which shards' training is repeated in part."""
    told_done: dict[str, float] = field(default_factory=dict)
    """Nodes that know that nothing is left to do."""


def authenticate(desk: Desk, credential: str) -> NodeRecord:
    """The node that calls.

    Raises:
        CredentialError: the credential is not ours, or its node is not in this run's database.
        AccessError: the node was revoked.
    """
    node = desk.state.node(desk.credentials.check(credential[:MAX_WORD]))
    if node is None:
        raise CredentialError("This run does not know this node: join first.")
    return node


def join(request: JoinRequest, desk: Desk) -> Joined:
    """Register a node; the same key is always the same node.

    Raises:
        ProtocolError: the node speaks another version.
        InvalidRequestError: the key or the name is not one.
        AccessError: the node is not known and has no valid invitation, or it was revoked.
    """
    if request.protocol_version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"The coordinator speaks version {PROTOCOL_VERSION} of the protocol and this node version "
            f"{request.protocol_version}: install the same version of ModularForge on both.")  # fmt: skip
    if len(request.public_key) != PUBLIC_KEY_BYTES:
        raise InvalidRequestError(f"A public key has {PUBLIC_KEY_BYTES} bytes, and this one {len(request.public_key)}.")
    if request.public_key != request.proven_key:
        raise InvalidRequestError("The key of the message is not the one that the proof was made with.")
    if not (1 <= len(request.name) <= MAX_NAME and request.name.isprintable() and request.name.strip()):
        raise InvalidRequestError(f"A node's name has 1 to {MAX_NAME} printable characters: choose another one.")
    node_id = node_id_of(request.public_key)
    if desk.state.admit(node_id, request.public_key, request.name, _machine(request.machine), request.secret):
        desk.note("joined", f"{request.name} joined", node_id=node_id, name=request.name)
    return Joined(node_id=node_id, credential=desk.credentials.issue(node_id), run=summary(desk))


def summary(desk: Desk) -> RunSummary:
    """What the run is, and how far it got."""
    return RunSummary(
        run_id=desk.run_id, name=desk.config.name, config_fingerprint=desk.config.fingerprint,
        config_json=json.dumps(desk.config.model_dump(mode="json")), phase=desk.activity.snapshot().phase)  # fmt: skip


def lease(request: LeaseRequest, node: NodeRecord, desk: Desk) -> Assignment | Wait | Done:
    """Give work, or say what is waited for.

    Raises:
        InvalidRequestError: the list of preferred partitions is absurdly long.
    """
    if len(request.preferred_partitions) > MAX_LIST:
        raise InvalidRequestError(f"A node prefers at most {MAX_LIST} partitions.")
    counts = desk.state.counts()
    if counts.complete:
        desk.told_done[node.id] = time.monotonic()
        return Done(reason=f"all {counts.total} experts are accepted")
    desk.told_done.clear()  # Something is left again: a node was revoked with its shards.
    now = desk.activity.snapshot()
    if now.phase != "experts":
        return Wait(reason=f"the coordinator is {now.sentence}", retry_seconds=now.retry_seconds)
    granted = desk.state.grant(node.id, request.preferred_partitions)
    if granted is None:
        return _nothing_open(desk.state.counts(), desk.state.count_nodes())
    if granted.fresh:
        backup = ", whose node is slow, as well" if granted.backup else ""
        desk.note("leased", f"{node.name} trains expert {granted.partition}{backup}", node=node.name, lease_id=granted.id,
                  partition=granted.partition)  # fmt: skip
    facts, left = desk.publication.facts, desk.state.inherited(granted.id)
    partition = next(part for part in facts["partitions"] if part["partition"] == granted.partition)
    return Assignment(
        lease_id=granted.id, partition=granted.partition, partition_tokens=partition["tokens"],
        shared=_blob(facts["shared"]), shared_ffn=_blob(facts["shared_ffn"]), train_tokens=_blob(partition["train"]),
        checkpoint=None if left is None else Blob(sha256=left.sha256, size=left.size),
        heartbeat_seconds=desk.config.fleet.lease_seconds / BEATS)  # fmt: skip


def heartbeat(request: HeartbeatRequest, node: NodeRecord, desk: Desk) -> HeartbeatAnswer:
    """Keep a lease alive."""
    lease_id, progress = request.lease_id[:MAX_WORD], _progress(request.progress)
    order, reason = desk.state.heartbeat(lease_id, node.id, progress)
    if order != "abandon" and progress["activity"] == TRAINING and progress["loss"]:
        desk.curves.add(str(desk.state.lease(lease_id, node.id).partition), progress["step"], progress["loss"])
    return HeartbeatAnswer(order=order, reason=reason)


def release(lease_id: str, node: NodeRecord, desk: Desk, checkpoint: str = "") -> None:
    """Take a lease back, and the checkpoint of that sha256 for the next node, if it is one.

    Raises:
        ProtocolError: the lease is not this node's, or the checkpoint was not uploaded.
        ShardError: it is no checkpoint of this run.
        AccessError: a bad shard was made of what this node left before.
    """
    if not checkpoint:
        desk.state.release(lease_id[:MAX_WORD], node.id)
        return
    _check_ids(lease_id, checkpoint)
    held = desk.state.lease(lease_id, node.id)
    if held.ended is not None:
        return  # Asked again, or too late.
    _may_leave(desk)
    if not desk.state.may_hand_over(node.id):
        raise AccessError("A bad shard was made of a checkpoint that this node left before: it may leave no other one.")
    if not desk.run.blobs.has(checkpoint):
        raise ProtocolError(f"The upload of {checkpoint[:12]} is not complete: send the rest first.")
    path = desk.run.blobs.path(checkpoint)
    try:
        left = CheckpointRecord(sha256=checkpoint, size=path.stat().st_size, step=check_checkpoint(path, desk.config))
    except ShardError:
        desk.uploads.discard(lease_id, checkpoint)
        raise
    if desk.state.release(lease_id, node.id, left):
        desk.note("handed-over", f"{node.name} leaves expert {held.partition} at step {left.step:,} to the next",
                  node=node.name, partition=held.partition, step=left.step)  # fmt: skip


def fetch_blob(sha256: str, offset: int, chunk_bytes: int, node: NodeRecord, desk: Desk) -> Iterator[bytes]:
    """The bytes of a published blob from an offset on, in chunks of `chunk_bytes`, or of `CHUNK_BYTES` if that is 0.

    Raises:
        NotPublishedError: the run does not publish it.
        InvalidRequestError: the offset lies behind its end.
        QuotaError: with the first chunk: too much is on its way to this node.
    """
    size = desk.publication.sizes.get(sha256)
    if size is None and _SHA256.fullmatch(sha256):
        size = desk.state.checkpoint_size(sha256)
    if size is None:
        raise NotPublishedError("This run publishes no such file.")
    if offset > size:
        raise InvalidRequestError(f"The file {sha256[:12]} has {size:,} bytes: there is nothing at {offset:,}.")
    path = desk.run.blobs.path(sha256)
    size_of_chunk = min(CHUNK_BYTES, max(SMALLEST_CHUNK_BYTES, chunk_bytes or CHUNK_BYTES))

    def chunks() -> Iterator[bytes]:
        with desk.quotas.transfer(node.id, size - offset), open(path, "rb") as file:
            file.seek(offset)
            while chunk := file.read(size_of_chunk):
                yield chunk

    return chunks()


def open_upload(request: OpenUploadRequest, node: NodeRecord, desk: Desk) -> UploadOpened:
    """Say where an upload goes on.

    Raises:
        ProtocolError: the lease is not this node's, or the size is not a shard's.
        StorageError: the disk has no room.
    """
    _check_ids(request.lease_id, request.sha256)
    held = desk.state.lease(request.lease_id, node.id)
    if request.checkpoint:
        if request.sha256 not in desk.audits.wanted(held.id):
            if held.ended is not None:
                raise ProtocolError("This lease has ended: its checkpoint is not wanted any more.")
            _may_leave(desk)
        return UploadOpened(offset=desk.uploads.open(held, request.sha256, request.size, checkpoint=True))
    receipt = desk.state.receipt(request.lease_id, node.id, request.sha256)
    if receipt is not None:
        return UploadOpened(offset=request.size, receipt=receipt)
    return UploadOpened(offset=desk.uploads.open(held, request.sha256, request.size))


def upload(lease_id: str, sha256: str, offset: int, chunks: Iterable[bytes], node: NodeRecord, desk: Desk,
           cancel: Callable[[], object] | None = None) -> int:  # fmt: skip
    """Take the bytes of a shard as they come; how many are held then.

    Raises:
        ProtocolError: the lease is not this node's, or the bytes do not continue the upload.
        UploadInterruptedError: ask for the offset and go on.
        ShardError: what arrives is not what its sha256 says, again.
        StorageError: the disk is full.
        QuotaError: too much is on its way from this node.
    """
    _check_ids(lease_id, sha256)
    desk.state.lease(lease_id, node.id)
    with desk.quotas.transfer(node.id, desk.uploads.missing(sha256, offset)):
        return desk.uploads.write(sha256, offset, chunks, cancel)


def commit(request: CommitRequest, node: NodeRecord, desk: Desk) -> Receipt:
    """Take a shard in, or repeat the verdict on it.

    Raises:
        ProtocolError: the lease is not this node's, or the upload is not complete.
        ShardError: the manifest is not this node's word about this shard.
    """
    _check_ids(request.lease_id, request.sha256)
    held = desk.state.lease(request.lease_id, node.id)
    known = desk.state.receipt(request.lease_id, node.id, request.sha256)
    if known is not None:
        return _with_audit(known, request.lease_id, desk)
    if len(request.manifest) > MAX_MANIFEST_BYTES or len(request.signature) != SIGNATURE_BYTES:
        raise InvalidRequestError(f"A manifest has at most {MAX_MANIFEST_BYTES:,} bytes, and a signature "
                                  f"{SIGNATURE_BYTES}.")  # fmt: skip
    if not verify_signature(node.public_key, request.manifest, request.signature):
        raise ShardError("The manifest is not signed by this node's key.")
    said = check_manifest(request.manifest, {
        "run_id": desk.run_id, "partition": held.partition, "sha256": request.sha256, "lease_id": request.lease_id,
        "shared_sha256": desk.publication.facts["shared"]["sha256"], "config_fingerprint": desk.config.fingerprint})  # fmt: skip
    desk.audits.check(said)
    if not desk.run.blobs.has(request.sha256):
        raise ProtocolError(f"The upload of {request.sha256[:12]} is not complete: send the rest first.")
    size = desk.run.blobs.path(request.sha256).stat().st_size
    receipt = desk.state.submit(request.lease_id, node.id, sha256=request.sha256, size=size, manifest=request.manifest,
                                signature=request.signature)  # fmt: skip
    if receipt.verdict == "pending" and not receipt.reasons:  # Not when it waits behind another one, and asks again.
        desk.note("uploaded", f"{node.name} handed expert {held.partition} in", node=node.name, partition=held.partition,
                  sha256=request.sha256, size=size)  # fmt: skip
    return _with_audit(receipt, request.lease_id, desk)


def _with_audit(receipt: Receipt, lease_id: str, desk: Desk) -> Receipt:
    return replace(receipt, wanted=desk.audits.wanted(lease_id)) if receipt.verdict == "pending" else receipt


def _may_leave(desk: Desk) -> None:
    """Whether unfinished experts go from one node to the next: who audits wants the whole training from one node."""
    if desk.config.fleet.audit:
        raise ProtocolError("This run audits the training of its experts: an unfinished one is not handed over.")


def status(desk: Desk) -> Status:
    """The whole state of the run at this moment."""
    desk.state.counts()  # Lets overdue leases expire before they are shown.
    now, nodes = desk.activity.snapshot(), desk.state.nodes()
    evaluations = desk.state.read_evaluations(lambda experts, final, at, row: (
        experts, float(row.get("mean_perplexity") or math.nan), float(row.get("pooled_perplexity") or math.nan)))  # fmt: skip
    return Status(
        run=summary(desk), activity=now.sentence, partitions=tuple(desk.state.partitions()), nodes=tuple(nodes),
        progress=Progress(step=now.step, steps=now.steps, loss=now.loss or 0.0, resident_bytes=now.resident_bytes,
                          tokens_per_second=now.tokens_per_second or 0.0, activity=now.phase),
        idle_seconds=tuple(max(0.0, desk.clock() - node.seen_at) for node in nodes),
        evaluations=tuple(evaluations))  # fmt: skip


def _nothing_open(counts: Counts, nodes: int) -> Wait:
    if counts.open:
        return Wait(reason="what is open was tried by this node and rejected: another node must train it",
                    retry_seconds=LONGEST_WAIT_SECONDS)  # fmt: skip
    busy = [f"{counts.leased} being trained by other nodes"] if counts.leased else []
    busy += [f"{counts.uploaded} being validated"] if counts.uploaded else []
    retry = VERDICT_WAIT_SECONDS if counts.uploaded else counts.next_expiry or VERDICT_WAIT_SECONDS
    retry = min(max(retry, SHORTEST_WAIT_SECONDS), LONGEST_WAIT_SECONDS / 3)
    return Wait(reason=f"no partition is open: {counts.accepted} of {counts.total} accepted, {', '.join(busy)}",
                retry_seconds=max(retry, nodes / WAITING_CALLS_PER_SECOND))  # fmt: skip


def _check_ids(lease_id: str, sha256: str) -> None:
    if not (_LEASE_ID.fullmatch(lease_id) and _SHA256.fullmatch(sha256)):
        raise InvalidRequestError("A lease id has 32 and a sha256 has 64 hexadecimal digits.")


def _machine(machine: Machine) -> dict[str, Any]:
    return _storable(asdict(machine))


def _progress(progress: Progress) -> dict[str, Any]:
    return _storable(asdict(progress))


def _storable(facts: dict[str, Any]) -> dict[str, Any]:
    """Short printable words and numbers that JSON and every database hold: no NaN, nothing above 63 bits."""
    kept: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, str):
            kept[key] = "".join(c if c.isprintable() else "?" for c in value[:MAX_WORD])
        elif isinstance(value, float):
            kept[key] = value if math.isfinite(value) else 0.0
        else:
            kept[key] = min(int(value), MAX_INTEGER)
    return kept


def _blob(facts: dict[str, Any]) -> Blob:
    return Blob(sha256=facts["sha256"], size=int(facts["size"]))
