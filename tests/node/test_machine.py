from __future__ import annotations

from dataclasses import replace

import pytest

from forge.errors import MemoryBudgetError
from forge.train.memory import check_ram
from node.machine import GIB, MachineProfile


def test_this_machine() -> None:
    machine = MachineProfile.measure("cpu")
    assert machine.cores >= 1 and 0 < machine.free_bytes <= machine.memory_bytes
    assert machine.device == "cpu" and machine.hostname
    assert machine.default_ram_bytes < machine.memory_bytes


def test_default_ram(machine: MachineProfile) -> None:
    eight = replace(machine, memory_bytes=8 * GIB, free_bytes=5 * GIB)
    assert eight.default_ram_bytes == 4 * GIB
    assert replace(eight, memory_bytes=64 * GIB, free_bytes=60 * GIB).default_ram_bytes == 8 * GIB
    assert replace(eight, free_bytes=GIB // 2).default_ram_bytes == 0
    assert (eight.reserve_bytes, eight.spare_bytes) == (GIB, 4 * GIB)
    with pytest.raises(MemoryBudgetError, match="at most --ram 8192M"):
        check_ram(9 * GIB, eight.memory_bytes)
