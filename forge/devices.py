"""Which device training can use, found without importing torch.

Whether there is a GPU is read from the driver's device files and from the text of the installed torch's version file. What
torch itself sees, `forge.train.precision.resolve_device` asks it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
import platform
import re

from forge.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda", "mps")


def find_device(device: str, root: Path = Path("/")) -> str:
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
