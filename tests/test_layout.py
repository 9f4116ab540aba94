"""Who may import whom, and what the wheel holds."""

from __future__ import annotations

import ast
from pathlib import Path
import re
import subprocess
import sys

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEVER_IN_FORGE = {"grpc", "sqlalchemy", "starlette", "uvicorn", "http.server", "coordinator", "node", "modularforge"}
#: Modules and names that Windows does not have, and what tells such systems apart.
POSIX_ONLY = {
    "fcntl", "msvcrt", "resource", "pwd", "grp", "termios", "tty", "pty", "os.name", "os.fork", "os.forkpty", "os.setsid",
    "os.killpg", "os.getpgid", "os.getsid", "os.setpriority", "os.getpriority", "os.waitpid", "os.WNOHANG", "os.uname", "os.sync",
    "os.O_DIRECTORY", "os.O_CLOEXEC", "os.O_NOFOLLOW", "os.fchmod", "os.register_at_fork", "socket.AF_UNIX",
    "socket.SO_REUSEPORT",
    "os.getuid", "os.geteuid", "os.getgid", "os.getloadavg", "os.sched_getaffinity", "os.sched_setaffinity", "os.nice",
    "os.statvfs", "os.mkfifo", "os.chown", "os.pread", "os.pwrite", "signal.SIGKILL", "signal.SIGHUP", "signal.SIGUSR1",
    "signal.SIGUSR2", "signal.SIGSTOP", "signal.SIGCONT", "signal.SIGALRM", "signal.alarm", "signal.setitimer", "signal.pause",
}  # fmt: skip


def _imports(path: Path) -> set[str]:
    found = set()
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            found.add(statement.module)
    return found


def _offences(package: str, forbidden: set[str]) -> list[str]:
    return [f"{path.relative_to(ROOT)} imports {name}" for path in sorted((ROOT / package).rglob("*.py"))
            for name in sorted(_imports(path)) if any(name == f or name.startswith(f + ".") for f in forbidden)]  # fmt: skip


def test_forge_knows_no_transport_no_database_and_no_fleet() -> None:
    assert _offences("forge", NEVER_IN_FORGE) == []


def test_coordinator_and_node_never_import_each_other() -> None:
    assert _offences("coordinator", {"node"}) + _offences("node", {"coordinator"}) == []


def test_what_only_posix_has_is_called_in_one_module() -> None:
    found = set()
    for path in [path for package in ("forge", "coordinator", "node") for path in sorted((ROOT / package).rglob("*.py"))]:
        name = path.relative_to(ROOT).as_posix()
        calls = {f"{node.value.id}.{node.attr}" for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                 if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}  # fmt: skip
        found |= {f"{name}: {call}" for call in (_imports(path) | calls) & POSIX_ONLY}
    assert sorted(line for line in found if not line.startswith("forge/system.py")) == []
    assert {"forge/system.py: fcntl", "forge/system.py: socket.AF_UNIX", "forge/system.py: os.setpriority"} <= found


def test_the_tour_of_the_code_names_every_module() -> None:
    held, folder = set(), ""
    for line in (ROOT / "docs" / "tour.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## `(.*?)/`", line):
            folder = heading[1]
        elif row := re.match(r"\| `(.*?\.py)` \|", line):
            held.add(f"{folder}/{row[1]}")
    modules = [path for package in ("forge", "coordinator", "node") for path in (ROOT / package).rglob("*.py")]
    assert held == {path.relative_to(ROOT).as_posix() for path in modules if path.name != "__init__.py"}


def test_llama_cpp_is_run_again_when_the_export_has_changed() -> None:
    (export,) = re.findall(r"^EXPORT := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    recorded = (ROOT / "tests" / "publish" / "llama.sha256").read_text(encoding="utf-8")
    assert [line.split()[1] for line in recorded.splitlines()] == export.split() and "forge/publish/gguf.py" in export
    assert "if ! sha256sum --check --quiet tests/publish/llama.sha256 ||" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize(("package", "gateway"), [("coordinator", "servicer.py"), ("node", "client.py")])
def test_one_file_touches_the_messages_of_the_wire(package: str, gateway: str) -> None:
    touching = {path.name for path in (ROOT / package).rglob("*.py")
                if any(name.startswith("modularforge") for name in _imports(path))}  # fmt: skip
    assert gateway in touching
    assert touching <= {gateway, "serve.py", "cli.py", "connection.py", "admin.py"}


@pytest.mark.parametrize("module", ["forge.config", "forge.files", "forge.jobs", "forge.train.memory", "forge.cli",
                                    "forge.checkpoint.assembly", "coordinator.cli", "coordinator.serve",
                                    "coordinator.dashboard.server", "node.cli", "node.agent"])  # fmt: skip
def test_the_light_processes_never_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
