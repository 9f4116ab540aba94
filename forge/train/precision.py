"""Which number format this machine multiplies fastest, measured rather than guessed."""

from __future__ import annotations

import time

import torch

from forge.errors import ConfigError
from forge.system import cpu_products

#: Side of the square matrices of the probe: large enough to be compute-bound, 20 ms on a slow core.
_SIDE = 384
#: Products of each type, taken in turn: whatever else the machine does now and then, it does to both.
_PRODUCTS = 20
#: bf16 must beat float32 by this factor to be worth its rounding.
_WORTH = 1.3


def product_dtype(device: str) -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32, else float32.

    A CPU must say that it has the instructions, as the memory plan believes it, and be faster by a measured probe.
    """
    if device.startswith("cuda"):
        faster = torch.cuda.is_bf16_supported()
    else:
        faster = device == "cpu" and cpu_products() == "bfloat16"
        faster = faster and _bfloat16_is_faster()
    return torch.bfloat16 if faster else torch.float32


def resolve_device(device: str) -> str:
    """`auto` becomes the best device that torch sees here.

    Raises:
        ConfigError: torch sees no such device.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, found in here.items() if found)
    if not here[device]:
        raise ConfigError(f"torch sees no device {device} here: use --device auto, or mend its driver.")
    return device


def _bfloat16_is_faster() -> bool:
    matrices = [torch.ones(_SIDE, _SIDE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    seconds = []
    for _ in range(1 + _PRODUCTS):
        for matrix in matrices:
            start = time.perf_counter()
            matrix @ matrix
            seconds.append(time.perf_counter() - start)
    return min(seconds[2::2]) > _WORTH * min(seconds[3::2])  # The first two made ready what the others use.
