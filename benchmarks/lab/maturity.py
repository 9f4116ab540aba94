"""How long to train the shared components, as a share of a wall-clock time T, counted in optimiser steps of one machine.

Four comparisons, at each maturity of the shared components (training tokens per live parameter at the split):

- alone: one machine trains the shared components for a share of T, then five train experts; the rival is one machine that
  trains a dense model for all of T;
- equal tokens, jointly: the same, against one machine that trains a dense model, or the mixture as one, on as many tokens as
  all of them saw in sum;
- together: five machines train the shared components by DiLoCo, then an expert each; the rival is DiLoCo for all of T.

There T follows from the maturity and the share. The table `split` holds T instead, and asks which share of it is the best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.lab import rivals
from benchmarks.lab.phases import DECAY, WARMUP_STEPS, State, dense_model, state_of, steps_of, tokens_of
from benchmarks.lab.rows import Maker, Point, Row, dense_row, joint_row, modular_row, result, trained_flops, wanted
from benchmarks.lab.setting import TRAIN, Setting

#: Shares of T for the shared phase.
SHARES = (0.7, 0.8, 0.9, 0.95)
#: Who is compared with whom: (ours, rival) by comparison.
PAIRS = {"alone": ("alone: ours", "alone: dense for all of T"),
         "equal tokens": ("alone: ours", "alone: dense, tokens of everybody"),
         "jointly": ("alone: ours", "alone: trained jointly, tokens of everybody"),
         "together": ("together: ours", "together: DiLoCo for all of T")}  # fmt: skip
#: Optimiser steps between two meetings of the workers.
ROUND_STEPS = 25


def measure_alone(setting: Setting, maturity: float, shares: Sequence[float],
                  only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The sides of the first three comparisons at one maturity, those whose name has `only` in it."""
    shared = steps_of(setting, maturity * setting.parameters)
    for share in shares:
        total = round(shared / share)
        point = Point(setting, shared, total - shared)
        makers: dict[str, Maker] = {
            "alone: dense for all of T": partial(dense_row, steps=total, name="rival"),
            "alone: ours": _ours,
            "alone: dense, tokens of everybody": partial(dense_row, steps=point.total_steps, name="rival"),
            "alone: trained jointly, tokens of everybody": joint_row}
        yield from _measured(point, share, total, makers, only)


def measure_split(setting: Setting, maturity: float, shares: Sequence[float],
                  only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Ours at every share of one T, which is `maturity` training tokens per live parameter of one machine, and its rival."""
    total = steps_of(setting, maturity * setting.parameters)
    for share in shares:
        shared = round(share * total)
        point = Point(setting, shared, total - shared)
        makers: dict[str, Maker] = {"split: dense for all of T": partial(dense_row, steps=total, name="rival"),
                                    "split: ours": _ours}  # fmt: skip
        yield from _measured(point, share, total, makers, only)


def measure_together(setting: Setting, maturity: float, shares: Sequence[float],
                     only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Both sides of the last comparison at one maturity, those whose name has `only` in it."""
    shared = steps_of(setting, maturity * setting.parameters / setting.experts)
    for share in shares:
        total = round(shared / share)
        point = Together(setting, shared, total - shared)
        makers: dict[str, Maker] = {"together: DiLoCo for all of T": partial(_dense_together, steps=total),
                                    "together: ours": _ours}  # fmt: skip
        yield from _measured(point, share, total, makers, only)


def _measured(point: Point, share: float, total: int, makers: dict[str, Maker],
              only: Sequence[str]) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The rows of one T, `total` steps of a machine, of which the shared phase has a share."""
    facts = {"share": share, "steps": total, "time_tokens": tokens_of(point.setting, total)}
    yield from (facts | result(name, point, make) for name, make in makers.items() if wanted(name, only))


def _ours(point: Point) -> Row:
    return modular_row(point, point.ours(point.setting.top_k))


class Together(Point):
    """A point whose shared components were trained by all workers."""

    @property
    def shared_work(self) -> int:
        """Optimiser steps of everybody in the shared phase."""
        return self.setting.experts * self.shared_steps

    @property
    def shared_name(self) -> str:
        """Of the shared components."""
        return f"together-{super().shared_name}"

    def train_shared(self) -> State:
        """Train the shared components."""
        return _by_all(self.setting, self.shared_steps)


def _by_all(setting: Setting, steps: int, **model: Any) -> State:
    """A dense model by DiLoCo from the first step, a random share of the documents for each worker."""
    start = state_of(dense_model(setting, **model))
    return rivals.diloco(setting, start, _shards(setting), steps, max(1, round(steps / ROUND_STEPS)),
                         f"together-{'rival-' if model else ''}{steps}", setting.scale.learning_rate, decay=DECAY,
                         warmup=WARMUP_STEPS, **model)  # fmt: skip


def _shards(setting: Setting) -> list[npt.NDArray[np.intp]]:
    documents = setting.documents(TRAIN)
    order = np.random.default_rng(setting.seed).permutation(documents)
    return [np.sort(order[worker :: setting.experts]) for worker in range(setting.experts)]


def _dense_together(point: Point, steps: int) -> Row:
    setting = point.setting
    fields = setting.rival()
    model = dense_model(setting, _by_all(setting, steps, **fields), **fields).eval()
    everybody = setting.experts * steps
    return Row(point.measure(model), tokens_of(setting, everybody), trained_flops(point, everybody, **fields))
