"""How long to train the shared components: one machine trains them for a share of T, five train experts for the rest.

The rival is one machine that trains a dense model for all of T. Time is counted in optimiser steps of one machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks.lab.phases import steps_of, tokens_of
from benchmarks.lab.rows import Point, dense_row, modular_row, result
from benchmarks.lab.setting import Setting

#: Shares of T for the shared phase.
SHARES = (0.6, 0.7, 0.8, 0.9)


def measure_maturity(setting: Setting, maturity: float, shares: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Both sides at one maturity of the shared components (training tokens per live parameter at the split)."""
    shared = steps_of(setting, maturity * setting.parameters)
    for share in shares:
        total = round(shared / share)
        point = Point(setting, shared, total - shared)
        facts = {"share": share, "steps": total, "time_tokens": tokens_of(setting, total)}
        yield facts | result("alone: dense for all of T", point, partial(dense_row, steps=total, name="rival"))
        yield facts | result("alone: ours", point, lambda p: modular_row(p, p.ours(2)))
