from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
import json
import os
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

import pytest

from forge.invitation import Invitation
from node.doctor import Finding, describe, examine
from node.link import Link
from node.preferences import load_preferences


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run directory of a real coordinator in a process of its own."""
    root = tmp_path_factory.mktemp("coordinator") / "run"
    with subprocess.Popen([sys.executable, "-m", "tests.coordinator.process", str(root)], stdout=subprocess.DEVNULL,
                          cwd=Path(__file__).parents[2]) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while not (root / "coordinator.json").exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            yield root
        finally:
            process.kill()


def _operate(*arguments: str) -> str:
    return subprocess.run([sys.executable, "-m", "coordinator.cli", "token", *arguments], check=True, text=True,
                          capture_output=True).stdout.strip()  # fmt: skip


def _doctor(data_dir: Path, *arguments: str, token: str | None = None) -> tuple[int, dict[str, Any]]:
    environment = {**os.environ, **({"FORGE_TOKEN": token} if token else {})}
    done = subprocess.run([sys.executable, "-m", "node.cli", "doctor", "--json", "--data-dir", str(data_dir), *arguments],
                          text=True, capture_output=True, env=environment)  # fmt: skip
    assert done.stderr == ""
    return done.returncode, {finding["what"]: finding for finding in json.loads(done.stdout)}


def test_a_machine_that_can_work(run_dir: Path, tmp_path: Path) -> None:
    token = _operate("create", "--run-dir", str(run_dir))
    code, found = _doctor(tmp_path / "node", token=token)
    assert code == 0, found
    assert {finding["state"] for name, finding in found.items() if name != "memory"} == {"ok"}
    assert list(found) == ["python", "torch", "grpcio", "training", "memory", "disk", "your rules", "clock", "coordinator"]
    shown = Invitation.parse(token).fingerprint.hex()[:16]
    assert found["coordinator"]["found"].endswith(f" answers, known by its CA {shown}; only joining tells whether the invitation "
                                                  "is still good")  # fmt: skip
    assert "on cpu, in " in found["training"]["found"]
    assert not (tmp_path / "node").exists() and "0/1" in _operate("list", "--run-dir", str(run_dir)), "nothing is changed"


def _examine(link: Callable[[], Link], data_dir: Path, **preferences: object) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine(link, data_dir, load_preferences(None, data_dir, preferences))}


def test_what_is_broken_is_said_with_what_to_mend(tmp_path: Path) -> None:
    code, found = _doctor(tmp_path / "node", "127.0.0.1:9")
    assert code == 1 and found["coordinator"]["found"] == "nobody answers at 127.0.0.1:9: it cannot be reached"
    assert "firewall" in found["coordinator"]["mend"]


def test_a_machine_that_never_joined_is_not_broken(tmp_path: Path) -> None:
    code, found = _doctor(tmp_path / "node")
    assert code == 0 and found["coordinator"]["state"] == "warning"
    assert found["coordinator"]["found"] == "this machine has not joined one yet"
    assert "forge-node join INVITATION" in found["coordinator"]["mend"]


def test_a_coordinator_that_is_not_the_one_of_the_invitation(run_dir: Path, tmp_path: Path) -> None:
    token = Invitation.parse(_operate("create", "--run-dir", str(run_dir)))
    found = _examine(lambda: Link(invitation=replace(token, fingerprint=bytes(32))), tmp_path, ram="100M", hours="3-4")
    assert found["memory"].state == "broken" and "--ram" in found["memory"].mend
    assert found["coordinator"].state == "broken" and "clock" not in found
    assert "is not the coordinator of this invitation" in found["coordinator"].found


def test_somebody_there_and_nobody_invited(run_dir: Path) -> None:
    address = json.loads((run_dir / "coordinator.json").read_text())["address"]
    found = _examine(lambda: Link(address), Path("/proc/node"))
    assert found["coordinator"].found == "This node has not joined a coordinator before"
    assert found["coordinator"].mend.startswith("Ask its operator for an invitation")
    assert found["disk"].state == "broken" and "--data-dir" in found["disk"].mend
    wrong = _examine(lambda: Link("192.0.2.1:1", insecure=1), Path("/tmp"))["coordinator"]
    assert wrong.state == "broken" and wrong.mend == "Leave it out, or say it twice."


def test_a_finding_is_a_line_and_what_to_mend_another() -> None:
    assert describe(Finding(what="disk", state="warning", found="little", mend="Free some.")).splitlines() == [
        "warning  disk        little", "                     Free some."]  # fmt: skip
