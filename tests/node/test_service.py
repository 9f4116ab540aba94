"""A node as a systemd service: what is written, what systemd thinks of it, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
import shutil
import subprocess
import sys

import pytest

from node.link import BOOK_FILE
from node.service import UNIT_NAME

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has systemd")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "100% mine").mkdir()
    (tmp_path / "100% mine" / BOOK_FILE).write_text("[]")
    return tmp_path


def typed(home: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HOME": str(home), "XDG_CONFIG_HOME": str(home / "config"),
                                "FORGE_DATA_DIR": str(home / "100% mine")}  # fmt: skip
    return subprocess.run([sys.executable, "-m", "node.cli", "install-service", *arguments], env=environment,
                          capture_output=True, text=True, check=False, cwd=cwd)  # fmt: skip


def unit(home: Path) -> Path:
    return home / "config" / "systemd" / "user" / UNIT_NAME


def test_the_unit_runs_the_same_join_and_is_removed_again(home: Path) -> None:
    done = typed(home, "--ram", "2G", "--when", "idle", "--name", 'ada "$HOME"')
    assert done.returncode == 0, done.stderr
    assert "systemctl --user enable --now modularforge-node.service" in done.stdout
    (command,) = [line for line in unit(home).read_text().splitlines() if line.startswith("ExecStart=")]
    data_dir = str(home / "100% mine").replace("%", "%%")
    assert command == (f'ExecStart="{sys.executable}" "-m" "node.cli" "join" "--data-dir" "{data_dir}" "--ram" "2G" "--name" '
                       '"ada \\"$$HOME\\"" "--when" "idle"')  # fmt: skip
    assert typed(home, "--uninstall").returncode == 0
    assert not unit(home).exists()
    again = typed(home, "--uninstall")
    assert (again.returncode, again.stderr.count("\n")) == (3, 1) and "no service to remove" in again.stderr


def test_paths_are_those_of_the_directory_it_was_typed_in(home: Path) -> None:
    (home / "100% mine" / "my.yaml").write_text("when: idle\n")
    done = typed(home, "--config=my.yaml", "--data-dir", "../100% mine", "--once", "--insecure", "--insecure", "--log-format",
                 "json", cwd=home / "100% mine")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (command,) = [line for line in unit(home).read_text().splitlines() if line.startswith("ExecStart=")]
    data_dir = str(home / "100% mine").replace("%", "%%")
    assert command.endswith(f'"join" "--data-dir" "{data_dir}" "--config" "{data_dir}/my.yaml" "--once" "--log-format" "json" '
                            '"--insecure" "--insecure"')  # fmt: skip


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_wrong(home: Path) -> None:
    assert typed(home, "--hours", "22-7").returncode == 0
    checked = subprocess.run(["systemd-analyze", "verify", "--user", "--man=no", str(unit(home))], capture_output=True, text=True,
                             env=os.environ | {"XDG_RUNTIME_DIR": str(home)}, check=False)  # fmt: skip
    assert UNIT_NAME not in checked.stderr, checked.stderr
    unit(home).write_text(unit(home).read_text().replace("KillSignal=SIGINT", "KillSignal=NOTHING"))
    checked = subprocess.run(["systemd-analyze", "verify", "--user", "--man=no", str(unit(home))], capture_output=True, text=True,
                             env=os.environ | {"XDG_RUNTIME_DIR": str(home)}, check=False)  # fmt: skip
    assert UNIT_NAME in checked.stderr  # So it would have said so.


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["forge1_abc"], 3, "takes no invitation"),
    (["--token", "forge1_abc"], 3, "takes no invitation"),
    (["--data-dir", "elsewhere"], 3, "join once"),
    (["--data-dir", "elsewhere"], 3, "has not joined"),
    (["--rum", "2G"], 2, "No such option"),
    (["--ram", "8Q"], 3, "'8Q' is not a size"),
    (["--hours", "25"], 3, "--hours"),
    (["--config", "nowhere.yaml"], 3, "nowhere.yaml"),
    (["--ram", "900T"], 5, "give at most --ram"),
])  # fmt: skip
def test_what_cannot_be_a_service_is_refused(home: Path, arguments: list[str], code: int, words: str) -> None:
    done = typed(home, *arguments)
    assert done.returncode == code and words in done.stderr, done
    assert not unit(home).exists()
