from __future__ import annotations

from collections.abc import Iterator
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

from forge.errors import ConfigError
from node.cli import default_data_dir, parse_address

from .fakes import FakeCoordinator

Process = subprocess.Popen[str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    """Start a process whose data directory is of its own, and end it with the test."""
    running: list[Process] = []

    def make(*command: str) -> Process:
        environment = dict(os.environ, FORGE_DATA_DIR=str(tmp_path / "node"), PYTHONUNBUFFERED="1")
        running.append(subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True, env=environment))  # fmt: skip
        return running[-1]

    yield make
    for process in running:
        process.kill()
        process.communicate()


def _join(start: object, *arguments: str) -> tuple[int, str, str]:
    process: Process = start("-m", "node.cli", "join", *arguments)  # type: ignore[operator]
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def _agent(start: object, coordinator: FakeCoordinator, data_dir: Path, *hold_at: str) -> Process:
    script = str(Path(__file__).with_name("agent_process.py"))
    process: Process = start(script, coordinator.address, str(data_dir), *hold_at)  # type: ignore[operator]
    return process


def test_coordinator_of_another_version(start: object, coordinator: FakeCoordinator) -> None:
    coordinator.protocol_version = 99
    code, out, err = _join(start, coordinator.address, "--ram", "1G", "--insecure")
    assert code == 8 and err.startswith("error: ") and "version 99" in err and "peak memory" not in out


def test_kill_9_in_training_and_the_same_command_again(start: object, coordinator: FakeCoordinator,
                                                       tmp_path: Path) -> None:  # fmt: skip
    first = _agent(start, coordinator, tmp_path / "node", "3")
    coordinator.wait_for_step(3)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    second = _agent(start, coordinator, tmp_path / "node")
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert "Going on with partition 0 from its checkpoint." in out
    assert coordinator.preferred[1] == [0] and list(coordinator.lease_holder) == ["lease-0"]
    (shard,) = coordinator.uploads.values()
    assert b"from step 3" in shard[:30]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_at_a_checkpoint_and_hands_it_over(start: object, coordinator: FakeCoordinator, tmp_path: Path,
                                                        sent: signal.Signals) -> None:  # fmt: skip
    agent = _agent(start, coordinator, tmp_path / "node", "2")
    coordinator.wait_for_step(2)
    agent.send_signal(sent)
    out, err = agent.communicate(timeout=60)
    assert agent.returncode == 130, err
    assert "Stopping at the next checkpoint" in out and "Partition 0 is handed over" in out
    assert coordinator.released == ["handed over"] and err == ""
    assert list(coordinator.uploads.values()) == [b"2"], "the checkpoint of step 2"


def test_ctrl_c_while_the_coordinator_is_away_keeps_the_checkpoint_here(start: object, coordinator: FakeCoordinator,
                                                                        tmp_path: Path) -> None:  # fmt: skip
    agent = _agent(start, coordinator, tmp_path / "node", "2")
    coordinator.wait_for_step(2)
    coordinator.stop()
    agent.send_signal(signal.SIGINT)
    out, err = agent.communicate(timeout=60)
    assert agent.returncode == 130, err
    assert "handed over" not in out and "Checkpoints are kept" in out
    assert [path.read_text() for path in (tmp_path / "node").rglob("checkpoint.safetensors")] == ["2"]


def test_help_is_quick_and_the_agent_never_imports_torch() -> None:
    before = time.monotonic()
    subprocess.run([sys.executable, "-m", "node.cli", "--help"], check=True, capture_output=True)
    # Under 0.1 s alone; the margin is for a machine that runs other tests beside this one.
    assert time.monotonic() - before < 2.0
    code = "import node.cli, node.agent, node.worker, forge.jobs, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.strip() == b"False"
    code = "import node.cli, sys; print([m for m in ('grpc', 'pydantic', 'rich', 'yaml') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.strip() == b"[]"


def test_what_an_owner_types_imports_nothing_heavy(tmp_path: Path) -> None:
    code = ("import pathlib, sys, node.control\n"
            f"try: node.control.ask(pathlib.Path({str(tmp_path)!r}), {{'do': 'status'}})\n"
            "except Exception as error: print(type(error).__name__)\n"
            "print([m for m in ('grpc', 'pydantic', 'rich', 'yaml', 'psutil') if m in sys.modules])")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "NetworkError\n[]\n"


@pytest.mark.parametrize(("options", "file", "code", "words"), [
    (["--hours", "7-7"], "", 3, "error: --hours '7-7' is wrong: '7-7' is not a span of hours"),
    (["--max-upload", "fast"], "", 3, "error: --max-upload 'fast' is wrong: 'fast' is not a rate"),
    ([], "hour: 22-7", 3, "node.yaml: unknown key 'hour'; did you mean 'hours'?"),
    (["--config", "nowhere.yaml"], "", 3, "error: Cannot read the config file nowhere.yaml"),
    (["--when", "never"], "", 2, "'never' is not one of 'always', 'idle'"),
])  # fmt: skip
def test_wrong_preferences(start: object, tmp_path: Path, options: list[str], file: str, code: int, words: str) -> None:
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "node.yaml").write_text(file)
    ended, out, err = _join(start, "127.0.0.1", *options)
    assert (ended, out) == (code, "") and words in err and "Traceback" not in err
    assert [path.name for path in (tmp_path / "node").iterdir()] == ["node.yaml"]


@pytest.mark.parametrize(("text", "expected"), [
    ("here", "here:7433"), ("here:1", "here:1"), ("10.0.0.1:80", "10.0.0.1:80"), ("[::1]", "[::1]:7433"),
    ("[::1]:5", "[::1]:5"),
])  # fmt: skip
def test_addresses(text: str, expected: str) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["", "here:", "here:0", "here:70000", "http://here:1", "::1", "a b", "here:x"])
def test_wrong_addresses(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST or HOST:PORT"):
        parse_address(text)


def test_data_directory() -> None:
    assert default_data_dir({"FORGE_DATA_DIR": "/a", "XDG_DATA_HOME": "/b"}) == Path("/a")
    assert default_data_dir({"XDG_DATA_HOME": "/b"}) == Path("/b/modularforge")
    assert default_data_dir({"XDG_DATA_HOME": "relative"}) == Path.home() / ".local/share/modularforge"
    assert default_data_dir({}) == Path.home() / ".local/share/modularforge"
