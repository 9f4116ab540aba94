"""A coordinator and three nodes as real processes, killed everywhere on the way, pushing to a local Hub as they go.

The model equals that of one machine to the bit, and loads from the Hub at every commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
import json
import os
from pathlib import Path
import socket
import sqlite3
import subprocess
import sys
import time
from types import MappingProxyType
from typing import Any

import huggingface_hub
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
import psutil
import pytest
from safetensors.torch import load_file
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from forge import pipeline
from forge.checkpoint.assembly import arrived
from forge.config import load_config
from forge.files import hash_file
from forge.vocabulary import CHUNK_BYTES, INDEX_FILE, STAGES, expert_file
from tests.fakes.hub import FakeHub, Fault, fake_hub
from tests.fakes.proxy import Proxy, proxy
from tests.test_pipeline import small_config, write_corpus

RAM = "3G"
REPO, TOKEN = "ada/tiny", "hf_good"
OVERRIDES = (
    "model.d_ff=2048",  # a shard of two chunks and a bit
    "train.shared.tokens=24000",
    "train.expert.tokens=8000",
    "train.checkpoint_seconds=0.2",
    "fleet.lease_seconds=120",  # a killed node keeps its lease however slow this machine is
)
#: Bytes from the stalled node that reach the coordinator: more than its small calls and one chunk, less than two chunks.
UPLOAD_LIMIT = CHUNK_BYTES * 3 // 2


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(condition: Callable[[], object], what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


class Fleet:
    """The commands of one coordinator and its nodes, to start, kill and start again."""

    def __init__(self, root: Path, config: Path, hub: FakeHub) -> None:
        self.root, self.address = root, f"127.0.0.1:{_free_port()}"
        self.run_dir = root / "run"
        self._config = config
        self._processes: list[subprocess.Popen[bytes]] = []
        # One thread each, as the run on one machine has: sums in another order would differ in the last bit.
        self._environment = os.environ | {
            "OMP_NUM_THREADS": "1", "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(root / "hf")}  # fmt: skip

    def coordinator(self) -> subprocess.Popen[bytes]:
        return self._start("coordinator", "coordinator.cli", "serve", "--config", str(self._config), "--run-dir",
                           str(self.run_dir), "--listen", self.address, "--push", REPO, "--ram", "3G",
                           "--exit-when-done")  # fmt: skip

    def invite(self) -> None:
        """Let three nodes in."""
        command = [sys.executable, "-m", "coordinator.cli", "token", "create", "--run-dir", str(self.run_dir), "--uses", "3"]
        made = subprocess.run(command, capture_output=True, check=True, text=True)
        self.invitation = made.stdout.strip()

    def node(self, index: int, address: str = "") -> subprocess.Popen[bytes]:
        """Start a node; a second start knows by itself where its coordinator is, and needs no invitation."""
        data_dir = self.root / f"node-{index}"
        known = (data_dir / "coordinators.json").is_file()
        return self._start(f"node-{index}", "node.cli", "join", *([] if known else [address or self.address]), "--ram", RAM,
                           "--threads", "1", "--nice", "0", "--name", f"node-{index}", "--data-dir", str(data_dir),
                           environment={} if known else {"FORGE_TOKEN": self.invitation})  # fmt: skip

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text(errors="replace")

    def events(self, name: str) -> list[dict[str, Any]]:
        """The coordinator's journal; a line that is being written is left out."""
        journal = self.run_dir / "events.jsonl"
        lines = journal.read_text().split("\n")[:-1] if journal.is_file() else []
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _start(self, name: str, module: str, *arguments: str,
               environment: Mapping[str, str] = MappingProxyType({})) -> subprocess.Popen[bytes]:  # fmt: skip
        with open(self.root / f"{name}.log", "ab") as log:
            process = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=log, stderr=log,
                                       env={**self._environment, **environment})  # fmt: skip
        self._processes.append(process)
        return process


@contextmanager
def _fleet(root: Path, config: Path, hub: FakeHub) -> Iterator[Fleet]:
    fleet = Fleet(root, config, hub)
    try:
        yield fleet
    finally:
        fleet.close()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    disable_progress_bars()
    with fake_hub() as hub:
        hub.tokens = {TOKEN}
        yield hub
    huggingface_hub.close_session()
    enable_progress_bars()


def _kill(process: subprocess.Popen[bytes]) -> None:
    assert process.poll() is None, "it ended before it could be killed"
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_everywhere_it_ends_with_the_model_of_one_machine(tmp_path: Path, hub: FakeHub) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(small_config(write_corpus(tmp_path / "corpus.jsonl"), *OVERRIDES).to_yaml())
    with _fleet(tmp_path, path, hub) as fleet, proxy(fleet.address, UPLOAD_LIMIT) as slow_line:
        coordinator = _killed_in_every_stage(fleet)
        fleet.invite()
        nodes = [fleet.node(0), fleet.node(1, slow_line.address), fleet.node(2)]
        _kill_in_training(fleet, nodes[0])
        nodes[0] = fleet.node(0)
        part, size = _kill_in_upload(fleet, nodes[1], slow_line)
        hub.faults.append(Fault("POST .*/commit/", "answer-held"))
        _wait(hub.holding.is_set, "the first expert on the Hub")
        _kill(coordinator)  # It made that commit and does not know.
        hub.let_go.set()
        assert len(hub.repos[REPO].commits) == 2
        assert part.stat().st_size == CHUNK_BYTES

        coordinator = fleet.coordinator()
        # A node that is started anew waits ten seconds for its coordinator, which a busy machine needs to start one.
        _wait(lambda: json.loads((fleet.run_dir / "coordinator.json").read_text())["pid"] == coordinator.pid, "its port")
        nodes[1] = fleet.node(1)
        _wait(lambda: coordinator.poll() is not None, "the end of the run", 300)
        assert coordinator.returncode == 0, fleet.log("coordinator")[-3000:]
        assert [node.wait(30) for node in nodes] == [0, 0, 0]
        assert f"the coordinator holds {CHUNK_BYTES:,} of the shard's {size:,} bytes; going on" in fleet.log("node-1")
        assert size - CHUNK_BYTES <= slow_line.passed < size
    _check_accepted_once(fleet)
    _check_every_commit(fleet, hub, tmp_path / "downloads")
    _check_equal_to_one_machine(tmp_path, path, fleet)


def _killed_in_every_stage(fleet: Fleet) -> subprocess.Popen[bytes]:
    """Kill the coordinator once in each stage, while the stage's process runs; the coordinator that is left."""
    coordinator = fleet.coordinator()
    for stage in STAGES:
        _wait(lambda stage=stage: any(e["stage"] == stage for e in fleet.events("stage-started")), stage)  # type: ignore[misc]
        watched = psutil.Process(coordinator.pid)
        _wait(lambda watched=watched: watched.children(), f"the process of {stage}")  # type: ignore[misc]
        if stage == "shared":
            _wait(lambda: list((fleet.run_dir / "work").rglob("*checkpoint*")), "a checkpoint of the shared components")
        _kill(coordinator)
        assert not (fleet.run_dir / "stages" / f"{stage}.json").exists(), f"{stage} was over before the kill"
        coordinator = fleet.coordinator()
    _wait((fleet.run_dir / "stages" / f"{STAGES[-1]}.json").is_file, "the last stage")
    return coordinator


def _kill_in_training(fleet: Fleet, node: subprocess.Popen[bytes]) -> None:
    _wait(lambda: list((fleet.root / "node-0").rglob("checkpoint.safetensors")), "a checkpoint of node 0")
    _kill(node)
    assert not list((fleet.root / "node-0").rglob("submission.json")), "the training was over before the kill"


def _kill_in_upload(fleet: Fleet, node: subprocess.Popen[bytes], line: Proxy) -> tuple[Path, int]:
    """Kill node 1 while the rest of its shard is on its way; what the coordinator holds, and the shard's size."""
    _wait(line.holding.is_set, "the upload of node 1")
    (path,) = (fleet.root / "node-1").rglob("submission.json")
    submission = json.loads(path.read_text())
    part = fleet.run_dir / "blobs" / "incoming" / f"{submission['sha256']}.part"
    _wait(lambda: part.is_file() and part.stat().st_size == CHUNK_BYTES, "the first chunk of it")
    _kill(node)
    line.cut()
    assert CHUNK_BYTES < submission["size"]
    return part, submission["size"]


def _check_accepted_once(fleet: Fleet) -> None:
    with sqlite3.connect(fleet.run_dir / "forge.db") as database:
        shards = database.execute("select partition, verdict from shards order by partition").fetchall()
    database.close()
    assert shards == [(0, "accepted"), (1, "accepted"), (2, "accepted")]
    assert sorted(event["partition"] for event in fleet.events("accepted")) == [0, 1, 2]
    assert not list(fleet.run_dir.rglob("*.tmp"))
    assert not list(fleet.run_dir.rglob("*.part"))
    for index in range(3):
        assert "Traceback" not in fleet.log(f"node-{index}")
    assert "Traceback" not in fleet.log("coordinator") and "it/s" not in fleet.log("coordinator")
    assert "Going on with partition" in fleet.log("node-0")


def _check_every_commit(fleet: Fleet, hub: FakeHub, directory: Path) -> None:
    """Download the repo as it was after each commit: one accepted shard more, a card, and a model that loads.

    The last commit brings what the final evaluation alone measures into the card: who contributed how much.
    """
    first, *commits = hub.repos[REPO].commits
    assert first.message == "initial commit" and set(first.tree) == {".gitattributes"}
    assert [commit.message for commit in commits] == [
        "1 of 3 experts", "2 of 3 experts", "3 of 3 experts", "3 of 3 experts, final evaluation"]
    changed = {path for path, content in commits[-1].tree.items() if commits[-2].tree.get(path) != content}
    assert changed == {"README.md"}
    tokens = torch.arange(1, 33)[None]
    for number, commit in enumerate(commits, start=1):
        at = Path(huggingface_hub.snapshot_download(REPO, revision=commit.oid, endpoint=hub.endpoint, token=TOKEN,
                                                    local_dir=directory / str(number)))  # fmt: skip
        named = set(json.loads((at / INDEX_FILE).read_text())["weight_map"].values())
        assert all((at / name).is_file() for name in named)
        experts = arrived(at)
        assert len(experts) == min(number, 3)
        assert all(hash_file(at / expert_file(index)) == sha256 for index, sha256 in experts.items())
        assert f"# {load_config(str(fleet.run_dir / 'run.yaml')).name}" in (at / "README.md").read_text()
        assert AutoTokenizer.from_pretrained(at)("The wave").input_ids
        with torch.inference_mode():
            logits = AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32)(tokens).logits
        assert torch.isfinite(logits).all()
    for file in (fleet.run_dir / "model").iterdir():
        assert file.read_bytes() == (at / file.name).read_bytes()


def _check_equal_to_one_machine(root: Path, config: Path, fleet: Fleet) -> None:
    alone = root / "alone"
    pipeline.run_all(alone, load_config(str(config)), ram_bytes=3 << 30, threads=1, device="cpu", on_event=lambda _: None)
    for name in ("shared.safetensors", "router.safetensors"):
        assert hash_file(alone / "model" / name) == hash_file(fleet.run_dir / "model" / name), f"{name} differs"
    for index in range(3):
        theirs, ours = (load_file(d / "model" / expert_file(index)) for d in (fleet.run_dir, alone))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in ours), f"expert {index} differs"
    report = json.loads((fleet.run_dir / "reports" / "evaluation.json").read_text())
    assert report["rows"][-1]["experts"] == 3
