"""Other ways to partition, to train an expert and to gate: each changes one thing of the rows' operating point.

Losses of different partitions cannot be compared by partition, so every variant is measured on the same windows: the test
documents of the clustered partitions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.lab import mixtures, rivals
from benchmarks.lab.phases import Recipe
from benchmarks.lab.rows import Point, Row, modular_row, result
from forge.model.lm import LanguageModel

Variant = Callable[[Point], tuple[Point, LanguageModel]]
"""The point of the rows -> the changed one and its assembled model."""


def trained(**recipe: Any) -> Variant:
    """Experts trained in another way."""
    return placed(recipe=Recipe(**recipe))


def placed(**change: Any) -> Variant:
    """Other partitions, or another beginning."""

    def make(point: Point) -> tuple[Point, LanguageModel]:
        changed = replace(point, **change)
        return changed, changed.ours(changed.setting.top_k)

    return make


def gated(k: int = 2, sharpness: float = 1.0) -> Variant:
    """The same experts under more or fewer of them a token, or a gate of another temperature."""

    def make(point: Point) -> tuple[Point, LanguageModel]:
        rows = [sharpness * rows_ED for rows_ED in point.router()]
        gate = mixtures.top_k_gate(rows, min(k, point.setting.experts))
        return point, mixtures.GatedMixture(point.routed, point.experts, gate)

    return make


def counted(experts: int, grow: bool = False) -> Variant:
    """Another number of experts, for the same tokens in sum or for the same tokens each."""

    def make(point: Point) -> tuple[Point, LanguageModel]:
        steps = point.expert_steps if grow else max(1, round(point.expert_steps * point.setting.experts / experts))
        changed = replace(point, setting=replace(point.setting, experts=experts), expert_steps=steps)
        return changed, changed.ours(changed.setting.top_k)

    return make


def two_volunteers(point: Point) -> tuple[Point, LanguageModel]:
    """Two experts of each partition, which saw its text in different orders, averaged."""
    second = replace(point, recipe=Recipe(volunteer=1))
    pairs = [rivals.average({}, pair) for pair in zip(point.experts, second.experts, strict=True)]
    gate = mixtures.top_k_gate(point.router(), point.setting.top_k)
    return point, mixtures.GatedMixture(point.routed, pairs, gate)


VARIANTS: dict[str, Variant] = {
    "as in the table of rows": placed(),
    "top-1": gated(k=1),
    "top-3": gated(k=3),
    "all experts": gated(k=16),
    "gate twice as sharp": gated(sharpness=2.0),
    "gate half as sharp": gated(sharpness=0.5),
    "partitions by tf-idf": placed(partition="tfidf"),
    "partitions at random": placed(partition="random"),
    "experts' rate x 2": trained(rate=2.0),
    "experts' rate x 0.5": trained(rate=0.5),
    "experts' rate x 0.25": trained(rate=0.25),
    "experts trained under their gate": trained(gated=True),
    "an eighth general text": trained(general=0.125),
    "a quarter general text": trained(general=0.25),
    "an eighth openings of all documents": trained(openings=0.125),
    "a quarter openings of all documents": trained(openings=0.25),
    "shared phase annealed": placed(annealed=True),
    "shared phase annealed, experts' rate x 0.5": placed(annealed=True, recipe=Recipe(rate=0.5)),
    "two volunteers a partition, averaged": two_volunteers,
    "experts decay in the last half": trained(decay=0.5),
    "experts with AdamW": trained(optimizer="adamw"),
    "experts from random weights": trained(init="random"),
    "2 experts, same tokens in sum": counted(2),
    "8 experts, same tokens in sum": counted(8),
    "16 experts, same tokens in sum": counted(16),
    "8 experts, same tokens each": counted(8, grow=True),
    "16 experts, same tokens each": counted(16, grow=True),
}


def measure_variants(point: Point, only: str = "") -> Iterator[dict[str, Any]]:
    """Every variant of a point whose name has `only` in it."""
    for name, change in VARIANTS.items():
        if only in name:
            yield result(name, point, partial(_row, change=change))


def _row(point: Point, change: Variant) -> Row:
    changed, model = change(point)
    return replace(modular_row(changed, model), losses=point.measure(model))
