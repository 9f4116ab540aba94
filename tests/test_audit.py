"""An audit of training, with a coordinator and nodes as real processes: who trained passes, who made checkpoints up does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
import json
from pathlib import Path
import shutil
import subprocess
import time
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
import torch

from forge.checkpoint.assembly import arrived
from forge.config import RunConfig, load_config
from forge.files import RunDirectory, hash_file
from forge.invitation import Invitation
from forge.model import names
from forge.train.replay import TOLERANCE
from forge.vocabulary import kept_file
from node.cache import Cache, Submission
from node.client import FleetClient
from node.identity import Identity
from node.link import Link
from node.machine import MachineProfile
from node.messages import Assignment
from tests.commands import Outcome, run, start, worked
from tests.conftest import Road

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Fleet:
    """A coordinator that audits every shard of a run whose stages are finished, and experts that were trained for it before."""

    desk: Path
    root: Path
    process: subprocess.Popen[str]
    token: str
    experts: Mapping[int, Path]
    config: RunConfig

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.root)

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = (self.root / "events.jsonl").read_text().split("\n")[:-1]
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def join(self, name: str) -> Outcome:
        """A real node, until one shard has its verdict."""
        own = f"--data-dir {name} --name {name}"
        return run(f"forge-node join {self.token} --ram 1G --threads 1 --nice 0 --once {own}", self.desk)

    def forger(self, name: str, make: Callable[[Fleet, int, Path], None]) -> tuple[int, Outcome]:
        """A real node with a stolen expert, good as it is, and checkpoints that `make` made up; its partition and its end."""
        data_dir = self.desk / name
        identity = Identity.open(data_dir)
        client = FleetClient(Link(data_dir=data_dir, invitation=Invitation.parse(self.token)), identity=identity, name=name,
                             ram_bytes=1 << 30, on_wait=print)  # fmt: skip
        joined = client.join(MachineProfile.measure("cpu"))
        work = leased(client)
        client.close()
        directory = Cache(data_dir, joined.run.run_id).begin(work, {"run_id": joined.run.run_id})
        shard = directory / "shard.safetensors"
        shutil.copy(self.experts[work.partition], shard)
        make(self, work.partition, directory)
        submission = Submission(lease_id=work.lease_id, partition=work.partition, sha256=hash_file(shard),
                                size=shard.stat().st_size, shard=str(shard), manifest="")  # fmt: skip
        manifest = asdict(submission) | {
            "run_id": joined.run.run_id, "tokens_seen": 8192, "shared_sha256": work.shared.sha256,
            "config_fingerprint": joined.run.config_fingerprint,
            "checkpoints": {str(step): hash_file(directory / kept_file(step)) for step in self.config.audit_steps()
                            if (directory / kept_file(step)).is_file()}}  # fmt: skip
        Cache(data_dir, joined.run.run_id).submit(Submission(**asdict(submission) | {"manifest": json.dumps(manifest)}))
        return work.partition, self.join(name)


def leased(client: FleetClient) -> Assignment:
    """A lease, when the one of whoever was refused before has come back."""
    deadline = time.monotonic() + 120
    while not isinstance(work := client.lease([]), Assignment):
        assert time.monotonic() < deadline, work
        time.sleep(0.2)
    return work


def line(fleet: Fleet, partition: int, directory: Path) -> None:
    """Points on the line from the shared FFN to the stolen expert, with no momentum."""
    ffn = names.ffn_tensors(fleet.config.model)
    start = load_file(fleet.run.blobs.path((fleet.run.marker("publish") or {})["shared_ffn"]["sha256"]))
    stolen = load_file(fleet.experts[partition])
    end = dict(zip(ffn, (stolen[name] for name in names.expert_tensors(fleet.config.model, partition)), strict=True))
    for step in fleet.config.audit_steps():
        share = step / fleet.config.steps("expert")
        save(directory / kept_file(step), {name: torch.lerp(start[name], end[name], share) for name in ffn}, step)


def save(path: Path, weights: Tensors, step: int) -> None:
    tensors = {f"model.{name}": value.contiguous() for name, value in weights.items()}
    momenta = {f"optimizer.{name}.momentum_buffer": torch.zeros_like(value) for name, value in weights.items()}
    save_file(tensors | momenta, path, {"facts": json.dumps({"step": step})})


@pytest.fixture(scope="module")
def fleet(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    desk = tmp_path_factory.mktemp("audit")
    finished = RunDirectory(road.desk / "run")
    experts = {partition: finished.blobs.path(sha256) for partition, sha256 in arrived(finished.model).items()}
    shutil.copy(finished.root / "run.yaml", desk / "tiny.yaml")
    for part in ("run.yaml", "run.json", "stages", "data", "work", "blobs"):
        source = finished.root / part
        (desk / "run").mkdir(exist_ok=True)
        shutil.copytree(source, desk / "run" / part) if source.is_dir() else shutil.copy(source, desk / "run")
    for shard in experts.values():
        (desk / "run" / "blobs" / shard.name).unlink()
    overrides = ["fleet.audit=1", "fleet.audit_parts=4"]
    log = desk / "log"
    process = start(f"forge-coordinator serve --config tiny.yaml --listen 127.0.0.1:0 --run-dir run {' '.join(overrides)}", desk,
                    output=log)  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while "nodes can train experts now" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        made = run("forge-coordinator token create --run-dir run --uses 9", desk)
        assert made.code == 0, made
        yield Fleet(desk, desk / "run", process, made.out.strip(), experts, load_config(str(desk / "tiny.yaml"), overrides))
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_who_made_checkpoints_up_is_refused_and_who_trained_is_not(fleet: Fleet) -> None:
    partition, refused = fleet.forger("forger", line)
    assert refused.code != 0 and "it was not trained as it says: steps" in refused.err, refused
    assert "the coordinator repeats a part of the training and asks for a checkpoint of it" in refused.out
    (event,) = fleet.events("audited")
    assert max(event["distance"], event["momentum"]) > TOLERANCE and event["node"] == "forger" and event["partition"] == partition
    status = json.loads(worked(run("forge-coordinator status --run-dir run --json", fleet.desk)).out)
    assert next(node for node in status["nodes"] if node["name"] == "forger")["rejected"] == 1

    before = {path.name for path in fleet.run.blobs.directory.iterdir()}
    honest = fleet.join("honest")
    assert honest.code == 0 and "the shard is accepted" in honest.out, honest
    event = fleet.events("audited")[-1]
    assert event["node"] == "honest" and event["distance"] < 0.05, event
    new = {path.name for path in fleet.run.blobs.directory.iterdir()} - before
    assert len([name for name in new if len(name) == 64]) == 1, "of an audit nothing stays but the shard"


def nothing(fleet: Fleet, partition: int, directory: Path) -> None:
    """Commit to nothing."""


@pytest.mark.slow
def test_a_shard_without_a_word_on_its_checkpoints_is_refused(fleet: Fleet) -> None:
    _, refused = fleet.forger("silent", nothing)
    assert refused.code != 0 and "This run audits, and the manifest does not name the checkpoints" in refused.err, refused


@pytest.mark.slow
def test_only_checkpoints_of_the_training_leave_a_node_and_none_is_handed_over(fleet: Fleet) -> None:
    """What the other tests leave open is asked of the wire: an unfinished expert of this run goes to nobody."""
    data_dir = fleet.desk / "leaver"
    identity = Identity.open(data_dir)
    client = FleetClient(Link(data_dir=data_dir, invitation=Invitation.parse(fleet.token)), identity=identity, name="leaver",
                         ram_bytes=1 << 30, on_wait=print)  # fmt: skip
    client.join(MachineProfile.measure("cpu"))
    work = leased(client)
    checkpoint = data_dir / "checkpoint.safetensors"
    with safe_open(fleet.run.blobs.path(work.shared_ffn.sha256), framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in names.ffn_tensors(fleet.config.model)}
    save(checkpoint, weights, 1)
    with pytest.raises(Exception, match="an unfinished one is not handed over"):
        client.hand_over(work.lease_id, checkpoint)
    client.release(work.lease_id, "done")
    client.close()
