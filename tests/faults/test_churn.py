"""Nodes that are killed, that leave and that come, as real processes: every partition is accepted once, and nothing is lost."""

from __future__ import annotations

from contextlib import closing
import json
import os
from pathlib import Path
import sqlite3
import subprocess
import sys
import time

import pytest

from coordinator.invite import create_token
from coordinator.state import ELSEWHERE
from forge.files import RunDirectory
from tests.coordinator.fakes import until
from tests.faults.network import Line
from tests.faults.sweep import ROOT, Outcome, check_end, free_address
from tests.faults.work import HOLD_FILE, INVITATION_FILE, LISTEN_FILE

#: Seconds for a process to get somewhere, on a machine that does much else.
PATIENCE = 150.0


class Fleet:
    """The processes of a run in `root`."""

    def __init__(self, root: Path) -> None:
        self.root, self.running = root, dict[str, subprocess.Popen[bytes]]()
        self.address = free_address()
        (root / LISTEN_FILE).write_text(self.address)
        self.invite(self.address)

    def invite(self, address: str) -> None:
        """Have the nodes that come now find the coordinator there."""
        text, _ = create_token(self.root / "run", uses=9, expires="7d", name="", addresses=[address])
        (self.root / INVITATION_FILE).write_text(text)

    def end(self, names: tuple[str, ...]) -> None:
        """Wait for processes to end well."""
        for name in names:
            assert self.running[name].wait(PATIENCE) == 0, self.said(name)

    def stop(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()

    def start(self, name: str) -> None:
        role = "coordinator" if name == "coordinator" else "node"
        command = [sys.executable, "-m", "tests.faults.work", role, str(self.root), str(self.root / f"{name}.log")]
        with open(self.root / f"{name}.out", "ab") as out:
            self.running[name] = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=os.environ | {
                "OMP_NUM_THREADS": "1", "FAULTS_NODE": name, "FAULTS_LEASE": "5"})  # fmt: skip

    def said(self, name: str) -> str:
        return (self.root / f"{name}.out").read_text(errors="replace")

    def events(self, name: str) -> list[dict[str, object]]:
        journal = self.root / "run" / "events.jsonl"
        lines = journal.read_text().split("\n")[:-1] if journal.is_file() else []
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def tell(self, name: str, *words: str) -> str:
        command = [sys.executable, "-m", "node.cli", *words, "--data-dir", str(self.root / name)]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    def trained(self, name: str) -> list[Path]:
        return list((self.root / name).rglob("checkpoint.safetensors"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_nodes_die_leave_and_come(tmp_path: Path) -> None:
    (tmp_path / HOLD_FILE).touch()
    fleet = Fleet(tmp_path)
    try:
        fleet.start("coordinator")
        until((tmp_path / "run" / "coordinator.json").is_file, PATIENCE)
        for name in ("ada", "ben", "cleo"):
            fleet.start(name)
        until(lambda: all(fleet.trained(name) for name in ("ada", "ben", "cleo")), PATIENCE)
        assert "leaves when the current expert is handed over" in fleet.tell("ben", "finish", "--now")
        assert fleet.running["ben"].wait(PATIENCE) == 0, fleet.said("ben")
        (left,) = fleet.events("handed-over")
        assert left["node"] == "ben" and left["step"] == 1 and fleet.trained("ben") == []
        fleet.running["ada"].kill()  # For good: its lease expires.
        for name in ("dora", "emil"):
            fleet.start(name)
        words = f"Partition {left['partition']} was left at step 1."
        until(lambda: any(words in fleet.said(name) for name in ("dora", "emil")), PATIENCE)
        fleet.running["cleo"].kill()
        fleet.running["cleo"].wait()
        (tmp_path / HOLD_FILE).unlink()
        fleet.start("cleo")
        fleet.end(("coordinator", "cleo", "dora", "emil"))
    finally:
        fleet.stop()
    outcome = Outcome("", "")
    check_end(tmp_path, outcome, nodes=5)
    assert outcome.wrong == []
    assert sorted(str(event["partition"]) for event in fleet.events("accepted")) == ["0", "1", "2"]
    with closing(sqlite3.connect(RunDirectory(tmp_path / "run").database)) as database:
        (sha256, slot), = database.execute("select sha256, slot from handovers").fetchall()
    assert slot is None and not (tmp_path / "run" / "blobs" / sha256).exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(os.name != "posix", reason="processes are killed in the end")
def test_a_straggler_is_backed_up(tmp_path: Path) -> None:
    """A node stands still in its first expert: who has done the others does that one as well."""
    hold = tmp_path / f"{HOLD_FILE}-ada"
    hold.touch()
    fleet = Fleet(tmp_path)
    try:
        fleet.start("coordinator")
        fleet.start("ada")
        until(lambda: fleet.trained("ada"), PATIENCE)
        fleet.start("ben")
        until(lambda: len(fleet.events("accepted")) == 3, PATIENCE)
        hold.unlink()
        fleet.end(("coordinator", "ada", "ben"))
    finally:
        fleet.stop()
    outcome = Outcome("", "")
    check_end(tmp_path, outcome, nodes=2)
    assert outcome.wrong == []
    (slow,) = (event for event in fleet.events("leased") if event["node"] == "ada")
    assert [event["node"] for event in fleet.events("leased") if event["partition"] == slow["partition"]] == ["ada", "ben"]
    assert {event["node"] for event in fleet.events("accepted")} == {"ben"}
    assert ELSEWHERE in fleet.said("ada")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(os.name != "posix", reason="processes are killed in the end")
def test_a_late_shard_is_welcome(tmp_path: Path) -> None:
    """A node without a line trains on after its lease has expired, and hands in before who got the partition meanwhile."""
    holds = {name: tmp_path / f"{HOLD_FILE}-{name}" for name in ("ada", "ben")}
    for hold in holds.values():
        hold.touch()
    fleet = Fleet(tmp_path)
    line = Line(fleet.address)
    try:
        fleet.start("coordinator")
        fleet.invite(line.address)
        fleet.start("ada")
        until(lambda: fleet.trained("ada"), PATIENCE)
        line.close()
        (first,) = fleet.events("leased")
        holds["ada"].unlink()
        fleet.invite(fleet.address)
        # Partitions are given in their order, once the lease of the first has expired.
        with closing(sqlite3.connect(RunDirectory(tmp_path / "run").database)) as database:
            expires = database.execute("select expires_at from leases").fetchone()[0]
        until(lambda: time.time() > expires + 0.1, PATIENCE)
        fleet.start("ben")
        until(lambda: len(fleet.events("leased")) == 2 and fleet.trained("ben"), PATIENCE)
        line = Line(fleet.address, port=int(line.address.rpartition(":")[2]))
        until(lambda: fleet.events("accepted"), PATIENCE)
        holds["ben"].unlink()
        fleet.end(("coordinator", "ada", "ben"))
    finally:
        line.close()
        fleet.stop()
    outcome = Outcome("", "")
    check_end(tmp_path, outcome, nodes=2)
    assert outcome.wrong == []
    assert [event["partition"] for event in fleet.events("leased")[:2]] == [first["partition"]] * 2
    accepted = fleet.events("accepted")[0]
    assert (accepted["partition"], accepted["node"]) == (first["partition"], "ada")
    assert ELSEWHERE in fleet.said("ben")
