"""Other ways to partition, to train an expert and to gate: each changes one thing of the rows' operating point.

Losses of different partitions cannot be compared by partition, so every variant is measured on the same windows: the test
documents of the clustered partitions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.lab.phases import Recipe
from benchmarks.lab.rows import Point, Row, modular_row, result

#: What is changed of the point, and of the gate ("k", "method").
VARIANTS: dict[str, dict[str, Any]] = {
    "as in the table of rows": {},
    "partitions by tf-idf": {"partition": "tfidf"},
    "partitions at random": {"partition": "random"},
    "shared phase annealed": {"annealed": True},
    "shared phase annealed, experts' rate / 2": {"annealed": True, "rate": 0.5},
    "experts' rate x 2": {"rate": 2.0},
    "experts' rate x 4": {"rate": 4.0},
    "experts' rate / 2": {"rate": 0.5},
    "experts decay in the last half": {"decay": 0.5},
    "experts with AdamW": {"optimizer": "adamw"},
    "experts from random weights": {"init": "random"},
    "10 % general text": {"general": 0.1},
    "20 % general text": {"general": 0.2},
    "experts trained under their gate": {"gated": True},
    "top-1": {"k": 1},
    "top-3": {"k": 3},
    "all experts": {"k": 5},
}


def measure_variants(point: Point, only: str = "") -> Iterator[dict[str, Any]]:
    """Every variant of a point whose name has `only` in it."""
    for name, change in VARIANTS.items():
        if only in name:
            yield result(name, point, partial(_row, **change))


def _row(point: Point, k: int = 2, partition: str = "clustered", annealed: bool = False, **recipe: Any) -> Row:
    varied = replace(point, partition=partition, annealed=annealed, recipe=Recipe(**recipe))
    model = varied.ours(min(k, point.setting.experts))
    return replace(modular_row(varied, model), losses=point.measure(model))
