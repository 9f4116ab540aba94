"""What the operating system knows: the one module of `forge` with platform-specific calls."""

from __future__ import annotations

from pathlib import Path
import sys

import psutil


def peak_resident_bytes() -> int:
    """Largest resident set this process ever had, in bytes (mapped file pages that were touched included)."""
    if sys.platform == "linux":
        # VmHWM belongs to this program; getrusage's ru_maxrss survives exec and would report the parent's peak.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", info.rss))


def resident_bytes() -> int:
    """Resident set of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def physical_cores() -> int:
    """Physical cores, or logical ones where the system does not tell."""
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
