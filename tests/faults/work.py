"""The two processes of the sweep, real but for the training: `python -m tests.faults.work ROLE ROOT LOG POINT`.

FAULTS_LARGE=1 makes shards of several chunks; FAULTS_LOSE=1 loses every second reply of each call after it was carried out;
FAULTS_FULL=1 has the disk be full at the point; FAULTS_LEASE is a lease's life in seconds; FAULTS_NODE names a node and its
directory. While ROOT holds a file `hold`, or one `hold-NAME` of the node, training stands still after its first step.
"""

from __future__ import annotations

from collections.abc import Iterator
import hashlib
import json
import os
from pathlib import Path
import sys
import threading
from typing import Any

import grpc
import numpy as np
from safetensors.numpy import load, save

from coordinator import blobs, phases, serve
from coordinator.serve import OFF, Coordinator
from forge.checkpoint.safetensors_header import read_header
from forge.config import parse_config
from forge.errors import report_errors
from forge.files import RunDirectory, write_bytes, write_json
from forge.invitation import Invitation
from forge.model import names
from node import client, link
from node.cli import run_node
from node.preferences import load_preferences
from tests.coordinator import fakes
from tests.coordinator.fakes import FakeJobs, make_shard
from tests.faults import points

STEPS = 3
LISTEN_FILE, INVITATION_FILE, RECEIPTS_FILE, HOLD_FILE = "listen", "invitation", "receipts", "hold"


def choose_size(large: bool) -> None:
    """Have this process work on shards of one chunk, or of twelve."""
    model = _SMALL.model.model_dump() | ({"d_ff": 12_288} if large else {})
    fleet = {"lease_seconds": float(os.environ.get("FAULTS_LEASE", _SMALL.fleet.lease_seconds))}
    fakes.CONFIG = parse_config(_SMALL.model_dump() | {"model": model, "fleet": fleet})


_SMALL = fakes.CONFIG


def state_at(partition: int, step: int) -> str:
    """What "training" has come to: each step needs the one before."""
    state = f"partition {partition}"
    for number in range(step):
        state = hashlib.sha256(f"{state} {number}".encode()).hexdigest()
    return state


def shard_of(root: Path, partition: int) -> dict[str, np.ndarray]:
    """The tensors of a partition whose training was never killed."""
    found: dict[str, np.ndarray] = load(
        make_shard(RunDirectory(root / "run"), partition, seed=int(state_at(partition, STEPS)[:8], 16)))  # fmt: skip
    return found


def _weights() -> dict[str, np.ndarray]:
    """The tensors of a checkpoint; what training has come to is in its metadata."""
    shapes = names.ffn_tensors(fakes.CONFIG.model)
    return {f"{kind.format(name)}": np.zeros(shape, np.float32) for name, shape in shapes.items()
            for kind in ("model.{}", "optimizer.{}.momentum_buffer")}  # fmt: skip


class ChainedJob:
    """Trains in steps of which each needs the one before, with a checkpoint after each."""

    peak_rss = 1

    def __init__(self, root: Path, arguments: dict[str, Any]) -> None:
        self._root, self._directory = root, Path(arguments["work_dir"])
        self._assignment = arguments["assignment"]
        self._partition = int(self._assignment["partition"])
        self._checkpoint = self._directory / "checkpoint.safetensors"
        self.pid = os.getpid()
        self._told, self._state, self._step = threading.Event(), "", 0
        self._holds = HOLD_FILE, f"{HOLD_FILE}-{os.environ.get('FAULTS_NODE', 'node')}"

    def events(self) -> Iterator[dict[str, Any]]:
        held: dict[str, Any] = {"step": 0, "state": state_at(self._partition, 0)}
        if self._checkpoint.is_file():
            held = json.loads(read_header(self._checkpoint).metadata["facts"])
        for step in range(int(held["step"]), STEPS):
            held = {"step": step + 1, "state": hashlib.sha256(f"{held['state']} {step}".encode()).hexdigest()}
            write_bytes(self._checkpoint, save(_weights(), {"facts": json.dumps(held)}))
            self._step = step + 1
            yield {"event": "progress", "stage": "expert", "step": step + 1, "steps": STEPS, "loss": 1.0,
                   "tokens_per_second": 10.0, "resident_bytes": 1 << 20, "message": None}  # fmt: skip
            while any((self._root / name).exists() for name in self._holds) and not self._told.wait(0.05):
                pass
            if self._told.is_set():
                return
        self._state = held["state"]

    def result(self) -> dict[str, Any]:
        if not self._state:
            return {"step": self._step, "steps": STEPS, "loss": 1.0, "peak_bytes": 1, "predicted_bytes": 1, "finished": False}
        shard, manifest = self._directory / "shard.safetensors", self._directory / "manifest.json"
        data = make_shard(RunDirectory(self._root / "run"), self._partition, seed=int(self._state[:8], 16))
        write_bytes(shard, data)
        write_json(manifest, {"tokens_seen": 1000, "final_loss": 3.5})
        return {"step": STEPS, "steps": STEPS, "loss": 1.0, "peak_bytes": 1, "predicted_bytes": 1, "finished": True,
                "shard": str(shard), "manifest": str(manifest), "sha256": hashlib.sha256(data).hexdigest()}  # fmt: skip

    def finish(self) -> None:
        """Stop after this step."""
        self._told.set()

    kill = finish


def coordinate(root: Path) -> int:
    """The coordinator: everything real but what needs torch."""
    phases.TIDY_SECONDS = 0.0  # Old uploads are forgotten at once.
    serve.FAREWELL_SECONDS *= 6  # Of twenty processes on two busy cores, one may not run for twenty seconds.
    blobs._write_all = points.around("write of a chunk", blobs._write_all)
    make: Any = grpc.server
    here = points.ServerPoints(lose="FAULTS_LOSE" in os.environ)
    server: Any = lambda *more, interceptors=(), **named: make(*more, interceptors=[*interceptors, here], **named)  # noqa: E731
    grpc.server = server
    coordinator = Coordinator(fakes.CONFIG, root / "run", (root / LISTEN_FILE).read_text(), run_job=FakeJobs(),
                              exit_when_done=True, dashboard=OFF)  # fmt: skip
    with coordinator:
        coordinator.wait()
    return 0


def work(root: Path) -> int:
    """The node: everything real but what needs torch."""
    opened: Any = link.__dict__["open_channel"]
    link.__dict__["open_channel"] = lambda *more: grpc.intercept_channel(opened(*more), points.ClientPoints())
    _note_receipts(root)
    invitation = Invitation.parse((root / INVITATION_FILE).read_text())
    name = os.environ.get("FAULTS_NODE", "node")
    # What trains here is the agent itself, which is not to stand back for whatever else runs.
    allowed = {"ram": "2G", "threads": 1, "device": "cpu", "nice": 0, "name": name}
    preferences = load_preferences(None, root / name, allowed)
    return run_node(link.Link(None, data_dir=root / name, invitation=invitation), preferences, root / name, False,
                    lambda arguments, *more: ChainedJob(root, arguments))  # fmt: skip


def _note_receipts(root: Path) -> None:
    """Write down every receipt that the node was given: it has to stay true."""
    read = client._receipt

    def noted(message: Any) -> Any:
        receipt = read(message)
        with open(root / RECEIPTS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps([receipt.partition, receipt.sha256, receipt.verdict.name]) + "\n")
        return receipt

    client._receipt = noted


def begin(role: str, root: str, log: str, deadly: str, out: str, facts: dict[str, str]) -> None:
    """The same in a process that was forked for it.

    Args:
        role, root, log, deadly: as of `main`.
        out: gets what it prints.
        facts: the environment variables of this module.
    """
    written = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(written, 1)
    os.dup2(written, 2)
    for name in [name for name in os.environ if name.startswith("FAULTS_")]:
        del os.environ[name]
    os.environ.update(facts)
    main(role, root, log, deadly)


def main(role: str, root: str, log: str, deadly: str = "") -> None:
    """Run a role until it is done."""
    with report_errors():
        choose_size("FAULTS_LARGE" in os.environ)
        points.install(Path(root), Path(log), deadly, "FAULTS_FULL" in os.environ)
        sys.exit({"coordinator": coordinate, "node": work}[role](Path(root)))


if __name__ == "__main__":
    main(*sys.argv[1:])
