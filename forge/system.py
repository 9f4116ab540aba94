"""What the operating system knows: the one module of `forge` with platform-specific calls."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from itertools import count
import os
from pathlib import Path
import sys
from typing import Literal

import psutil

#: Control groups of ours are named after the process that made them, so that those of a killed one can be found.
_GROUP_PREFIX = "modularforge-"
_group_numbers = count(1)


def peak_resident_bytes() -> int:
    """Largest resident set this process ever had, in bytes (mapped file pages that were touched included)."""
    # VmHWM belongs to this program; getrusage's ru_maxrss survives exec and would report the parent's peak.
    return peak_resident_bytes_of(os.getpid())


def peak_resident_bytes_of(pid: int) -> int:
    """Largest resident set that a process ever had, in bytes; 0 when it is gone. Linux keeps it, elsewhere it may be now's."""
    try:
        if sys.platform == "linux":
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
            return 0  # A process that ended and was not waited for.
        info = psutil.Process(pid).memory_info()
        return int(getattr(info, "peak_wset", info.rss))
    except (psutil.Error, OSError):
        return 0


@cache
def cpu_products() -> Literal["float32", "bfloat16"]:
    """The type that this CPU says it multiplies fastest: bfloat16 where it has instructions for it (Linux tells)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "float32"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    return "bfloat16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else "float32"


def lock(descriptor: int) -> bool:
    """Take the system's lock on an open file, held until it is closed or the process ends; False when another has it."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def resident_bytes() -> int:
    """Resident set of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def physical_cores() -> int:
    """Physical cores, or logical ones where the system does not tell."""
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def resident_bytes_of(pid: int) -> int:
    """Resident set of a process now, in bytes; 0 when it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


class MemoryGroup:
    """A control group (cgroup v2) with one process in it, whose memory the kernel limits.

    Beyond the limit the kernel first takes back what it can read again from files, then kills the process.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @classmethod
    def hold(cls, pid: int, limit_bytes: int, root: Path = Path("/")) -> MemoryGroup | None:
        """Put a process that has hardly begun into a group of its own; None where this process may not."""
        parent = memory_group_parent(root)
        if parent is None:
            return None
        _remove_leftovers(parent)
        group = cls(parent / f"{_GROUP_PREFIX}{os.getpid()}-{next(_group_numbers)}")
        try:
            group._directory.mkdir()
            _write(group._directory / "memory.max", str(limit_bytes))
            # Swap would be memory beyond the limit; a kernel without it has no such file.
            with suppress(FileNotFoundError):
                _write(group._directory / "memory.swap.max", "0")
            _write(group._directory / "cgroup.procs", str(pid))
        except OSError:
            group.remove()
            return None
        return group

    def killed(self) -> bool:
        """Whether the kernel killed a process of the group because it was at its limit."""
        events = dict(line.split() for line in _lines(self._directory / "memory.events"))
        return int(events.get("oom_kill", 0)) > 0

    def remove(self) -> None:
        """Remove the group, once its process has ended."""
        with suppress(OSError):
            self._directory.rmdir()


def memory_group_parent(root: Path = Path("/")) -> Path | None:
    """The control group in which this process may make others with a memory limit; None where there is none.

    It is the own group or the one above it: a group that holds processes cannot hand memory limits down. A service manager
    delegates the one above to its user (`systemd-run --user --scope`, a terminal of a desktop), root may use any. An own
    group that has a limit itself is not left.
    """
    mount = root / "sys/fs/cgroup"
    path = next((line[3:] for line in _lines(root / "proc/self/cgroup") if line.startswith("0::/")), None)
    if path is None:
        return None
    own = mount / path.lstrip("/")
    limited = "".join(_lines(own / "memory.max")) not in ("", "max")
    for directory in [own] if own == mount or limited else [own, own.parent]:
        if _hands_down_memory(directory):
            return directory
    return None


def _hands_down_memory(directory: Path) -> bool:
    """Whether groups made in this one get a memory limit; switched on where it is off and may be on."""
    here = [" ".join(_lines(directory / f"cgroup.{name}")).split() for name in ("controllers", "subtree_control")]
    # Moving a process takes the right to write to the group that is above both its old and its new one: this one.
    if "memory" not in here[0] or not all(os.access(path, os.W_OK) for path in (directory, directory / "cgroup.procs")):
        return False
    if "memory" not in here[1]:
        try:
            _write(directory / "cgroup.subtree_control", "+memory")
        except OSError:
            return False
    return True


def _remove_leftovers(parent: Path) -> None:
    """Remove the groups of processes that were killed; the kernel keeps those that are in use."""
    for directory in parent.glob(f"{_GROUP_PREFIX}*-*"):
        maker = directory.name.removeprefix(_GROUP_PREFIX).split("-")[0]
        if maker.isdigit() and not psutil.pid_exists(int(maker)):
            MemoryGroup(directory).remove()


def _write(path: Path, text: str) -> None:
    """Write to a file that the kernel has made; one that is not there is an error, as is what the kernel refuses."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode("ascii"))
    finally:
        os.close(descriptor)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
