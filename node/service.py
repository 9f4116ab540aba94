"""The node as a systemd service of its owner: a unit file, written and removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import os
from pathlib import Path
import sys

from forge.errors import ConfigError, StorageError
from forge.files import write_bytes

UNIT_NAME = "modularforge-node.service"
#: Exit codes of what does not mend itself (docs/exit-codes.md): wrong options, too little memory, another version, a refusal.
_FINAL = "2 3 5 8 10 13"
#: Seconds that a node has to reach its next checkpoint and give its lease back.
_STOP_SECONDS = 120

_UNIT = """\
[Unit]
Description=ModularForge node
After=network-online.target

[Service]
ExecStart={command}
KillSignal=SIGINT
KillMode=mixed
TimeoutStopSec={seconds}
Restart=on-failure
RestartSec=60
RestartPreventExitStatus={final}

[Install]
WantedBy=default.target
"""


def unit_path(environment: Mapping[str, str] = os.environ) -> Path:
    """Where systemd looks for units of this user (`systemd.unit`(5))."""
    base = environment.get("XDG_CONFIG_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".config") / "systemd" / "user" / UNIT_NAME


def install(arguments: Sequence[str]) -> Path:
    """Write the unit that runs `forge-node join` with these arguments; returns its path.

    Raises:
        ConfigError: this is not Linux.
        StorageError: the file cannot be written.
    """
    _only_linux()
    command = " ".join(map(_quoted, [sys.executable, "-m", "node.cli", "join", *arguments]))
    path = unit_path()
    write_bytes(path, _UNIT.format(command=command, seconds=_STOP_SECONDS, final=_FINAL).encode())
    return path


def uninstall() -> Path:
    """Remove the unit; returns where it was.

    Raises:
        ConfigError: this is not Linux, or there is none.
        StorageError: the file cannot be removed.
    """
    _only_linux()
    path = unit_path()
    try:
        path.unlink()
    except FileNotFoundError:
        raise ConfigError(f"There is no service to remove: {path} does not exist.") from None
    except OSError as error:
        raise StorageError(f"Cannot remove {path}: {error.strerror}.") from error
    return path


def _only_linux() -> None:
    if sys.platform != "linux":
        raise ConfigError("install-service writes a unit for systemd, which only Linux has: let your system start "
                          "`forge-node join` when you log in.")  # fmt: skip


def _quoted(word: str) -> str:
    """A word of ExecStart (`systemd.service`(5), "Command lines"): specifiers and variables are escaped, the rest quoted."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'
