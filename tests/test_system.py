"""Control groups on trees of real files, the kernel's limit where this machine lets us set one, priorities, files, sockets.

A tree of plain files has the files that a process finds; what the kernel does with them is tested on the kernel alone.
"""

from __future__ import annotations

import os
from pathlib import Path
import subprocess
import sys

import psutil
import pytest

from forge.system import (
    MemoryGroup,
    cgroup_memory,
    connect_here,
    default_threads,
    keep_private,
    listen_here,
    memory_group_parent,
    physical_cores,
    read_at,
    resident_bytes_of,  # fmt: skip
    stand_back,
    usable_cores,
)

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


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_cgroup_v2_takes_the_tightest_limit_and_gives_back_the_page_cache(tmp_path: Path) -> None:
    root = _write(tmp_path, {
        "proc/self/cgroup": "0::/outer/inner\n", "sys/fs/cgroup/outer/inner/memory.max": "max\n",
        "sys/fs/cgroup/outer/memory.max": "1000\n", "sys/fs/cgroup/outer/memory.current": "700\n",
        "sys/fs/cgroup/outer/memory.stat": "anon 1\ninactive_file 200\n",
        "sys/fs/cgroup/outer/inner/cpu.max": "100000 100000\n",
    })  # fmt: skip
    assert cgroup_memory(root) == (1000, 500)
    assert usable_cores(root) == 1


def test_threads_are_what_the_user_says_or_cores_that_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, threads in (("3", 3), ("5,2", 5)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert default_threads() == threads
    for said in ("", "many", "0"):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert 1 <= default_threads() == min(physical_cores(), usable_cores())


def test_cgroup_v1(tmp_path: Path) -> None:
    root = _write(tmp_path, {
        "proc/self/cgroup": "5:memory:/box\n3:cpu,cpuacct:/box\n",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "2000\n",
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "300\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "50000\n", "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
    })  # fmt: skip
    assert cgroup_memory(root) == (2000, 300)
    assert usable_cores(root) == 1


def test_no_cgroup(tmp_path: Path) -> None:
    assert cgroup_memory(tmp_path) == (None, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads and of disk access are Linux's")
def test_every_thread_stands_back_and_those_to_come() -> None:
    code = ("import sys, threading\n"
            "def start(): threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
            "start(); print('one', flush=True); sys.stdin.readline()\n"
            "start(); print('two', flush=True); sys.stdin.read()")  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          start_new_session=True) as child:  # fmt: skip
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        stand_back(child.pid, 19)
        child.stdin.write("\n")
        child.stdin.flush()
        child.stdout.readline()
        threads = [thread.id for thread in psutil.Process(child.pid).threads()]
        assert len(threads) == 3
        assert [os.getpriority(os.PRIO_PROCESS, thread) for thread in threads] == [19] * 3
        assert psutil.Process(child.pid).ionice().ioclass == psutil.IOPRIO_CLASS_IDLE
        group = Path(f"/proc/{child.pid}/autogroup")
        assert not group.exists() or group.read_text().split()[-2:] == ["nice", "19"]
        child.stdin.close()
    stand_back(child.pid, 19)  # It is gone, and nobody minds.


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_what_others_may_use_becomes_the_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"")
    for before, after in ((0o644, 0o600), (0o755, 0o600), (0o400, 0o400)):
        path.chmod(before)
        keep_private(path)
        assert path.stat().st_mode & 0o777 == after
    tmp_path.chmod(0o755)
    keep_private(tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["node.sock", "a long name" * 20])
def test_programs_of_this_machine_talk_over_a_socket_or_a_port(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with listen_here(path):
        pass  # As of a program that was killed: its socket is still there.
    with listen_here(path) as server:
        assert not path.exists() or path.stat().st_mode & 0o777 == 0o600
        with connect_here(server.getsockname(), timeout=10) as client, server.accept()[0] as served:
            client.sendall(b"hello")
            assert served.recv(5) == b"hello"
        at = server.getsockname()
    assert path.exists() == isinstance(at, str) == (len(name) < 20 and sys.platform != "win32")
    with pytest.raises(OSError):
        connect_here(at, timeout=10)


def test_a_part_of_an_open_file_is_read_in_place(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(bytes(range(100)))
    with open(path, "rb") as file:
        assert read_at(file.fileno(), 10, 90) == read_at(file.fileno(), 20, 90) == bytes(range(90, 100))
        assert file.tell() == 0
