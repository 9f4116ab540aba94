"""What stands at the seams: jobs without torch, a clock that a test moves, and a node over real gRPC."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import hashlib
import json
from pathlib import Path
import time
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
import grpc
from modularforge.v1 import fleet_pb2 as pb
from modularforge.v1 import fleet_pb2_grpc
import numpy as np
from safetensors.numpy import save

from coordinator.authority import ca_certificate
from coordinator.invite import create_token
from coordinator.jobs import OnProgress
from forge.config import RunConfig, parse_config
from forge.files import RunDirectory, write_json
from forge.invitation import KEY_HEADER, PROOF_HEADER, SECRET_HEADER, SERVER_NAME, Invitation, proof_message
from forge.model import names
from forge.vocabulary import CHUNK_BYTES, END_OF_TEXT, PROTOCOL_VERSION, SHARD_FORMAT_VERSION

LEASE_SECONDS = 40.0

CONFIG: RunConfig = parse_config({
    "name": "tiny",
    "model": {"vocab_size": 260, "d_model": 16, "d_ff": 24, "n_layers": 2, "n_heads": 2, "n_experts": 3, "top_k": 2,
              "max_seq_len": 32},
    "train": {"shared": {"tokens": 1000}, "expert": {"tokens": 1536}},
    "fleet": {"lease_seconds": LEASE_SECONDS},
})  # fmt: skip


class Clock:
    """Seconds since the epoch, as far as the test lets them pass."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Wait for another thread."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError("it did not happen in time")


def tensors(shapes: dict[str, names.Shape], seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    drawn = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name in drawn:
        if name.endswith("w2.weight"):  # an expert leaves the context channels alone
            drawn[name][-CONFIG.model.context_channels :] = 0
    return drawn


def make_shard(run: RunDirectory, partition: int, seed: int = 0, poison: bool = False, **changed: str) -> bytes:
    """A shard of random weights, as bytes."""
    published = run.marker("publish") or {}
    weights = tensors(names.expert_tensors(CONFIG.model, partition), 100 * seed + partition)
    if poison:
        next(iter(weights.values()))[0, 0] = np.nan
    return bytes(save(weights, {
        "run_id": run.run_id, "config_fingerprint": CONFIG.fingerprint, "partition": str(partition),
        "shared_sha256": published["shared"]["sha256"], "tokens_seen": "1000", "final_loss": "3.5",
        "format_version": SHARD_FORMAT_VERSION, **changed}))  # fmt: skip


def invite(root: Path, *, uses: int = 1, expires: str = "7d") -> Invitation:
    """An invitation to the run in a directory, whether its coordinator runs or not."""
    text, _ = create_token(root, uses=uses, expires=expires, name="", addresses=["127.0.0.1:1"])
    return Invitation.parse(text)


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class FakeJobs:
    """The job seam. Stages leave their markers and real files; verdicts and failures are what the test says."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.arguments: dict[str, dict[str, Any]] = {}
        self.verdicts: list[dict[str, Any] | Exception] = []
        self.replays: list[dict[str, Any]] = []
        self.failures: dict[str, list[Exception]] = {}
        self.pieces: Iterable[str] = (" sail", " and", " tide")
        self.before: Callable[[str], None] = lambda name: None

    def __call__(self, name: str, arguments: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
        what = arguments.get("stage", name)
        self.calls.append(what)
        self.arguments[what] = arguments
        self.before(what)
        if self.failures.get(what):
            raise self.failures[what].pop(0)
        run = RunDirectory(Path(arguments["run_dir"]))
        on_progress({"event": "progress", "stage": what, "step": 1, "steps": 2, "loss": 2.0, "message": None,
                     "tokens_per_second": 10.0, "resident_bytes": 1})  # fmt: skip
        if name == "stage":
            return run.finish(what, self._publish(run) if what == "publish" else {"maturity": 3.0})
        if name == "generate":
            for number, text in enumerate(self.pieces):
                on_progress({"event": "progress", "piece": {"text": text, "expert": number % 2, "tokens": 1}})
            return {"tokens": 3, "left_out": 0}
        if name == "replay":
            found = self.replays.pop(0) if self.replays else {}
            return {"finished": True, "within": True, "distance": 0.01, "momentum": 0.02, **found}
        if name == "validate":
            verdict = self.verdicts.pop(0) if self.verdicts else {}
            if isinstance(verdict, Exception):
                raise verdict
            return {"accepted": True, "reasons": [], "loss": 3.0, "shared_loss": 3.5, **verdict}
        arrived = json.loads((run.model / "model.safetensors.index.json").read_text())["metadata"]["experts_arrived"]
        return {"experts": len(arrived), "arrived": sorted(arrived), "mean_perplexity": 100.0 - len(arrived),
                "pooled_perplexity": 99.0 - len(arrived),
                "contributions": [{"expert": expert, "nats": 0.25 * expert} for expert in arrived]}  # fmt: skip

    def _publish(self, run: RunDirectory) -> dict[str, Any]:
        _write_tokenizer(run.data)
        facts: dict[str, Any] = {"run_id": run.run_id, "config_fingerprint": CONFIG.fingerprint, "partitions": []}
        shapes = {"shared": names.shared_tensors, "shared_with_context": names.shared_tensors,
                  "router": names.router_tensors, "shared_ffn": names.ffn_tensors}  # fmt: skip
        for seed, (part, shape) in enumerate(shapes.items()):
            facts[part] = _blob(run, save(tensors(shape(CONFIG.model), seed)))
        for partition in range(CONFIG.model.n_experts):
            # Three chunks and a bit, so that a download has offsets to go on from.
            train = _blob(run, bytes([partition]) * (3 * CHUNK_BYTES + 17))
            held_out = {split: _blob(run, f"{split} {partition}".encode()) for split in ("validation", "test")}
            facts["partitions"].append({"partition": partition, "tokens": 1000 + partition, "documents": 10,
                                        "train": train, "shared_loss": 3.5, **held_out})  # fmt: skip
        return facts


def _blob(run: RunDirectory, data: bytes) -> dict[str, Any]:
    path = run.work / "blob"
    path.write_bytes(data)
    return {"sha256": run.blobs.adopt(path), "size": len(data)}


def _write_tokenizer(directory: Path) -> None:
    write_json(directory / "tokenizer.json", {"model": {"vocab": {END_OF_TEXT: 0}}})
    write_json(directory / "tokenizer_config.json", {"eos_token": END_OF_TEXT})


class FakeNode:
    """A node over real gRPC and TLS: a key, an invitation of the run in `root`, a credential, and the calls."""

    def __init__(self, address: str, name: str, root: Path, invitation: Invitation | None = None) -> None:
        # A reader that does not read soon stops the writer, as on a slow line: gRPC would buffer megabytes.
        narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16)]
        self.name = name
        self.invitation = invitation or invite(root)
        self.key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())
        self.public_key = self.key.public_key().public_bytes_raw()
        self.channel = grpc.secure_channel(
            address, grpc.ssl_channel_credentials(ca_certificate(root)),
            options=[("grpc.use_local_subchannel_pool", 1), ("grpc.ssl_target_name_override", SERVER_NAME), *narrow])  # fmt: skip
        self.stub = fleet_pb2_grpc.FleetServiceStub(self.channel)
        self.credential, self.fingerprint = "", CONFIG.fingerprint

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("forge-credential", self.credential),)

    @property
    def joining(self) -> tuple[tuple[str, bytes], ...]:
        """The headers of a Join."""
        proof = self.key.sign(proof_message(self.invitation.fingerprint))
        return (KEY_HEADER, self.public_key), (PROOF_HEADER, proof), (SECRET_HEADER, self.invitation.secret)

    def join(self) -> pb.JoinResponse:
        response: pb.JoinResponse = self.stub.Join(
            pb.JoinRequest(protocol_version=PROTOCOL_VERSION, public_key=self.public_key, name=self.name),
            metadata=self.joining, wait_for_ready=True)  # fmt: skip
        self.credential, self.fingerprint = response.credential, response.run.config_fingerprint
        return response

    def ask(self, *preferred: int) -> pb.LeaseResponse:
        return self.stub.Lease(pb.LeaseRequest(preferred_partitions=preferred), metadata=self.metadata)

    def lease(self, *preferred: int) -> pb.Assignment:
        answer = self.ask(*preferred)
        assert answer.WhichOneof("answer") == "assignment", answer
        return answer.assignment

    def heartbeat(self, lease_id: str, **progress: Any) -> int:
        said = pb.Progress(**progress) if progress else pb.Progress(step=3, steps=9, loss=float("nan"))
        request = pb.HeartbeatRequest(lease_id=lease_id, progress=said)
        return int(self.stub.Heartbeat(request, metadata=self.metadata).order)

    def open(self, lease_id: str, shard: bytes, size: int | None = None) -> pb.OpenUploadResponse:
        request = pb.OpenUploadRequest(lease_id=lease_id, sha256=sha256_of(shard),
                                       size=len(shard) if size is None else size)  # fmt: skip
        return self.stub.OpenUpload(request, metadata=self.metadata)

    def send(self, lease_id: str, shard: bytes, offset: int = 0, sha256: str | None = None) -> int:
        def messages() -> Iterator[pb.UploadRequest]:
            for at in range(offset, len(shard), CHUNK_BYTES):
                yield pb.UploadRequest(lease_id=lease_id, sha256=sha256 or sha256_of(shard), offset=offset,
                                       data=shard[at : at + CHUNK_BYTES])  # fmt: skip

        return int(self.stub.Upload(messages(), metadata=self.metadata).offset)

    def commit(self, assignment: pb.Assignment, shard: bytes, run_id: str, /, **changed: Any) -> pb.Receipt:
        manifest = json.dumps({
            "run_id": run_id, "partition": assignment.expert.partition, "sha256": sha256_of(shard),
            "lease_id": assignment.lease_id, "shared_sha256": assignment.expert.shared.sha256,
            "config_fingerprint": self.fingerprint, "tokens_seen": 1000, **changed}).encode()  # fmt: skip
        request = pb.CommitRequest(lease_id=assignment.lease_id, sha256=sha256_of(shard), manifest=manifest,
                                   signature=self.key.sign(manifest))  # fmt: skip
        return self.stub.Commit(request, metadata=self.metadata).receipt

    def hand_in(self, assignment: pb.Assignment, shard: bytes, run_id: str) -> pb.Receipt:
        opened = self.open(assignment.lease_id, shard)
        if opened.offset < len(shard):
            assert self.send(assignment.lease_id, shard, opened.offset) == len(shard)
        return self.commit(assignment, shard, run_id)

    def verdict(self, assignment: pb.Assignment, shard: bytes, run_id: str) -> pb.Receipt:
        """Commit until there is a verdict, as a node does."""
        def decided() -> pb.Receipt | None:
            receipt = self.commit(assignment, shard, run_id)
            return receipt if receipt.verdict != pb.Receipt.VERDICT_PENDING else None

        receipt: pb.Receipt = until(decided)
        return receipt

    def fetch(self, sha256: str, offset: int = 0) -> bytes:
        request = pb.FetchBlobRequest(sha256=sha256, offset=offset)
        return b"".join(message.data for message in self.stub.FetchBlob(request, metadata=self.metadata))
