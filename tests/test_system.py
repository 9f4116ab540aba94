"""The choice of a control group on trees of real files, and the kernel's limit where this machine lets us set one.

A tree of plain files has the files that a process finds; what the kernel does with them is tested on the kernel alone.
"""

from __future__ import annotations

import os
from pathlib import Path
import subprocess
import sys

import pytest

from forge.system import MemoryGroup, memory_group_parent, resident_bytes_of

SCOPE = "user.slice/app.slice/terminal.scope"


def _tree(root: Path, own: str, groups: dict[str, dict[str, str]], hierarchy: str = "0::/") -> Path:
    """A file system with control groups: path below the mount point -> its files."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"{hierarchy}{own}\n")
    for path, files in groups.items():
        directory = root / "sys/fs/cgroup" / path
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in {"cgroup.procs": "", **files}.items():
            (directory / name).write_text(text)
    return root


def _group(controllers: str = "cpu memory pids", handed_down: str = "", **files: str) -> dict[str, str]:
    return {"cgroup.controllers": controllers, "cgroup.subtree_control": handed_down, **files}


def test_a_delegated_slice_holds_the_group_beside_the_own_one(tmp_path: Path) -> None:
    root = _tree(tmp_path, SCOPE, {"user.slice/app.slice": _group(handed_down="memory pids"),
                                   SCOPE: _group(controllers="cpu pids")})  # fmt: skip
    assert memory_group_parent(root) == root / "sys/fs/cgroup/user.slice/app.slice"


def test_the_root_group_is_taken_and_switched_on(tmp_path: Path) -> None:
    root = _tree(tmp_path, "", {"": _group(handed_down="pids")})
    assert memory_group_parent(root) == root / "sys/fs/cgroup"
    assert (root / "sys/fs/cgroup/cgroup.subtree_control").read_text() == "+memory"


def test_an_own_limit_is_not_escaped(tmp_path: Path) -> None:
    slices = {"user.slice/app.slice": _group(handed_down="memory"), SCOPE: {**_group("cpu"), "memory.max": "1000\n"}}
    assert memory_group_parent(_tree(tmp_path / "limited", SCOPE, slices)) is None
    slices[SCOPE]["memory.max"] = "max\n"
    assert memory_group_parent(_tree(tmp_path / "free", SCOPE, slices)) is not None


@pytest.mark.parametrize("controllers", ["cpu pids", "hugetlb", ""])
def test_no_memory_controller_means_no_group(tmp_path: Path, controllers: str) -> None:
    groups = {"user.slice/app.slice": _group(controllers), SCOPE: _group(controllers)}
    assert memory_group_parent(_tree(tmp_path, SCOPE, groups)) is None


def test_cgroup_v1_and_other_systems_mean_no_group(tmp_path: Path) -> None:
    groups = {"memory/box": {"memory.limit_in_bytes": "1000"}}
    assert memory_group_parent(_tree(tmp_path / "v1", "/box", groups, hierarchy="4:memory:")) is None
    assert memory_group_parent(tmp_path / "none") is None
    assert MemoryGroup.hold(os.getpid(), 1 << 30, tmp_path / "none") is None


def test_a_slice_of_another_user_means_no_group(tmp_path: Path) -> None:
    root = _tree(tmp_path, SCOPE, {"user.slice/app.slice": _group(handed_down="memory"), SCOPE: _group("cpu")})
    code = ("import os, sys; from pathlib import Path; from forge.system import memory_group_parent; "
            "os.geteuid() == 0 and os.setuid(65534); "
            f"sys.exit(memory_group_parent(Path({str(root)!r})) is not None)")  # fmt: skip
    for path in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        path.chmod(0o755)  # The other user may look.
    (root / "sys/fs/cgroup/user.slice/app.slice").chmod(0o555)
    outcome = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr


def test_a_group_that_the_kernel_does_not_complete_is_taken_back(tmp_path: Path) -> None:
    root = _tree(tmp_path, "", {"": _group(handed_down="memory")})  # No kernel: the new directory stays empty.
    assert MemoryGroup.hold(os.getpid(), 1 << 30, root) is None
    assert not list((root / "sys/fs/cgroup").glob("modularforge-*"))


def test_groups_of_killed_makers_are_removed(tmp_path: Path) -> None:
    root = _tree(tmp_path, "", {"": _group(handed_down="memory")})
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    old, used, live = (root / "sys/fs/cgroup" / name for name in (
        f"modularforge-{ended.pid}-1", f"modularforge-{ended.pid}-2", f"modularforge-{os.getpid()}-9"))  # fmt: skip
    for directory in (old, used, live):
        directory.mkdir()
    (used / "child").mkdir()  # The kernel refuses to remove a group in use, as the file system refuses this one.
    MemoryGroup.hold(os.getpid(), 1 << 30, root)
    assert not old.exists() and used.exists() and live.exists()


def test_the_kernels_count_of_kills_is_read(tmp_path: Path) -> None:
    events = tmp_path / "memory.events"
    events.write_text("low 0\nhigh 0\nmax 12\noom 0\noom_kill 0\n")
    assert not MemoryGroup(tmp_path).killed()
    events.write_text("low 0\nhigh 0\nmax 30\noom 1\noom_kill 1\n")
    assert MemoryGroup(tmp_path).killed()


def test_the_memory_of_another_process() -> None:
    code = "held = b'x' * 50_000_000; print('held', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdout.readline()
    assert 50_000_000 < resident_bytes_of(process.pid) < 100_000_000
    process.communicate(b"\n")
    assert resident_bytes_of(process.pid) == 0


@pytest.mark.skipif(memory_group_parent() is None, reason="no memory limit can be set here: cgroup v2 is absent or not ours")
def test_the_kernel_kills_at_the_limit_and_leaves_nothing() -> None:
    code = "input(); held = b'x' * 200_000_000; print('too late')"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    group = MemoryGroup.hold(process.pid, 64 << 20)
    assert group is not None and not group.killed()
    assert process.communicate(b"\n")[0] == b""
    assert group.killed()
    group.remove()
    parent = memory_group_parent()
    assert parent is not None and not list(parent.glob(f"modularforge-{os.getpid()}-*"))
