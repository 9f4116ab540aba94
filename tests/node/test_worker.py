from __future__ import annotations

from collections.abc import Callable, Iterator
import io
from itertools import chain
from pathlib import Path
import subprocess
import sys
from typing import Any

import pytest

from forge.errors import MemoryBudgetError
from node.client import FleetClient
from node.console import Console
from node.heartbeat import Heartbeats
from node.worker import Worker, tree_bytes


class HungryJob:
    """A real child process that holds 200 MB."""

    def __init__(self, arguments: dict[str, Any], threads: int, log: Path) -> None:
        self.peak_rss = 0
        code = "held = b'x' * 200_000_000; print('held', flush=True); input()"
        self._process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        # Before anybody looks: a look while the pages are still being filled would see a part of them.
        self._held = self._process.stdout.readline()

    @property
    def pid(self) -> int:
        return self._process.pid

    def events(self) -> Iterator[dict[str, Any]]:
        assert self._process.stdout is not None and self._process.stdin is not None
        for _ in chain([self._held], self._process.stdout):
            yield {"event": "progress", "stage": "expert", "step": 1, "steps": 2, "loss": 1.0, "tokens_per_second": 1.0,
                   "resident_bytes": 1, "message": None}  # fmt: skip
        self._process.wait()
        self._process.stdout.close()
        self._process.stdin.close()

    def result(self) -> dict[str, Any]:
        raise AssertionError("a stopped job has no result")

    def finish(self) -> None: ...

    def kill(self) -> None:
        self._process.kill()


def test_a_child_above_its_limit_is_stopped(tmp_path: Path, connect: Callable[..., FleetClient]) -> None:
    jobs: list[HungryJob] = []

    def run_job(arguments: dict[str, Any], threads: int, log: Path) -> HungryJob:
        jobs.append(HungryJob(arguments, threads, log))
        return jobs[-1]

    worker = Worker(Console(io.StringIO()), ram_bytes=100 << 20, threads=1, device="cpu", run_job=run_job)
    beats = Heartbeats(connect("127.0.0.1:1"), "lease", 60, lambda _: None)  # not started: no pulse is needed
    with pytest.raises(MemoryBudgetError, match=r"partition 4 used [12]\d\dM, more than the 100M .* --ram 256M"):
        worker.train({"partition": 4}, tmp_path, beats, 90 << 20)
    assert tree_bytes(jobs[0].pid) == 0
    assert list(tmp_path.iterdir()) == []
