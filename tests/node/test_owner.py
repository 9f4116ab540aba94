"""What an owner says to a node: beforehand as rules, and afterwards over its socket, as commands that are typed."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
import json
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import time

import pytest

from forge.errors import StorageError
from forge.train.memory import parse_size
from node.control import CONTROL_FILE, SOCKET_FILE, ask, listening
from node.disk import check_disk
from node.messages import Blob
from tests.commands import Outcome, is_one_sentence

from .fakes import ABANDON, CONFIG, FINISH, FakeCoordinator, unrestricted

Process = subprocess.Popen[str]


class Home:
    """The data directory of one node, and the commands that its owner types."""

    def __init__(self, directory: Path, coordinator: FakeCoordinator) -> None:
        self.data_dir, self._coordinator = directory, coordinator
        self.agent: Process
        directory.mkdir()

    def start(self, *arguments: str) -> Process:
        """Start the agent whose job counts."""
        script = str(Path(__file__).with_name("agent_process.py"))
        self.agent = self._run(script, self._coordinator.address, str(self.data_dir), *arguments)
        return self.agent

    def type(self, *arguments: str) -> Outcome:
        """Type `forge-node ...` and wait for its end."""
        process = self._run("-m", "node.cli", *arguments)
        out, err = process.communicate(timeout=60)
        return Outcome(process.returncode, out, err)

    def ends(self) -> tuple[int, str]:
        out, err = self.agent.communicate(timeout=60)
        assert "Traceback" not in err
        return self.agent.returncode, out + err

    def work_files(self) -> list[Path]:
        return [path for name in ("blobs", "runs") for path in (self.data_dir / name).rglob("*")]

    def _run(self, *command: str) -> Process:
        environment = {**os.environ, "FORGE_DATA_DIR": str(self.data_dir), "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen([sys.executable, *command], env=environment, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, coordinator: FakeCoordinator) -> Iterator[Home]:
    home = Home(tmp_path / "node", coordinator)
    yield home
    if hasattr(home, "agent"):
        home.agent.kill()
        home.agent.communicate()


def test_pause_keeps_the_lease_and_resume_goes_on_from_the_checkpoint(home: Home, coordinator: FakeCoordinator) -> None:
    home.start("2")
    coordinator.wait_for_step(2)
    before = json.loads(home.type("status", "--json").out)
    assert before["partition"] == 0 and before["run"]["name"] == "test" and before["hold"] is None
    assert (before["progress"]["step"], before["progress"]["steps"]) == (2, 5)
    assert before["memory"]["allowed"] == 2 << 30
    assert "partition 0: training, step 2/5 · loss 1.000 · 10 tokens/s · memory 1M" in home.type("status").out

    assert "paused: paused by its owner; goes on with" in home.type("pause").out
    coordinator.wait_for_activity("paused")
    paused = home.type("status")
    assert "paused: paused by its owner; goes on with `forge-node resume`" in paused.out
    assert coordinator.state == ["leased"] and coordinator.released == []

    assert "paused" not in home.type("resume").out
    code, printed = home.ends()
    assert code == 0 and coordinator.state == ["accepted"], printed
    assert "Paused: paused by its owner" in printed and "The lease is kept." in printed and "The pause is over." in printed
    (shard,) = coordinator.uploads.values()
    assert b"from step 2" in shard[:30]


def test_a_pause_ends_by_itself(home: Home, coordinator: FakeCoordinator) -> None:
    home.start("2")
    coordinator.wait_for_step(2)
    answer = home.type("pause", "--for", "1s")
    assert answer.code == 0 and answer.err == ""
    assert home.ends()[0] == 0 and coordinator.state == ["accepted"]


def test_finish_hands_the_expert_in_and_leaves(home: Home) -> None:
    coordinator = FakeCoordinator(partitions=2)
    try:
        home._coordinator = coordinator
        home.start("2", "--forever")
        coordinator.wait_for_step(2)
        home.type("pause")
        coordinator.wait_for_activity("paused")
        assert "leaves when the current expert is handed in" in home.type("finish").out
        code, printed = home.ends()
        assert code == 0 and "Leaving, as `forge-node finish` asked. Shards of this node accepted: 1" in printed
        assert coordinator.state == ["accepted", "open"]
    finally:
        coordinator.stop()


def test_rules_hold_the_node_while_their_sign_is_there(home: Home, coordinator: FakeCoordinator) -> None:
    (home.data_dir / "battery").touch()
    home.start("2", "when=idle")
    assert home.agent.stdout is not None
    printed = [next(home.agent.stdout) for _ in range(4)][-1]
    assert printed == "Paused: this machine runs on its battery; goes on when it is plugged in.\n"
    assert "Lease" not in coordinator.calls
    (home.data_dir / "battery").unlink()
    coordinator.wait_for_step(2)
    (home.data_dir / "owner").touch()
    coordinator.wait_for_activity("paused")
    assert coordinator.released == []
    (home.data_dir / "owner").unlink()
    code, printed = home.ends()
    words = "Paused: this machine is in use; goes on when nobody has used it for 3 min. The lease is kept."
    assert code == 0 and words in printed, printed


def test_who_allows_the_battery_trains_on_it_and_files_travel_at_the_rates_that_were_allowed(
        home: Home, coordinator: FakeCoordinator) -> None:  # fmt: skip
    """6 MiB down and 3 MiB up; what a second brings may be saved up, the rest has to be waited for."""
    (home.data_dir / "battery").touch()
    home.start("on-battery=yes", "max-download=3M", "max-upload=1500k")
    until = {"FetchBlob": 0.0, "OpenUpload": 0.0, "Commit": 0.0}
    for call in until:
        with coordinator.changed:  # Woken by heartbeats.
            assert coordinator.changed.wait_for(lambda: call in coordinator.calls, 60), coordinator.calls  # noqa: B023
        until[call] = time.monotonic()
    code, printed = home.ends()
    assert code == 0 and "Paused" not in printed and coordinator.state == ["accepted"], printed
    assert until["OpenUpload"] - until["FetchBlob"] > 0.8 and until["Commit"] - until["OpenUpload"] > 0.8


def test_an_expert_that_is_not_wanted_any_more_is_ended_at_once(home: Home, coordinator: FakeCoordinator) -> None:
    home.start("2", "--deaf")  # A job that never stops by itself.
    coordinator.wait_for_step(2)
    coordinator.order = ABANDON
    assert home.agent.stdout is not None
    printed = ""
    while "is lost" not in printed:
        printed = next(home.agent.stdout)
    assert "The lease of partition 0 is lost (the test says so); its checkpoint is kept." in printed
    assert max(coordinator.steps) == 2 and [path.read_text() for path in home.data_dir.rglob("checkpoint.safetensors")] == ["2"]


def test_outside_the_hours_nothing_is_leased(home: Home, coordinator: FakeCoordinator) -> None:
    opens = (datetime.now() + timedelta(hours=2)).hour
    home.start(f"hours={opens}-{(opens + 1) % 24}")
    assert home.agent.stdout is not None
    printed = [next(home.agent.stdout) for _ in range(4)][-1]
    assert printed == f"Paused: outside the hours {opens}-{(opens + 1) % 24}; goes on at {opens:02d}:00.\n"
    assert json.loads(home.type("status", "--json").out)["hold"]["until"].endswith(f"T{opens:02d}:00:00")
    home.agent.send_signal(signal.SIGINT)
    assert home.ends()[0] == 130 and "Lease" not in coordinator.calls


def test_an_order_of_the_coordinator_ends_a_pause(home: Home, coordinator: FakeCoordinator) -> None:
    home.start("2")
    coordinator.wait_for_step(2)
    home.type("pause")
    coordinator.wait_for_activity("paused")
    coordinator.order = FINISH
    with coordinator.changed:
        assert coordinator.changed.wait_for(lambda: coordinator.released == ["the test says so"], 30)
    assert coordinator.state == ["open"]
    home.agent.send_signal(signal.SIGINT)  # Nothing is leased, and the pause goes on.
    assert home.ends()[0] == 130 and coordinator.calls.count("Lease") == 1


def test_finish_leaves_at_once_when_nothing_is_leased(home: Home, coordinator: FakeCoordinator) -> None:
    coordinator.state, coordinator.retry_seconds = ["uploaded"], 3600.0
    home.start("--forever")
    assert home.agent.stdout is not None
    printed = ""
    while "waiting for work" not in printed:
        printed = next(home.agent.stdout)
    assert "waiting for work: every partition is leased" in home.type("status").out
    home.type("finish")
    code, printed = home.ends()
    assert code == 0 and "Leaving, as `forge-node finish` asked." in printed


def test_a_limit_of_the_disk_is_said_before_a_download(home: Home, coordinator: FakeCoordinator) -> None:
    home.start("disk=5M")
    code, printed = home.ends()
    error = printed.splitlines()[-1]
    assert code == 6 and error.startswith(f"error: --disk allows {home.data_dir} to hold 5M, and an expert of the run")
    assert "FetchBlob" not in coordinator.calls and coordinator.released == ["failed: storage"]
    assert home.work_files() == []
    blobs = [Blob(sha256=sha256, size=len(data)) for sha256, data in coordinator.blobs.items()]
    enough = parse_size(error.split("use --disk ")[1].removesuffix(" or more."))
    check_disk(enough, home.data_dir, blobs, home.data_dir / "none", CONFIG)
    with pytest.raises(StorageError):
        check_disk(enough - (2 << 20), home.data_dir, blobs, home.data_dir / "none", CONFIG)


def test_ctrl_c_twice_stops_at_once(home: Home, coordinator: FakeCoordinator) -> None:
    home.start("2", "--deaf")
    coordinator.wait_for_step(2)
    home.agent.send_signal(signal.SIGINT)
    assert home.agent.stdout is not None
    printed = ""
    while "press Ctrl-C again to stop at once" not in printed:
        printed = next(home.agent.stdout)
    home.agent.send_signal(signal.SIGINT)
    code, rest = home.ends()
    assert code == 130 and "Checkpoints are kept" in rest
    assert coordinator.released == ["stopped by its owner"]


@pytest.mark.parametrize("command", ["finish", "status"])
def test_nobody_to_talk_to(home: Home, command: str) -> None:
    is_one_sentence(home.type(command), "network", f"No node runs in {home.data_dir}", "forge-node join", "--data-dir")


def test_an_agent_that_was_killed_is_nobody_to_talk_to(home: Home, coordinator: FakeCoordinator) -> None:
    home.start("2")
    coordinator.wait_for_step(2)
    home.agent.kill()
    home.agent.wait()
    assert (home.data_dir / CONTROL_FILE).exists()
    is_one_sentence(home.type("status"), "network", f"No node runs in {home.data_dir}")


def test_a_wrong_duration(home: Home) -> None:
    is_one_sentence(home.type("pause", "--for", "soon"), "config", "--for 'soon'", "90m")


@pytest.mark.parametrize("short", [True, False], ids=["unix socket", "loopback port"])
def test_only_who_may_read_the_secret_is_obeyed(tmp_path: Path, short: bool) -> None:
    data_dir = tmp_path if short else tmp_path / ("long" * 30)
    data_dir.mkdir(exist_ok=True)
    guest = unrestricted()
    with listening(data_dir, guest, lambda: {}):
        book = data_dir / CONTROL_FILE
        assert book.stat().st_mode & 0o777 == 0o600
        assert (data_dir / SOCKET_FILE).exists() == short
        assert ask(data_dir, {"do": "pause", "seconds": None})["hold"]["reason"] == "paused by its owner"
        known = json.loads(book.read_text())
        book.write_text(json.dumps({**known, "secret": "f" * 64}))
        with pytest.raises(Exception, match="No node runs"):
            ask(data_dir, {"do": "resume"})
        assert guest.hold() is not None
    assert list(data_dir.iterdir()) == []


def test_bad_requests_do_not_silence_the_node(tmp_path: Path) -> None:
    data_dir = tmp_path / ("long" * 30)  # A port: every user of the machine reaches it.
    data_dir.mkdir()
    with listening(data_dir, unrestricted(), lambda: {"fine": True}):
        at = tuple(json.loads((data_dir / CONTROL_FILE).read_text())["at"])
        for bad in (b"\n", b"{}\n", b"[1]\n", b"\xff\n", b'{"secret": 1, "do": "pause"}\n', b""):
            with socket.create_connection(at, timeout=10) as client:
                client.sendall(bad)
                client.shutdown(socket.SHUT_WR)
                assert client.recv(100) == b""
        assert ask(data_dir, {"do": "status"})["fine"]
