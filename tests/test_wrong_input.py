"""Wrong input, as a person types it: one sentence, a documented exit code, and nothing half-written.

Real processes on real disks: the full and the read-only ones are mounted in a namespace (`tests/disk.py`), the
coordinator and its nodes talk over real sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
import json
from pathlib import Path
import shutil
import socket
import subprocess
import sys
import time
from typing import Any

import pytest
from safetensors import safe_open

from forge.checkpoint.assembly import arrived
from forge.checkpoint.shard import write_shard
from forge.errors import BY_CODE
from forge.files import RunDirectory, hash_file
from forge.invitation import Invitation
from forge.vocabulary import PROTOCOL_VERSION
from node.cache import Cache, Submission
from node.client import FleetClient
from node.identity import Identity
from node.link import Link
from node.machine import MachineProfile
from node.messages import Assignment
from tests.commands import DOCUMENTED, Outcome, is_one_sentence, run, start, tree, worked, write_inputs
from tests.conftest import Road
from tests.disk import Disk, disk, why_not

needs_disk = pytest.mark.skipif(bool(why_not()), reason=why_not())
SERVE = "forge-coordinator serve --config tiny.yaml --listen 127.0.0.1:0"
#: Output that goes to a file, as Windows has it.
WINDOWS = {"PYTHONIOENCODING": "cp1252"}


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A directory with `tiny.yaml`, its corpus and files that are wrong in one way each."""
    return write_inputs(tmp_path)


def test_every_exit_code_is_documented() -> None:
    assert {name: kind.exit_code for name, kind in BY_CODE.items()}.items() <= DOCUMENTED.items()


# What is wrong when the command is typed ------------------------------------------------------------------------------

WRONG = [
    # what is typed, the name of its exit code, words of the sentence
    ("forge run tiny.yaml model.top_kk=1", "config", ["'model.top_kk'", "did you mean 'model.top_k'?"]),
    ("forge run tiny.yaml train.batch_size=many", "config", ["tiny.yaml", "train.batch_size", "integer"]),
    ("forge run broken.yaml", "config", ["broken.yaml, line 3", "not valid YAML"]),
    ("forge run list.yaml", "config", ["list.yaml must be a YAML mapping", "`model:`"]),
    ("forge run nowhere.yaml", "config", ["no config file nowhere.yaml", "billion, default, smoke"]),
    ("forge run tiny.yaml data.source=nowhere.txt", "data", ["no file nowhere.txt", "data.source takes a path"]),
    ("forge run tiny.yaml data.source=empty.txt", "data", ["empty.txt has no text", "empty or blank"]),
    ("forge run tiny.yaml data.source=blank.txt", "data", ["blank.txt has no text", "empty or blank"]),
    ("forge run tiny.yaml data.source=small.txt", "data", ["1 documents", "model.n_experts: 2", "use more text"]),
    ("forge run tiny.yaml data.source=deep.jsonl", "data", ["deep.jsonl, line 1 is not valid JSON"]),
    ("forge data inspect small.txt --max-bytes 0.5", "config", ["'0.5' is not a size"]),
    ("forge run tiny.yaml --device mps", "config", ["--device mps is not available", "--device auto"]),
    ("forge run tiny.yaml --ram 64M", "memory", ["--ram allows 64M", "use --ram ", "M or more."]),
    ("forge run tiny.yaml --ram 900T", "memory", ["--ram asks for 921600.0G", "give at most --ram"]),
    ("forge run tiny.yaml --ram much", "config", ["'much' is not a size", "8G"]),
    ("forge run tiny.yaml --run-dir small.txt", "storage", ["small.txt", "Not a directory", "choose another"]),
    ("forge run tiny.yaml --run-dir /proc/run", "storage", ["/proc/run", "choose another"]),
    (f"{SERVE} model.top_kk=1", "config", ["'model.top_kk'", "did you mean 'model.top_k'?"]),
    ("forge-coordinator serve --config broken.yaml", "config", ["broken.yaml, line 3", "not valid YAML"]),
    (f"{SERVE} data.source=blank.txt", "data", ["blank.txt has no text", "empty or blank"]),
    (f"{SERVE} data.source=small.txt", "data", ["1 documents", "model.n_experts: 2", "use more text"]),
    (f"{SERVE} --ram 64M", "memory", ["--ram allows 64M", "use --ram ", "M or more."]),
    (f"{SERVE} --ram 900T", "memory", ["--ram asks for 921600.0G", "give at most --ram"]),
    ("forge-coordinator serve tiny.yaml", "config", ["'tiny.yaml' is no KEY=VALUE", "did you mean --config tiny.yaml?"]),
    (f"{SERVE} --run-dir /proc/run", "storage", ["/proc/run", "choose another"]),
    ("forge-coordinator serve --config tiny.yaml --listen here", "config", ["--listen 'here'", "HOST:PORT"]),
    (f"{SERVE} --push tiny", "config", ["'tiny' must look like USER/REPO"]),
    ("forge-coordinator push ada/tiny --run-dir nowhere", "storage", ["nowhere has no model yet", "once its run is prepared"]),
    ("forge-coordinator status", "network", ["No coordinator runs in a directory below runs", "start one"]),
    ("forge-coordinator status --run-dir nowhere", "network", ["No coordinator runs in nowhere", "start one"]),
    ("forge-coordinator token create --run-dir nowhere", "config", ["nobody knows its address", "--address HOST:PORT"]),
    ("forge-coordinator token create --run-dir nowhere --expires soon", "config", ["--expires 'soon'", "7d"]),
    ("forge-coordinator token create --run-dir nowhere --address here", "config", ["--address 'here'", "HOST:PORT"]),
    ("forge-coordinator token list --run-dir nowhere", "storage", ["nowhere is not a coordinator's run directory"]),
    ("forge-coordinator nodes revoke me --run-dir nowhere", "storage", ["nowhere is not a coordinator's run directory"]),
    ("forge-coordinator serve --config tiny.yaml --listen 0.0.0.0:0 --insecure", "config", ["0.0.0.0", "say it twice"]),
    ("forge-node join forge1_AbCdEf", "config", ["damaged or not complete", "copy the whole string"]),
    ("forge-node join 127.0.0.1 --token secret", "config", ["damaged or not complete", "begins with forge1_"]),
    ("forge-node join 192.0.2.1 --insecure", "config", ["--insecure", "192.0.2.1", "say it twice"]),
    ("forge-node join http://here", "config", ["'http://here'", "HOST:PORT"]),
    ("forge-node join 127.0.0.1 --ram much", "config", ["'much' is not a size", "8G"]),
    ("forge-node join 127.0.0.1 --ram 900T", "memory", ["--ram asks for", "give at most --ram"]),
    ("forge-node join 127.0.0.1 --data-dir /proc/node", "storage", ["/proc/node", "choose another"]),
]  # fmt: skip


@pytest.mark.parametrize(("command", "code", "words"), WRONG, ids=[command for command, _, _ in WRONG])
def test_a_wrong_command(command: str, code: str, words: list[str], desk: Path) -> None:
    with socket.socket() as nobody:  # A port that is taken and never answered.
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        before = tree(desk)
        outcome = run(command.replace("NOBODY", address), desk)
    is_one_sentence(outcome, code, *(word.replace("NOBODY", address) for word in words))
    assert tree(desk) == before


def test_a_coordinator_that_is_down(desk: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        invitation = Invitation(addresses=[address], fingerprint=bytes(32), secret=bytes(32)).encode()
        outcome = run(f"forge-node join {invitation} --ram 1G --data-dir node", desk)
    is_one_sentence(outcome, "network", f"No coordinator answers at {address}", "start one there", "check the address")
    assert "trying again in" in outcome.out
    assert set(tree(desk / "node")) == {"node.key", "node.lock"}


def test_a_node_that_nobody_invited(desk: Path) -> None:
    outcome = run("forge-node join 127.0.0.1 --ram 1G --data-dir node", desk)
    is_one_sentence(outcome, "access", "has not joined a coordinator before", "`forge-coordinator token create`")
    assert set(tree(desk / "node")) == {"node.key", "node.lock"}


def test_the_mended_command_begins_in_the_same_directory(desk: Path) -> None:
    is_one_sentence(run("forge prepare tiny.yaml data.source=blank.txt", desk), "data", "blank.txt")
    assert "prepared 60 documents" in worked(run("forge prepare tiny.yaml", desk)).out
    before = tree(desk)
    is_one_sentence(run("forge train tiny.yaml model.n_experts=3", desk), "run-mismatch",
                    "runs/tiny holds the run 'tiny' with another config (model.n_experts: 2 there, 3 here)",
                    "choose another run directory")  # fmt: skip
    is_one_sentence(run("forge train tiny.yaml --ram 64M", desk), "memory", "--ram allows 64M")
    assert tree(desk) == before
    assert "prepared 60 documents" in worked(run("forge prepare tiny.yaml", desk)).out


def test_files_that_were_there_stay(desk: Path) -> None:
    (desk / "run").mkdir()
    (desk / "run" / "notes.txt").write_text("mine")
    is_one_sentence(run("forge run tiny.yaml data.source=blank.txt --run-dir run", desk), "data", "blank.txt")
    assert (desk / "run" / "notes.txt").read_text() == "mine"


# A disk that is full or read-only -------------------------------------------------------------------------------------


@needs_disk
def test_a_full_disk_under_a_whole_run(road: Road) -> None:
    outcome, left = road.full["prepare"]
    is_one_sentence(outcome, "storage", "The disk that holds disk/run", "is full: free some space")
    assert left == {}
    outcome, left = road.full["checkpoint"]
    is_one_sentence(outcome, "storage", "disk/run/work/shared/checkpoint.safetensors is full: free some space")
    assert [path for path in left if path.startswith("run/stages/")] == ["run/stages/prepare.json"]
    assert not [path for path in left if path.endswith((".tmp", "checkpoint.safetensors"))]
    outcome, left = road.full["nowhere"]
    assert "2 experts (final)" in worked(outcome).out
    assert not [path for path in left if path.endswith(".tmp")]


@needs_disk
def test_a_read_only_disk(road: Road, tmp_path: Path) -> None:
    (desk := tmp_path / "desk").mkdir()
    for name in ("tiny.yaml", "corpus.jsonl"):
        shutil.copy(road.desk / name, desk)
    with disk(desk / "disk", "8m") as readonly:
        shutil.copytree(road.desk / "run", readonly.seen / "run")
        readonly.remount("ro")
        before = tree(readonly.seen)
        for command in ("forge run tiny.yaml --run-dir disk/new", "forge run tiny.yaml --run-dir disk/run",
                        f"{SERVE} --run-dir disk/run", "forge-node join 127.0.0.1 --data-dir disk/node"):  # fmt: skip
            is_one_sentence(run(command, desk, readonly), "storage", "/disk/" if "forge run" not in command else "disk/",
                            "read-only", "choose another directory")  # fmt: skip
        assert tree(readonly.seen) == before
        readonly.remount("rw")
        assert "2 of 2 experts" in worked(run("forge train tiny.yaml --run-dir disk/run", desk, readonly)).out


@needs_disk
def test_a_full_disk_under_a_new_coordinator(desk: Path) -> None:
    with disk(desk / "disk", "60k") as full:
        for size, where in (("60k", "disk/run/forge.db"), ("200k", "disk/run/data")):
            full.remount(f"size={size}")
            outcome = run(f"{SERVE} --run-dir disk/run", desk, full)
            is_one_sentence(outcome, "storage", f"{where} is full: free some space")
            assert tree(full.seen) == {}


@needs_disk
def test_a_full_disk_under_a_new_node(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "64k") as full:
        ballast = full.fill()
        outcome = run("forge-node join 127.0.0.1:9 --data-dir disk/node", tmp_path, full)
        is_one_sentence(outcome, "storage", "disk/node", "is full: free some space")
        ballast.unlink()
        assert not [path for path in tree(full.seen) if path != "node"]


# A coordinator and its nodes ------------------------------------------------------------------------------------------


@dataclass
class Fleet:
    """A coordinator that waits for the experts of a run whose stages are finished."""

    desk: Path
    run: RunDirectory
    address: str
    #: An invitation for every node of the tests.
    token: str
    process: subprocess.Popen[str]
    log: Path
    disk: Disk | None
    #: Shards that are good, by partition.
    shards: dict[int, Path]

    def says(self, words: str, seconds: float = 60.0) -> None:
        """Wait until the coordinator has printed these words."""
        deadline = time.monotonic() + seconds
        while words not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def partitions(self) -> list[dict[str, Any]]:
        """What the coordinator says of them."""
        status = json.loads(worked(run("forge-coordinator status --run-dir disk/run --json", self.desk, self.disk)).out)
        return list(status["partitions"])

    def finished_node(self, name: str, spoil: Callable[[Path, Path], object]) -> str:
        """The command of a node that has trained an expert, whose shard `spoil` copies from a good one."""
        data_dir = self.desk / name
        identity = Identity.open(data_dir)
        link = Link(data_dir=data_dir, invitation=Invitation.parse(self.token))
        client = FleetClient(link, identity=identity, name=name, ram_bytes=1 << 30, on_wait=print)
        joined = client.join(MachineProfile.measure("cpu"))
        work = client.lease([])
        client.close()
        assert isinstance(work, Assignment)
        cache = Cache(data_dir, joined.run.run_id)
        shard = cache.begin(work, {"run_id": joined.run.run_id}) / "shard.safetensors"
        spoil(self.shards[work.partition], shard)
        submission = Submission(lease_id=work.lease_id, partition=work.partition, sha256=hash_file(shard),
                                size=shard.stat().st_size, shard=str(shard), manifest="")  # fmt: skip
        manifest = asdict(submission) | {
            "run_id": joined.run.run_id, "tokens_seen": 8192, "shared_sha256": work.shared.sha256,
            "config_fingerprint": joined.run.config_fingerprint}  # fmt: skip
        cache.submit(Submission(**asdict(submission) | {"manifest": json.dumps(manifest)}))
        return f"forge-node join --ram 1G --threads 1 --nice 0 --once --data-dir {name}"


@pytest.fixture(scope="module")
def fleet(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """On a disk of its own, so that it can be filled, where there is one."""
    desk = tmp_path_factory.mktemp("fleet")
    shutil.copy(road.desk / "run" / "run.yaml", desk / "tiny.yaml")
    finished = RunDirectory(road.desk / "run")
    shards = {index: finished.blobs.path(sha256) for index, sha256 in arrived(finished.model).items()}

    def serve(mounted: Disk | None) -> Iterator[Fleet]:
        seen = mounted.seen if mounted is not None else desk / "disk"
        for part in ("run.yaml", "run.json", "stages", "data", "work", "blobs"):
            source = finished.root / part
            shutil.copytree(source, seen / "run" / part) if source.is_dir() else shutil.copy(source, seen / "run")
        for shard in shards.values():
            (seen / "run" / "blobs" / shard.name).unlink()
        log = desk / "log"
        process = start(f"{SERVE} --run-dir disk/run", desk, mounted, output=log, environment=WINDOWS)
        fleet = Fleet(desk, RunDirectory(seen / "run"), "", "", process, log, mounted, shards)
        try:
            fleet.says("nodes can train experts now")
            fleet.address = json.loads((seen / "run" / "coordinator.json").read_text())["address"]
            made = run("forge-coordinator token create --run-dir disk/run --uses 20", desk, mounted)
            assert made.code == 0, made
            fleet.token = made.out.strip()
            yield fleet
        finally:
            process.terminate()
            process.wait()

    if why_not():
        (desk / "disk" / "run").mkdir(parents=True)
        yield from serve(None)
    else:
        with disk(desk / "disk", "8m") as mounted:
            (mounted.seen / "run").mkdir()
            yield from serve(mounted)


def test_a_coordinator_of_another_version(fleet: Fleet) -> None:
    other = ("import forge.vocabulary as words; words.PROTOCOL_VERSION = 99; from node.cli import main; "
             f"main(['join', '{fleet.token}', '--ram', '1G', '--data-dir', 'other'])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", other], cwd=fleet.desk, capture_output=True, text=True)
    is_one_sentence(Outcome(done.returncode, done.stdout, done.stderr), "protocol",
                    f"coordinator speaks version {PROTOCOL_VERSION}", "this node version 99",
                    "install the same version")  # fmt: skip
    assert set(tree(fleet.desk / "other")) == {"node.key", "node.lock"}


def test_too_little_memory_for_the_run(fleet: Fleet) -> None:
    before = fleet.partitions()
    outcome = run(f"forge-node join {fleet.token} --ram 64M --data-dir poor", fleet.desk)
    is_one_sentence(outcome, "memory", "--ram allows 64M", "use --ram ", "M or more.")
    assert set(tree(fleet.desk / "poor")) == {"node.key", "node.lock", "coordinators.json"}
    assert fleet.partitions() == before


def test_a_port_in_use(fleet: Fleet) -> None:
    command = f"forge-coordinator serve --config tiny.yaml --listen {fleet.address} --run-dir second"
    is_one_sentence(run(command, fleet.desk), "network", f"Cannot listen on {fleet.address}", "another one with --listen")
    assert not (fleet.desk / "second").exists()


@pytest.mark.parametrize("command", [SERVE, "forge run tiny.yaml"])
def test_a_run_directory_in_use(fleet: Fleet, command: str) -> None:
    outcome = run(f"{command} --run-dir disk/run", fleet.desk, fleet.disk)
    is_one_sentence(outcome, "storage", "Another forge or forge-coordinator works in", "disk/run",
                    "choose another run directory")  # fmt: skip
    assert (fleet.run.root / "coordinator.json").is_file() and fleet.partitions()


def _rewrite(source: Path, target: Path, *, poison: bool = False, **changed: str) -> None:
    with safe_open(source, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        metadata = file.metadata() | changed
    if poison:
        next(iter(tensors.values()))[0, 0] = float("nan")
    write_shard(target, tensors, metadata)


BAD_SHARDS: dict[str, tuple[Callable[[Path, Path], object], list[str]]] = {
    "with a NaN": (lambda good, bad: _rewrite(good, bad, poison=True), ["not finite in the tensor model.layers.0."]),
    "truncated": (lambda good, bad: bad.write_bytes(good.read_bytes()[:-1000]), ["truncated"]),
    "for another run": (lambda good, bad: _rewrite(good, bad, run_id="0" * 32), ["belongs to another run"]),
}  # fmt: skip


def _kept(fleet: Fleet) -> dict[str, str]:
    """The files of the run that a shard may change."""
    return {path: content for path, content in tree(fleet.run.root).items()
            if content and path.startswith(("blobs/", "model/", "stages/"))}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_SHARDS)
def test_a_bad_shard(kind: str, fleet: Fleet) -> None:
    spoil, words = BAD_SHARDS[kind]
    before = _kept(fleet)
    name = kind.replace(" ", "-")
    outcome = run(fleet.finished_node(name, spoil), fleet.desk)
    is_one_sentence(outcome, "shard", "The coordinator rejected the shard of this node", *words)
    assert _kept(fleet) == before
    assert "Traceback" not in fleet.log.read_text()
    left = [path for path in tree(fleet.desk / name) if "partition-" in path or path.endswith((".part", ".tmp"))]
    assert left == []
    assert {part["state"] for part in fleet.partitions()} == {"open"}


def test_a_name_that_the_output_cannot_encode(fleet: Fleet) -> None:
    name = "\u540d\u524d"
    command = fleet.finished_node(name, lambda good, bad: bad.write_bytes(good.read_bytes()[:-2000]))
    outcome = run(f"{command} --name {name}", fleet.desk, environment=WINDOWS)
    is_one_sentence(outcome, "shard", "The coordinator rejected the shard of this node", "truncated")
    assert "Joined the run 'tiny' as ?? on" in outcome.out
    for words in ("?? joined", "?? trains expert", "?? handed expert", "of ?? is rejected"):
        fleet.says(words)
    events = map(json.loads, (fleet.run.root / "events.jsonl").read_text().splitlines())
    assert f"{name} joined" in [event.get("sentence") for event in events]
    assert "/??.txt" in worked(run(f"forge config tiny.yaml data.source=/{name}.txt", fleet.desk, environment=WINDOWS)).out


@needs_disk
def test_a_full_disk_under_a_download(fleet: Fleet, tmp_path: Path) -> None:
    command = f"forge-node join {fleet.token} --ram 1G --threads 1 --nice 0 --once --data-dir disk"
    with disk(tmp_path / "disk", "1m") as small:
        outcome = run(command, tmp_path, small)
        is_one_sentence(outcome, "storage", "The disk that holds", "disk/blobs is full", "MB are needed", "free some space")
        assert not [path for path in tree(small.seen) if path.endswith((".part", ".tmp"))]
        assert {part["state"] for part in fleet.partitions()} == {"open"}
        small.remount("size=100m")
        assert "One shard is handed in and accepted" in worked(run(command, tmp_path, small)).out


@needs_disk
def test_a_full_disk_under_an_upload(fleet: Fleet) -> None:
    assert fleet.disk is not None
    command = fleet.finished_node("patient", shutil.copy)
    ballast = fleet.disk.fill(leave=40 << 10)  # Room for the database's next pages, and less than a shard.
    with start(command, fleet.desk) as node:
        try:
            fleet.says("blobs is full: a shard of")
            assert not list(fleet.run.blobs.directory.rglob("*.part"))
            assert node.poll() is None
            ballast.unlink()
            out, err = node.communicate(timeout=90)
        finally:
            node.kill()
    assert "cannot use its disk" in out and "the shard is accepted" in out
    worked(Outcome(node.returncode, out, err))
    assert "Traceback" not in fleet.log.read_text()
