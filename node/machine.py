"""What the machine really has: cores, memory, device, each as far as a node may use it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
import platform
import socket

import psutil

from forge.devices import find_device
from forge.system import cgroup_memory, total_memory, usable_cores

GIB = 1 << 30
#: Memory that stays free for the owner where that can be, a share of the machine's within these bounds. A browser and a
#: desktop on an 8 GB machine want about 1 GB.
RESERVE_SHARE = 1 / 8
RESERVE_BYTES = (GIB // 2, 4 * GIB)
#: Without --ram: never more than this, which is enough for every packaged config.
DEFAULT_RAM_CAP = 8 * GIB


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
            device: one of `forge.devices.DEVICES`; auto takes the best that is here.
            root: where `sys`, `proc` and `dev` are looked for.

        Raises:
            ConfigError: the device asked for is not here.
        """
        memory = psutil.virtual_memory()
        limit, used = cgroup_memory(root)
        free = min(memory.available, limit - used) if limit is not None else memory.available
        return cls(
            hostname=socket.gethostname(),
            platform=f"{platform.system()} {platform.release()} {platform.machine()}",
            cores=usable_cores(root),
            memory_bytes=total_memory(root),
            free_bytes=max(0, int(free)),
            device=find_device(device, root),
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
