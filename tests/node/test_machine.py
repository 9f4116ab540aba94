from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from forge.errors import ConfigError, MemoryBudgetError
from node.machine import GIB, MachineProfile, cgroup_memory, resolve_device, usable_cores


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_this_machine() -> None:
    machine = MachineProfile.measure("cpu")
    assert machine.cores >= 1 and 0 < machine.free_bytes <= machine.memory_bytes
    assert machine.device == "cpu" and machine.hostname
    assert machine.default_ram_bytes < machine.memory_bytes


def test_cgroup_v2_takes_the_tightest_limit_and_gives_back_the_page_cache(tmp_path: Path) -> None:
    root = _write(tmp_path, {
        "proc/self/cgroup": "0::/outer/inner\n", "sys/fs/cgroup/outer/inner/memory.max": "max\n",
        "sys/fs/cgroup/outer/memory.max": "1000\n", "sys/fs/cgroup/outer/memory.current": "700\n",
        "sys/fs/cgroup/outer/memory.stat": "anon 1\ninactive_file 200\n",
        "sys/fs/cgroup/outer/inner/cpu.max": "100000 100000\n",
    })  # fmt: skip
    assert cgroup_memory(root) == (1000, 500)
    assert usable_cores(root) == 1


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


def test_devices(tmp_path: Path) -> None:
    assert resolve_device("auto", tmp_path) in ("cpu", "mps")
    with pytest.raises(ConfigError, match="--device auto"):
        resolve_device("cuda", tmp_path)
    with pytest.raises(ConfigError, match="unknown"):
        resolve_device("tpu", tmp_path)


def test_default_ram(machine: MachineProfile) -> None:
    eight = replace(machine, memory_bytes=8 * GIB, free_bytes=5 * GIB)
    assert eight.default_ram_bytes == 4 * GIB
    assert replace(eight, memory_bytes=64 * GIB, free_bytes=60 * GIB).default_ram_bytes == 8 * GIB
    assert replace(eight, free_bytes=GIB // 2).default_ram_bytes == 0
    assert (eight.reserve_bytes, eight.spare_bytes) == (GIB, 4 * GIB)
    with pytest.raises(MemoryBudgetError, match="at most --ram 8192M"):
        eight.check_ram(9 * GIB)
