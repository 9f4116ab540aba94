"""A coordinator and three nodes as real processes, killed on the way; the model equals that of one machine to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import json
from pathlib import Path
import socket
import sqlite3
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file
import torch

from forge import pipeline
from forge.config import load_config
from forge.files import hash_file
from forge.model.moe import MixtureLM
from forge.vocabulary import STAGES
from tests.test_pipeline import small_config, write_corpus

RAM = "3G"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


class Fleet:
    """The commands of one coordinator and its nodes, to start, kill and start again."""

    def __init__(self, root: Path, config: Path) -> None:
        self.root, self.address = root, f"127.0.0.1:{_free_port()}"
        self.run_dir = root / "run"
        self._config = config
        self._processes: list[subprocess.Popen[bytes]] = []

    def coordinator(self) -> subprocess.Popen[bytes]:
        return self._start("coordinator", "coordinator.cli", "serve", "--config", str(self._config), "--run-dir",
                           str(self.run_dir), "--listen", self.address, "--exit-when-done")  # fmt: skip

    def node(self, index: int) -> subprocess.Popen[bytes]:
        return self._start(f"node-{index}", "node.cli", "join", self.address, "--ram", RAM, "--threads", "1", "--name",
                           f"node-{index}", "--data-dir", str(self.root / f"node-{index}"))  # fmt: skip

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _start(self, name: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        with open(self.root / f"{name}.log", "ab") as log:
            process = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=log, stderr=log)
        self._processes.append(process)
        return process


@contextmanager
def _fleet(root: Path, config: Path) -> Iterator[Fleet]:
    fleet = Fleet(root, config)
    try:
        yield fleet
    finally:
        fleet.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    assert process.poll() is None, "it ended before it could be killed"
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_everywhere_it_ends_with_the_model_of_one_machine(tmp_path: Path) -> None:
    config = small_config(write_corpus(tmp_path / "corpus.jsonl"), "train.checkpoint_seconds=0.2", "fleet.lease_seconds=8")
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    with _fleet(tmp_path, path) as fleet:
        coordinator = fleet.coordinator()
        markers = fleet.run_dir / "stages"
        for before, stage in zip((None, *STAGES), STAGES, strict=False):
            _wait(lambda before=before: before is None or (markers / f"{before}.json").is_file(), f"the stage {before}")  # type: ignore[misc]
            time.sleep(0.3)  # Into the stage, wherever that is: the kill needs no particular place.
            if not (markers / f"{stage}.json").is_file():
                _kill(coordinator)
                coordinator = fleet.coordinator()
        _wait((markers / "publish.json").is_file, "the last stage")
        nodes = [fleet.node(index) for index in range(3)]

        def training() -> list[Path]:
            return list((tmp_path / "node-0").rglob("checkpoint.safetensors"))

        _wait(lambda: bool(training()), "a checkpoint of node 0")
        _kill(nodes[0])
        _kill(coordinator)
        coordinator = fleet.coordinator()
        nodes[0] = fleet.node(0)
        _wait(lambda: coordinator.poll() is not None, "the end of the run", 300)
        assert coordinator.returncode == 0, fleet.log("coordinator")[-3000:]
    _check_accepted_once(fleet)
    _check_equal_to_one_machine(tmp_path, path, fleet)


def _check_accepted_once(fleet: Fleet) -> None:
    with sqlite3.connect(fleet.run_dir / "forge.db") as database:
        accepted = database.execute("select partition, count(*) from shards where verdict = 'accepted' group by partition")
        assert sorted(accepted.fetchall()) == [(0, 1), (1, 1), (2, 1)]
    database.close()
    assert not list(fleet.run_dir.rglob("*.tmp"))
    MixtureLM.load(fleet.run_dir / "model")


def _check_equal_to_one_machine(root: Path, config: Path, fleet: Fleet) -> None:
    alone = root / "alone"
    pipeline.run_all(alone, load_config(str(config)), ram_bytes=3 << 30, threads=1, device="cpu", on_event=lambda _: None)
    for name in ("shared.safetensors", "router.safetensors"):
        # The coordinator trains with all cores and this with one; the experts need the same shared components.
        if hash_file(alone / "model" / name) != hash_file(fleet.run_dir / "model" / name):
            pytest.fail(f"{name} differs between the two runs")
    for index in range(3):
        theirs, ours = (load_file(d / "model" / f"expert-{index:03d}.safetensors") for d in (fleet.run_dir, alone))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in ours), f"expert {index} differs"
    report = json.loads((fleet.run_dir / "reports" / "evaluation.json").read_text())
    assert report["rows"][-1]["experts"] == 3
