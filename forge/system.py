"""What the operating system knows and does: the one module with calls that only some systems have.

psutil is imported where it is used: `forge-node status` and its like, which only open a socket, do without.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from itertools import count
import math
import os
from pathlib import Path
import socket
import stat
import sys
import threading
from typing import Literal

#: Control groups of ours are named after the process that made them, so that those of a killed one can be found.
_GROUP_PREFIX = "modularforge-"
_group_numbers = count(1)
#: Held while an open file is where one thread reads, on Windows: there a read moves its position.
_positions = threading.Lock()
#: How often a waiting thread looks before it sleeps: a tenth of a millisecond, about what it takes to be woken up.
_SPINS = "5000"
#: cgroup v1 writes "no limit" as a number near 2**63.
_NO_LIMIT = 1 << 60
#: The longest path of a Unix socket that every system takes (macOS: 104 with the final zero).
_MAX_SOCKET_PATH = 100


def peak_resident_bytes() -> int:
    """Largest resident set this process ever had, in bytes (mapped file pages that were touched included)."""
    # VmHWM belongs to this program; getrusage's ru_maxrss survives exec and would report the parent's peak.
    return peak_resident_bytes_of(os.getpid())


def peak_resident_bytes_of(pid: int) -> int:
    """Largest resident set that a process ever had, in bytes; 0 when it is gone. Linux keeps it, elsewhere it may be now's."""
    import psutil

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


def resident_bytes() -> int:
    """Resident set of this process now, in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def resident_bytes_of(pid: int) -> int:
    """Resident set of a process now, in bytes; 0 when it is gone."""
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def physical_cores() -> int:
    """Physical cores, or logical ones where the system does not tell."""
    import psutil

    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def usable_cores(root: Path = Path("/")) -> int:
    """Cores this process may run on: the scheduler's affinity, and a container's CPU quota rounded up."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else (os.cpu_count() or 1)
    for directory in _cgroup_directories(root, "cpu"):
        quota = _cpu_quota(directory)
        if quota is not None:
            cores = min(cores, max(1, math.ceil(quota)))
    return max(1, cores)


def default_threads() -> int:
    """Threads of heavy work where nobody says how many: `OMP_NUM_THREADS`, else the physical cores that are ours to use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(asked) if asked.isdecimal() and int(asked) else min(physical_cores(), usable_cores())


@cache
def cpu_products() -> Literal["float32", "bfloat16"]:
    """The type that this CPU says it multiplies fastest: bfloat16 where it has instructions for it (Linux tells)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "float32"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    return "bfloat16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else "float32"


def wait_asleep() -> None:
    """Have torch's threads wait for each other asleep, but for a first moment; for a process that has not imported it yet.

    GNU's OpenMP, which torch has on Linux, lets a thread that waits look again for some milliseconds. Where other programs
    want the processors too, that takes from the very thread it waits for: with one such program on two cores training was
    five to ten times as slow (`benchmarks/busy.py`). Waiting changes no result. What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


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


def is_locked(path: Path) -> bool:
    """Whether a process has the lock on a file; one that was killed has none any more."""
    with suppress(OSError), open(path, "r+b") as file:
        return not lock(file.fileno())
    return False


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable, where the system can open directories (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keep_private(path: Path) -> None:
    """Leave a file or directory to its owner alone when others have rights to it too (Windows keeps those elsewhere)."""
    mode = path.stat().st_mode
    if os.name == "posix" and mode & 0o077:
        os.chmod(path, 0o700 if stat.S_ISDIR(mode) else 0o600)


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """At most `size` bytes of an open file from `offset` on, for any thread that reads in no other way."""
    size = min(size, 1 << 30)  # Linux moves at most 2 GiB a call.
    if sys.platform == "win32":
        with _positions:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.read(descriptor, size)
    return os.pread(descriptor, size, offset)


def allow_rebind(bound: socket.socket) -> None:
    """Let a socket have a port that was used a moment ago. Windows needs no leave, and would share one that is in use."""
    if os.name == "posix":
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def listen_here(path: Path) -> socket.socket:
    """Listen for programs of this machine: on a Unix socket that only its owner may use, or else on a loopback port.

    Args:
        path: of the socket; one that is there already is replaced. A long path, and a system or file system without such
            sockets, make it a port.
    """
    if sys.platform != "win32" and len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.unlink(missing_ok=True)
            server.bind(str(path))
            os.chmod(path, 0o600)
            server.listen()
            return server
        except OSError:
            server.close()
    return socket.create_server(("127.0.0.1", 0))


def connect_here(at: str | tuple[str, int], timeout: float) -> socket.socket:
    """Connect to what `listen_here` made.

    Args:
        at: what its `getsockname` says.
        timeout: seconds for this and for everything that is sent and received.

    Raises:
        OSError: nobody listens there, or it is another user's.
    """
    if not isinstance(at, str):
        return socket.create_connection(at, timeout)
    if sys.platform == "win32":
        raise ConnectionRefusedError("a Unix socket, and this is Windows")
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        client.settimeout(timeout)
        client.connect(at)
    except BaseException:
        client.close()
        raise
    return client


def set_priority(pid: int, nice: int) -> None:
    """Give a process another priority for processors, before it starts threads.

    Args:
        pid: the process; it may be gone.
        nice: 1 to 19, as of nice(1); Windows knows one low priority only.
    """
    import psutil

    with suppress(psutil.Error, OSError):
        if sys.platform == "win32":
            nice = psutil.IDLE_PRIORITY_CLASS
        psutil.Process(pid).nice(nice)


def stand_back(pid: int, nice: int) -> None:
    """Give a process and all its threads a low priority for processors, and the lowest for disks.

    Args:
        pid: the process; it may be gone.
        nice: as for `set_priority`; 0 leaves it as it is.
    """
    import psutil

    if nice == 0:
        return
    set_priority(pid, nice)
    with suppress(psutil.Error, OSError):
        process = psutil.Process(pid)
        if sys.platform == "win32":
            process.ionice(psutil.IOPRIO_VERYLOW)
        if sys.platform == "linux":
            # Linux knows priorities of threads; those that are started later inherit them.
            for thread in process.threads():
                os.setpriority(os.PRIO_PROCESS, thread.id, nice)
                psutil.Process(thread.id).ionice(psutil.IOPRIO_CLASS_IDLE)
            # And where it schedules by session, priorities count within a session only, and each has one of its own: sched(7).
            if os.getsid(pid) == pid:
                Path(f"/proc/{pid}/autogroup").write_text(str(nice))


def cgroup_memory(root: Path = Path("/")) -> tuple[int | None, int]:
    """The tightest memory limit of the control groups (v1 or v2) this process is in, and the bytes used under it.

    The page cache that the kernel gives back when asked is not counted as used. Without a limit: (None, 0).
    """
    tightest: int | None = None
    used = 0
    for directory in _cgroup_directories(root, "memory"):
        limit = _number(directory / "memory.max") or _number(directory / "memory.limit_in_bytes")
        if limit is None or limit >= _NO_LIMIT or (tightest is not None and limit >= tightest):
            continue
        charged = _number(directory / "memory.current") or _number(directory / "memory.usage_in_bytes") or 0
        tightest, used = limit, max(0, charged - _reclaimable(directory))
    return tightest, used


def total_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process can have: the machine's, or a container's limit where that is less."""
    import psutil

    limit, _ = cgroup_memory(root)
    machine = int(psutil.virtual_memory().total)
    return machine if limit is None else min(machine, limit)


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
    import psutil

    for directory in parent.glob(f"{_GROUP_PREFIX}*-*"):
        maker = directory.name.removeprefix(_GROUP_PREFIX).split("-")[0]
        if maker.isdigit() and not psutil.pid_exists(int(maker)):
            MemoryGroup(directory).remove()


def _cgroup_directories(root: Path, controller: str) -> list[Path]:
    """Directories of this process's control groups and their parents, innermost first; v2 and v1 mount points."""
    base = root / "sys/fs/cgroup"
    directories: list[Path] = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers and controller not in controllers.split(","):
            continue
        mount = base / controller if controllers else base
        inner = mount / path.lstrip("/")
        while inner != mount and mount in inner.parents:
            directories.append(inner)
            inner = inner.parent
        directories.append(mount)
    return [directory for directory in directories if directory.is_dir()]


def _cpu_quota(directory: Path) -> float | None:
    words = " ".join(_lines(directory / "cpu.max")).split()
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
        return int(words[0]) / int(words[1])
    quota, period = _number(directory / "cpu.cfs_quota_us"), _number(directory / "cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 else None


def _reclaimable(directory: Path) -> int:
    for line in _lines(directory / "memory.stat"):
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and value.isdigit():
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    try:
        return int(text)
    except ValueError:
        return None


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
