from __future__ import annotations

from pathlib import Path

import pytest

from forge.devices import find_device
from forge.errors import ConfigError
from forge.train.precision import resolve_device


def test_devices(tmp_path: Path) -> None:
    assert find_device("auto", tmp_path) in ("cpu", "mps")
    with pytest.raises(ConfigError, match="--device auto"):
        find_device("cuda", tmp_path)
    with pytest.raises(ConfigError, match="unknown"):
        find_device("tpu", tmp_path)


def test_a_device_that_torch_does_not_see() -> None:
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"  # What pip installs for these tests is built for CPUs.
    with pytest.raises(ConfigError, match="sees no device mps"):
        resolve_device("mps")
