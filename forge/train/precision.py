"""Which number format this machine multiplies fastest, measured rather than guessed."""

from __future__ import annotations

import time

import torch

from forge.system import cpu_products

#: Side of the square matrices of the probe: large enough to be compute-bound, 20 ms on a slow core.
_SIDE = 384
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
        faster = faster and _seconds(torch.float32) > _WORTH * _seconds(torch.bfloat16)
    return torch.bfloat16 if faster else torch.float32


def resolve_device(device: str) -> str:
    """`auto` becomes the best device that torch sees here."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _seconds(dtype: torch.dtype) -> float:
    matrix = torch.ones(_SIDE, _SIDE, dtype=dtype)
    matrix @ matrix
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return best
