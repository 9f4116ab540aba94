"""What the commands that should answer at once must not import: a look at what is loaded, not at a clock."""

from __future__ import annotations

import json
from pathlib import Path
import socket
import subprocess
import sys

import pytest

#: Every library of ours that takes a twentieth of a second or more to import.
HEAVY = {"torch", "numpy", "scipy", "sklearn", "matplotlib", "transformers", "tokenizers", "safetensors", "huggingface_hub",
         "sqlalchemy", "alembic", "pydantic", "yaml", "rich", "cryptography", "grpc"}  # fmt: skip


def _loaded(module: str, *arguments: str) -> set[str]:
    """Which heavy libraries a command has imported when it ends."""
    code = ("import json, sys; from click.testing import CliRunner; "
            f"from {module} import main; outcome = CliRunner().invoke(main, {list(arguments)!r}); "
            "print(json.dumps([outcome.exit_code, outcome.output, sorted(sys.modules)]))")  # fmt: skip
    text = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    exit_code, output, modules = json.loads(text)
    assert output and exit_code in (0, 7), output
    return HEAVY & {name.split(".")[0] for name in modules}


@pytest.mark.parametrize("module", ["node.cli", "coordinator.cli", "forge.cli"])
def test_help_imports_nothing_heavy(module: str) -> None:
    assert _loaded(module, "--help") == set()


@pytest.mark.parametrize(("module", "command"), [("node.cli", "join"), ("coordinator.cli", "serve"), ("forge.cli", "run")])
def test_the_help_of_a_command_imports_nothing_heavy(module: str, command: str) -> None:
    assert _loaded(module, command, "--help") == set()


def test_the_status_of_a_coordinator_imports_nothing_but_the_wire(tmp_path: Path) -> None:
    with socket.socket() as unused:  # Bound and not listening: nobody answers there.
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        (tmp_path / "coordinator.json").write_text(json.dumps({"address": address, "encrypted": False}))
        (tmp_path / "coordinator.secret").write_bytes(bytes(32))
        assert _loaded("coordinator.cli", "status", "--run-dir", str(tmp_path)) == {"grpc"}
