"""A coordinator that speaks the real protocol over a real socket, and a job that trains nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
import hashlib
import json
import os
from pathlib import Path
import threading
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
import grpc
from modularforge.v1 import fleet_pb2 as pb
from modularforge.v1 import fleet_pb2_grpc

from forge.config import parse_config
from forge.vocabulary import PROTOCOL_VERSION
from node.guest import Guest
from node.rules import Rules

CONFIG = parse_config({
    "model": {"vocab_size": 300, "d_model": 32, "d_ff": 64, "n_layers": 1, "n_heads": 2, "n_experts": 2, "top_k": 1,
              "max_seq_len": 16},
    "train": {"batch_size": 2, "shared": {"tokens": 1000}, "expert": {"tokens": 1000}},
})  # fmt: skip
PENDING, ACCEPTED, REJECTED = (
    pb.Receipt.VERDICT_PENDING, pb.Receipt.VERDICT_ACCEPTED, pb.Receipt.VERDICT_REJECTED)  # fmt: skip
CONTINUE, FINISH = pb.HeartbeatResponse.ORDER_CONTINUE, pb.HeartbeatResponse.ORDER_FINISH
ABANDON = pb.HeartbeatResponse.ORDER_ABANDON


class FakeCoordinator(fleet_pb2_grpc.FleetServiceServicer):
    """Leases `partitions` in order; its faults are counters and offsets that a test sets."""

    def __init__(self, partitions: int = 1, blob_bytes: int = 3 << 20) -> None:
        self.blobs: dict[str, bytes] = {}
        self.shared, self.ffn = (self._add(os.urandom(blob_bytes)) for _ in range(2))
        self.tokens = [self._add(os.urandom(1000)) for _ in range(partitions)]
        self.state = ["open"] * partitions
        self.left: pb.Blob | None = None  # what every assignment says that another node left
        self.on_chunk: Callable[[str], object] = lambda sha256: None  # before a chunk of that file is sent
        self.run_id, self.protocol_version = "run-1", PROTOCOL_VERSION
        self.credentials: set[str] = set()
        self.nodes: dict[str, bytes] = {}
        self.lease_holder: dict[str, tuple[str, int]] = {}
        self.uploads: dict[str, bytearray] = {}
        self.receipts: dict[str, pb.Receipt] = {}
        self.manifests: list[dict[str, Any]] = []
        self.verdicts = [ACCEPTED]  # one a shard; the last goes on for ever
        self.pending_answers = 0  # commits answered with "pending" before the verdict
        self.order = CONTINUE
        self.retry_seconds = 0.01
        self.steps: list[int] = []
        self.activities: list[str] = []
        self.preferred: list[list[int]] = []
        self.released: list[str] = []
        self.calls: list[str] = []
        self.fetch_offsets: list[int] = []
        self.fetch_chunks: list[int] = []
        self.upload_offsets: list[int] = []
        # Faults: bytes after which one stream is cut, replies that are lost, refusals as (status, code, sentence).
        self.cut_fetch: list[int] = []
        self.stall_fetch: list[int] = []
        self.cut_upload: list[int] = []
        self.passes: int | None = None  # Bytes of a message above which the line breaks before it has come.
        self.lost_replies: dict[str, int] = {}
        self.too_soon: dict[str, float] = {}  # call -> seconds after which it may be made again
        self.refusals: dict[str, tuple[grpc.StatusCode, str, str]] = {}
        self.changed = threading.Condition()
        self.port = 0
        self.start()

    def leave(self, size: int) -> str:
        """Have another node have left a checkpoint."""
        self.left = pb.Blob(sha256=self._add(os.urandom(size)), size=size)
        return self.left.sha256

    def _add(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[sha256] = data
        return sha256

    # --- the server -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        self.server.start()

    def stop(self) -> None:
        self.server.stop(None).wait()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def wait_for_step(self, step: int, seconds: float = 30.0) -> None:
        """Wait until a heartbeat reports at least `step`."""
        with self.changed:
            assert self.changed.wait_for(lambda: any(seen >= step for seen in self.steps), seconds), self.steps

    def wait_for_activity(self, activity: str, seconds: float = 30.0) -> None:
        """Wait until the latest heartbeat reports an activity."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.activities[-1:] == [activity], seconds), self.activities[-5:]

    def _enter(self, name: str, context: grpc.ServicerContext, credential: bool = True) -> None:
        self.calls.append(name)
        if name in self.refusals:
            status, code, sentence = self.refusals[name]
            context.set_trailing_metadata((("forge-error-code", code),))
            context.abort(status, sentence)
        if name in self.too_soon:
            context.set_trailing_metadata((("forge-retry-after", f"{self.too_soon[name]:.3f}"),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls")
        metadata = {str(key): str(value) for key, value in context.invocation_metadata()}
        if credential and metadata.get("forge-credential") not in self.credentials:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "unknown credential")

    def _leave(self, name: str, context: grpc.ServicerContext) -> None:
        if self.lost_replies.get(name, 0) > 0:
            self.lost_replies[name] -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "the reply is lost")

    # --- the service ------------------------------------------------------------------------------------------------

    def Join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinResponse:
        self._enter("Join", context, credential=False)
        credential = hashlib.sha256(request.public_key).hexdigest()[:16]
        self.credentials.add(credential)
        self.nodes[credential] = request.public_key
        run = pb.RunSummary(
            run_id=self.run_id, name="test", config_fingerprint=CONFIG.fingerprint, phase="experts",
            config_json=json.dumps(CONFIG.model_dump(mode="json")), protocol_version=self.protocol_version)  # fmt: skip
        return pb.JoinResponse(node_id=f"node-{credential}", credential=credential, run=run)

    def Lease(self, request: pb.LeaseRequest, context: grpc.ServicerContext) -> pb.LeaseResponse:
        self._enter("Lease", context)
        self.preferred.append(list(request.preferred_partitions))
        node = str(dict(context.invocation_metadata())["forge-credential"])
        for lease, (holder, partition) in self.lease_holder.items():
            if holder == node and self.state[partition] == "leased":
                return self._assignment(lease, partition)
        if "open" in self.state:
            partition = self.state.index("open")
            lease = f"lease-{len(self.lease_holder)}"
            self.lease_holder[lease] = (node, partition)
            self.state[partition] = "leased"
            return self._assignment(lease, partition)
        if all(state == "accepted" for state in self.state):
            return pb.LeaseResponse(done=pb.Done(reason="every partition is accepted"))
        return pb.LeaseResponse(wait=pb.Wait(reason="every partition is leased", retry_seconds=self.retry_seconds))

    def _assignment(self, lease: str, partition: int) -> pb.LeaseResponse:
        def blob(sha256: str) -> pb.Blob:
            return pb.Blob(sha256=sha256, size=len(self.blobs[sha256]))

        return pb.LeaseResponse(assignment=pb.Assignment(
            lease_id=lease, heartbeat_seconds=0.02, expert=pb.ExpertWork(
                partition=partition, partition_tokens=500, shared=blob(self.shared), shared_ffn=blob(self.ffn),
                train_tokens=blob(self.tokens[partition]), checkpoint=self.left)))  # fmt: skip

    def Heartbeat(self, request: pb.HeartbeatRequest, context: grpc.ServicerContext) -> pb.HeartbeatResponse:
        self._enter("Heartbeat", context)
        with self.changed:
            self.activities.append(request.progress.activity)
            if request.progress.activity == "training":
                self.steps.append(request.progress.step)
            self.changed.notify_all()
        return pb.HeartbeatResponse(order=self.order, reason="the test says so")

    def FetchBlob(self, request: pb.FetchBlobRequest, context: grpc.ServicerContext) -> Iterator[pb.FetchBlobResponse]:
        self._enter("FetchBlob", context)
        if request.sha256 not in self.blobs:
            context.set_trailing_metadata((("forge-error-code", "protocol"),))
            context.abort(grpc.StatusCode.NOT_FOUND, "This run publishes no such file.")
        self.fetch_offsets.append(request.offset)
        self.fetch_chunks.append(request.chunk_bytes)
        data, sent = self.blobs[request.sha256][request.offset :], 0
        cut = self.cut_fetch.pop(0) if self.cut_fetch else None
        stall = self.stall_fetch.pop(0) if self.stall_fetch else None
        while sent < len(data):
            if cut is not None and sent >= cut:
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            if stall is not None and sent >= stall:
                ended = threading.Event()
                context.add_callback(ended.set)
                ended.wait(30)
                return
            chunk = data[sent : sent + (request.chunk_bytes or 256 << 10)]
            if self.passes is not None and len(chunk) > self.passes:
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            self.on_chunk(request.sha256)
            yield pb.FetchBlobResponse(data=chunk)
            sent += len(chunk)

    def OpenUpload(self, request: pb.OpenUploadRequest, context: grpc.ServicerContext) -> pb.OpenUploadResponse:
        self._enter("OpenUpload", context)
        response = pb.OpenUploadResponse(offset=len(self.uploads.get(request.sha256, b"")))
        if request.sha256 in self.receipts:
            response.receipt.CopyFrom(self.receipts[request.sha256])
        return response

    def Upload(self, requests: Iterator[pb.UploadRequest], context: grpc.ServicerContext) -> pb.UploadResponse:
        self._enter("Upload", context)
        held: bytearray | None = None
        cut, taken = (self.cut_upload.pop(0) if self.cut_upload else None), 0
        for request in requests:
            if held is None:
                held = self.uploads.setdefault(request.sha256, bytearray())
                self.upload_offsets.append(request.offset)
                assert request.offset == len(held)
            assert len(request.data) <= 1 << 20
            if self.passes is not None and len(request.data) > self.passes:
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            held += request.data
            taken += len(request.data)
            if cut is not None and taken >= cut:
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        return pb.UploadResponse(offset=len(held or b""))

    def Commit(self, request: pb.CommitRequest, context: grpc.ServicerContext) -> pb.CommitResponse:
        self._enter("Commit", context)
        node, partition = self.lease_holder[request.lease_id]
        Ed25519PublicKey.from_public_bytes(self.nodes[node]).verify(request.signature, request.manifest)
        assert hashlib.sha256(self.uploads[request.sha256]).hexdigest() == request.sha256
        receipt = self.receipts.get(request.sha256)
        if receipt is None:
            self.manifests.append(json.loads(request.manifest))
            receipt = pb.Receipt(sha256=request.sha256, partition=partition, verdict=PENDING)
            self.receipts[request.sha256] = receipt
            self.state[partition] = "uploaded"
        if self.pending_answers > 0:
            self.pending_answers -= 1
        elif receipt.verdict == PENDING:
            receipt.verdict = self.verdicts.pop(0) if len(self.verdicts) > 1 else self.verdicts[0]
            if receipt.verdict == REJECTED:
                receipt.reasons.append("it is worse than the shared components")
            self.state[partition] = "accepted" if receipt.verdict == ACCEPTED else "open"
        self._leave("Commit", context)
        return pb.CommitResponse(receipt=receipt)

    def Release(self, request: pb.ReleaseRequest, context: grpc.ServicerContext) -> pb.ReleaseResponse:
        self._enter("Release", context)
        with self.changed:
            self.released.append(request.reason)
            self.state[self.lease_holder[request.lease_id][1]] = "open"
            self.changed.notify_all()
        return pb.ReleaseResponse()


class SignsInFiles:
    """Senses that a test changes from outside the process: `battery` and `owner` in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_battery(self) -> bool:
        return (self.directory / "battery").exists()

    def quiet_seconds(self) -> float:
        return 0.0 if (self.directory / "owner").exists() else 1e9


def unrestricted() -> Guest:
    """An owner who always lets the node work."""
    return Guest(Rules(on_battery=True), SignsInFiles(Path("/nowhere")))


class CountingJob:
    """Counts to `steps`, with the number in its checkpoint; its shard says where it started.

    Args:
        arguments: as of the job train-expert.
        steps: how far to count.
        hold_at: step at which it goes on only when it is told to finish.
        deaf: whether it never hears that it should finish.
    """

    made = 0

    def __init__(self, arguments: dict[str, Any], steps: int = 5, hold_at: int | None = None, deaf: bool = False) -> None:
        CountingJob.made += 1
        self.work_dir, self.ram_bytes = Path(arguments["work_dir"]), arguments["ram_bytes"]
        self.pid, self.peak_rss = 0, 1  # Of no process: none is given a low priority, none is ended.
        self.steps, self.hold_at = steps, hold_at
        self.killed, self.deaf, self.told = False, deaf, threading.Event()
        checkpoint = self.work_dir / "checkpoint.safetensors"
        self.first = int(checkpoint.read_text()) if checkpoint.is_file() else 0
        self.step = self.first
        for key in ("shared", "shared_ffn", "train_tokens"):
            assert Path(arguments["assignment"][key]).is_file()

    def events(self) -> Iterator[dict[str, Any]]:
        while self.step < self.steps:
            self.step += 1
            (self.work_dir / "checkpoint.safetensors").write_text(str(self.step))
            yield {"event": "progress", "stage": "expert", "step": self.step, "steps": self.steps, "loss": 1.0,
                   "tokens_per_second": 10.0, "resident_bytes": 1 << 20, "message": None}  # fmt: skip
            if self.step == self.hold_at:
                self.told.wait(60)
            if self.told.is_set():
                return

    def result(self) -> dict[str, Any]:
        facts = {"step": self.step, "steps": self.steps, "loss": 1.0, "peak_bytes": 2, "predicted_bytes": 3}
        if self.step < self.steps:
            return facts | {"finished": False}
        shard, manifest = self.work_dir / "shard.safetensors", self.work_dir / "manifest.json"
        shard.write_bytes(f"shard {CountingJob.made} from step {self.first} ".encode() + bytes(3 << 20))
        manifest.write_text(json.dumps({"tokens_seen": 500, "final_loss": 1.0}))
        sha256 = hashlib.sha256(shard.read_bytes()).hexdigest()
        return facts | {"finished": True, "shard": str(shard), "manifest": str(manifest), "sha256": sha256}

    def finish(self) -> None:
        if not self.deaf:
            self.told.set()

    def kill(self) -> None:
        self.killed = True
        self.told.set()
