"""What the machine really has: cores, memory, device, each as far as a node may use it.

The agent never imports torch, so whether there is a GPU is read from the driver's device files and from the text of the
installed torch's version file.
"""

from __future__ import annotations

from dataclasses import dataclass
import importlib.util
from pathlib import Path
import platform
import re
import socket

import psutil

from forge.errors import ConfigError, MemoryBudgetError
from forge.system import cgroup_memory, usable_cores

GIB = 1 << 30
#: Memory that stays free for the owner where that can be, a share of the machine's within these bounds. A browser and a
#: desktop on an 8 GB machine want about 1 GB.
RESERVE_SHARE = 1 / 8
RESERVE_BYTES = (GIB // 2, 4 * GIB)
#: Without --ram: never more than this, which is enough for every packaged config.
DEFAULT_RAM_CAP = 8 * GIB

DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True, kw_only=True)
class MachineProfile:
    """What was measured; sizes in bytes. `memory_bytes` and `free_bytes` respect a container's limit."""

    hostname: str
    platform: str
    cores: int
    memory_bytes: int
    free_bytes: int
    device: str

    @classmethod
    def measure(cls, device: str = "auto", root: Path = Path("/")) -> MachineProfile:
        """Measure this machine.

        Args:
            device: one of `DEVICES`; auto takes the best that is here.
            root: where `sys`, `proc` and `dev` are looked for.

        Raises:
            ConfigError: the device asked for is not here.
        """
        memory = psutil.virtual_memory()
        limit, used = cgroup_memory(root)
        total = min(memory.total, limit) if limit is not None else memory.total
        free = min(memory.available, limit - used) if limit is not None else memory.available
        return cls(
            hostname=socket.gethostname(),
            platform=f"{platform.system()} {platform.release()} {platform.machine()}",
            cores=usable_cores(root),
            memory_bytes=int(total),
            free_bytes=max(0, int(free)),
            device=resolve_device(device, root),
        )

    @property
    def reserve_bytes(self) -> int:
        """What stays free for the owner."""
        low, high = RESERVE_BYTES
        return min(max(int(self.memory_bytes * RESERVE_SHARE), low), high)

    @property
    def spare_bytes(self) -> int:
        """What is free now, less the owner's reserve."""
        return max(0, self.free_bytes - self.reserve_bytes)

    @property
    def default_ram_bytes(self) -> int:
        """What a node may use when its owner names nothing: what is to spare, at most `DEFAULT_RAM_CAP`."""
        return min(self.spare_bytes, DEFAULT_RAM_CAP)

    def check_ram(self, ram_bytes: int) -> None:
        """Refuse a --ram that this machine does not have.

        Raises:
            MemoryBudgetError: `ram_bytes` is more than the machine's memory.
        """
        if ram_bytes > self.memory_bytes:
            raise MemoryBudgetError(
                f"--ram asks for {ram_bytes / GIB:.1f} GiB and this machine has {self.memory_bytes / GIB:.1f} GiB: "
                f"give at most --ram {max(1, self.memory_bytes >> 20)}M.")  # fmt: skip


def resolve_device(device: str, root: Path = Path("/")) -> str:
    """Turn `auto` into cpu, cuda or mps, and check that a device that was named is here.

    Raises:
        ConfigError: the device is unknown or not here.
    """
    if device not in DEVICES:
        raise ConfigError(f"The device {device!r} is unknown: choose one of {', '.join(DEVICES)}.")
    here = {"cpu": True, "cuda": _has_cuda(root), "mps": _has_mps()}
    if device == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if here[name])
    if not here[device]:
        raise ConfigError(f"--device {device} is not available: no such device is here, or the installed torch was "
                          "built without it; use --device auto.")  # fmt: skip
    return device


def _has_cuda(root: Path) -> bool:
    drivers = ("dev/nvidiactl", "dev/nvidia0", "dev/dxg", "dev/kfd")
    return any((root / name).exists() for name in drivers) and _torch_built_with("cuda", "hip")


def _has_mps() -> bool:
    return platform.system() == "Darwin" and platform.machine() == "arm64"


def _torch_built_with(*toolkits: str) -> bool:
    """Whether torch's `version.py` names a version of one of the toolkits. Finding the package does not import it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(re.search(rf"^{toolkit}\b[^=\n]*=\s*['\"]", text, re.MULTILINE) for toolkit in toolkits)
