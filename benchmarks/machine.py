"""The machine that a benchmark ran on, in a clause."""

from __future__ import annotations

import os
from pathlib import Path
import platform
import re

import psutil


def described() -> str:
    """Such as `an AMD EPYC, 2 threads, 24 GB of memory, Linux 6.1, Python 3.11`."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    model = named[1].strip() if named else platform.processor() or platform.machine()
    return (f"{model}, {os.cpu_count()} threads, {psutil.virtual_memory().total / 1e9:.0f} GB of memory, "
            f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}")  # fmt: skip
