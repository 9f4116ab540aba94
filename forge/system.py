"""What the operating system knows: the one module of `forge` with platform-specific calls."""

from __future__ import annotations

import os
from pathlib import Path
import sys

import psutil


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


def resident_bytes() -> int:
    """Resident set of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def physical_cores() -> int:
    """Physical cores, or logical ones where the system does not tell."""
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
