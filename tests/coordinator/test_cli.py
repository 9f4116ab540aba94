from __future__ import annotations

import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Any

from click.testing import CliRunner
import pytest

from coordinator.admin import INFO_FILE, describe, find_run
from coordinator.cli import main
from forge.errors import NetworkError
from forge.vocabulary import DATABASE_FILE, LOCK_FILE

from .conftest import World
from .fakes import make_shard, until


def test_status_shows_partitions_nodes_and_perplexities(world: World) -> None:
    assert world.coordinator is not None
    node = world.node("laptop")
    assignment, shard = node.lease(1), make_shard(world.run, 1)
    node.heartbeat(assignment.lease_id)
    shown = CliRunner().invoke(main, ["status", "--run-dir", str(world.root)])
    assert shown.exit_code == 0
    assert "3/9" in shown.output
    node.heartbeat(assignment.lease_id, activity="downloading", step=143, steps=814)  # Bytes.
    assert "143/814" not in CliRunner().invoke(main, ["status", "--run-dir", str(world.root)]).output
    node.hand_in(assignment, shard, world.run_id)
    node.verdict(assignment, shard, world.run_id)
    until(lambda: world.jobs.calls.count("evaluate") == 2 and "with 1 of " in CliRunner().invoke(
        main, ["status", "--run-dir", str(world.root)]).output)
    answer = json.loads(CliRunner().invoke(main, ["status", "--json", "--run-dir", str(world.root)]).output)
    assert answer["partitions"][1] | {"progress": None} == {
        "partition": 1, "state": "accepted", "tokens": "1001", "node_name": "laptop", "loss": 3.0, "shared_loss": 3.5,
        "last_rejection": [], "progress": None}  # fmt: skip
    assert answer["nodes"][0]["accepted"] == 1
    assert [row["mean_perplexity"] for row in answer["evaluations"]] == [100.0, 99.0]


def test_a_contribution_that_was_not_measured_is_left_out() -> None:
    contributors = [{"name": "ada", "nats": 0.25, "experts": [{"partition": 0, "nats": 0.25}]},
                    {"name": "bob", "nats": None, "experts": [{"partition": 1, "nats": None}]}]  # fmt: skip
    status: dict[str, Any] = {
        "run": {"name": "tiny", "run_id": "0", "phase": "experts"}, "activity": "", "partitions": [], "nodes": [],
        "evaluations": [], "snapshot": {"contributors": contributors}}  # fmt: skip
    assert [line for line in describe(status).splitlines() if "contribution" in line] == [
        "contribution of ada: +0.2500 nats a token, by expert 0 (+0.2500)"]  # fmt: skip


def test_a_coordinator_that_was_killed_does_not_run(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    killed = Path("runs", "killed")
    killed.mkdir(parents=True)
    Path("runs", "tiny").symlink_to(world.root)
    left = (world.root / INFO_FILE).read_bytes()
    (killed / INFO_FILE).write_bytes(left)
    for file in (LOCK_FILE, DATABASE_FILE):
        (killed / file).touch()
    assert find_run(None) == Path("runs", "tiny")
    world.stop()
    (world.root / INFO_FILE).write_bytes(left)
    with pytest.raises(NetworkError, match="No coordinator runs"):
        find_run(None)


def test_the_command_starts_quickly_and_never_imports_torch() -> None:
    code = "import coordinator.cli, coordinator.admin, sys; print([m for m in ('torch', 'grpc', 'sqlalchemy') if m in sys.modules])"  # noqa: E501
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "[]\n"


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_stops_it_cleanly(number: int, code: int, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("a few words\n" * 50_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "coordinator.cli", "serve", "--config", "smoke", "--listen", "127.0.0.1:0", "--run-dir",
         str(tmp_path / "run"), f"data.source={tmp_path}/empty.txt"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True)  # fmt: skip
    until(lambda: (tmp_path / "run" / "coordinator.json").exists(), 20)
    process.send_signal(number)
    begun = time.monotonic()
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (code, "")
    assert "goes on from here" in output
    assert time.monotonic() - begun < 10
    assert not (tmp_path / "run" / "coordinator.json").exists()
