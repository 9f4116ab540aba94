"""A coordinator that means harm, and a real agent in a process of its own: it can waste the node's time, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import hashlib
import json
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

import grpc
from modularforge.v1 import fleet_pb2 as pb
import pytest

from .fakes import CONFIG, FakeCoordinator

ESCAPE = "\x1b[2J\x1b]0;owned\x07"


class Hostile(FakeCoordinator):
    """Changes its answers before they are sent."""

    def __init__(self) -> None:
        self.joined: Callable[[pb.JoinResponse], object] = lambda answer: None
        self.leased: Callable[[pb.Assignment], object] = lambda answer: None
        self.committed: Callable[[pb.Receipt], object] = lambda receipt: None
        self.more = 0  # chunks behind the end of every file
        super().__init__()

    def Join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinResponse:
        answer = super().Join(request, context)
        self.joined(answer)
        return answer

    def Lease(self, request: pb.LeaseRequest, context: grpc.ServicerContext) -> pb.LeaseResponse:
        answer = super().Lease(request, context)
        if answer.HasField("assignment"):
            self.leased(answer.assignment)
        return answer

    def FetchBlob(self, request: pb.FetchBlobRequest, context: grpc.ServicerContext) -> Iterator[pb.FetchBlobResponse]:
        yield from super().FetchBlob(request, context)
        for _ in range(self.more):
            yield pb.FetchBlobResponse(data=bytes(1 << 20))

    def Commit(self, request: pb.CommitRequest, context: grpc.ServicerContext) -> pb.CommitResponse:
        answer = super().Commit(request, context)
        self.committed(answer.receipt)
        return answer


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    coordinator = Hostile()
    yield coordinator
    coordinator.stop()


def joins(hostile: Hostile, tmp_path: Path, *arguments: str) -> tuple[int, str]:
    """An agent until its end, in a directory beside which nothing changes; its exit code and what it printed."""
    (tmp_path / "precious").write_text("mine")
    command = [sys.executable, str(Path(__file__).with_name("agent_process.py")), hostile.address, str(tmp_path / "node"),
               *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONUNBUFFERED": "1"})  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"precious", "node"}
    assert (tmp_path / "precious").read_text() == "mine"
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def config(**model: Any) -> Callable[[pb.JoinResponse], object]:
    """A config whose model is another one, with the fingerprint that belongs to it."""
    tree = CONFIG.model_dump(mode="json")
    tree["model"] |= model
    decisive = {key: value for key, value in tree.items() if key not in ("name", "evaluation", "fleet")}

    def join(answer: pb.JoinResponse) -> None:
        answer.run.config_json = json.dumps(tree)
        answer.run.config_fingerprint = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    return join


@pytest.mark.parametrize(("join", "code", "words"), [
    (lambda answer: setattr(answer.run, "run_id", "../../precious"), 6, "cannot name a directory"),
    (config(n_layers=10**9), 5, "--ram allows 2.0G"),
    (config(d_ff=10**15), 5, "--ram allows 2.0G"),
    (lambda answer: setattr(answer.run, "config_json", "[" * 100_000), 8, "not JSON"),
    (lambda answer: setattr(answer.run, "config_json", '{"model": {"path": "/etc/passwd"}}'), 3, "unknown key 'model.path'"),
], ids=["a path as run id", "too many layers for any memory", "too wide for any memory", "a deep config", "another config"])
def test_a_run_that_harms_is_refused_before_anything_is_leased(
        hostile: Hostile, tmp_path: Path, join: Callable[[pb.JoinResponse], object], code: int, words: str) -> None:
    hostile.joined = join
    assert (joined := joins(hostile, tmp_path))[0] == code and words in joined[1], joined
    assert "Lease" not in hostile.calls and "FetchBlob" not in hostile.calls


@pytest.mark.parametrize(("lease", "arguments", "code", "words"), [
    (lambda work: setattr(work.expert.shared, "size", 1 << 62), (), 6, "is full"),
    (lambda work: setattr(work.expert.shared, "size", 1 << 62), ("disk=1G",), 6, "--disk allows"),
    (lambda work: setattr(work.expert.shared, "sha256", "../../precious"), (), 6, "is not the sha256 of a blob"),
    (lambda work: setattr(work.expert.shared, "sha256", "/etc/passwd"), (), 6, "is not the sha256 of a blob"),
], ids=["a file that no disk holds", "a file that --disk forbids", "a path as hash", "an absolute path as hash"])  # fmt: skip
def test_files_are_bounded_and_stay_in_the_data_directory(
        hostile: Hostile, tmp_path: Path, lease: Callable[[pb.Assignment], object], arguments: tuple[str, ...], code: int,
        words: str) -> None:  # fmt: skip
    hostile.leased = lease
    assert (joined := joins(hostile, tmp_path, *arguments))[0] == code and words in joined[1], joined
    assert "FetchBlob" not in hostile.calls


def test_a_file_that_does_not_end_is_cut_where_it_was_said_to_end(hostile: Hostile, tmp_path: Path) -> None:
    hostile.more = 200
    code, printed = joins(hostile, tmp_path)
    assert code == 7 and "tell its operator" in printed, printed
    held = sum(path.stat().st_size for path in (tmp_path / "node").rglob("*") if path.is_file())
    assert held < len(hostile.blobs[hostile.shared]) + (3 << 20)


def test_nothing_but_checkpoints_of_the_training_is_uploaded(hostile: Hostile, tmp_path: Path) -> None:
    key, waiting = tmp_path / "node" / "node.key", 5

    def ask(receipt: pb.Receipt) -> None:
        nonlocal waiting
        waiting -= 1
        hostile.pending_answers = int(waiting > 0)
        if key.is_file():
            receipt.wanted.extend([hashlib.sha256(key.read_bytes()).hexdigest(), "../node.key", *["0" * 64] * 10_000])

    hostile.pending_answers, hostile.committed = 1, ask
    code, printed = joins(hostile, tmp_path)
    assert code == 0 and 1 <= printed.count("it stays here") < 10, printed
    assert len(hostile.uploads) == 1, "the shard, and nothing else"


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1e300, 1e300])
def test_a_pause_that_is_none_does_not_stop_the_node(hostile: Hostile, tmp_path: Path, seconds: float) -> None:
    hostile.leased = lambda work: setattr(work, "heartbeat_seconds", seconds)
    hostile.pending_answers = 1
    code, printed = joins(hostile, tmp_path)
    assert code == 0 and hostile.state == ["accepted"], printed
    assert "Heartbeat" in hostile.calls


def test_what_it_says_does_not_drive_the_terminal(hostile: Hostile, tmp_path: Path) -> None:
    hostile.joined = lambda answer: setattr(answer.run, "name", f"run{ESCAPE}")
    hostile.verdicts = [pb.Receipt.VERDICT_REJECTED]
    hostile.committed = lambda receipt: receipt.reasons.append(f"bad{ESCAPE}")
    _, printed = joins(hostile, tmp_path)
    assert "bad" in printed and "\x1b" not in printed and "\x07" not in printed, repr(printed)
