"""Other ways to partition, to train an expert and to gate: each changes one thing of the rows' operating point.

Losses of different partitions cannot be compared by partition, so every variant is measured on the same windows: the test
documents of the clustered partitions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from benchmarks.lab import mixtures, rivals
from benchmarks.lab.phases import Recipe, State, dense_model, expert
from benchmarks.lab.relabel import Relabelled
from benchmarks.lab.rows import Point, Row, modular_row, result, wanted
from benchmarks.lab.setting import TRAIN, VALIDATION
from forge.data.packing import batches, pad
from forge.evaluate.perplexity import measure
from forge.model.lm import LanguageModel
from forge.train.loss import IGNORE_INDEX

#: Windows by which an expert's output is scaled.
CALIBRATION_WINDOWS = 64

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
    second = replace(point, recipe=replace(point.recipe, volunteer=1))
    pairs = [rivals.average({}, pair) for pair in zip(point.experts, second.experts, strict=True)]
    gate = mixtures.top_k_gate(point.router(), point.setting.top_k)
    return point, mixtures.GatedMixture(point.routed, pairs, gate)


def better_volunteer(point: Point) -> tuple[Point, LanguageModel]:
    """Of two experts of each partition the one with the lower loss on its validation documents."""
    second = replace(point, recipe=replace(point.recipe, volunteer=1))

    def loss(expert: State, partition: int) -> float:
        model = dense_model(point.setting, {**point.shared, **expert}).eval()
        windows = point.setting.windows(point.documents(VALIDATION, partition))
        return measure(model, windows, batch_tokens=2048).nats_per_token

    better = [min(pair, key=lambda expert: loss(expert, k))
              for k, pair in enumerate(zip(point.experts, second.experts, strict=True))]  # fmt: skip
    gate = mixtures.top_k_gate(point.router(), point.setting.top_k)
    return point, mixtures.GatedMixture(point.routed, better, gate)


def generalist(trained: bool) -> Variant:
    """One more routed expert, for which no token is evidence: the shared FFN, or a copy trained on all documents."""

    def make(point: Point) -> tuple[Point, LanguageModel]:
        one_more = {name: t for name, t in point.shared.items() if ".mlp." in name}
        if trained:
            everybody, number = point.setting.documents(TRAIN), point.setting.experts
            one_more = expert(point.setting, point.base, everybody, point.expert_steps, point.home / "generalist.safetensors",
                              number, point.recipe, point.router)  # fmt: skip
        rows = [torch.cat([rows_ED, torch.zeros_like(rows_ED[:1])]) for rows_ED in point.router()]
        gate = mixtures.top_k_gate(rows, point.setting.top_k)
        return point, mixtures.GatedMixture(point.routed, [*point.experts, one_more], gate)

    return make


def calibrated(point: Point) -> tuple[Point, LanguageModel]:
    """Every expert scaled, layer by layer, so that its output is as large on its own partition as the shared FFN's is."""
    experts = []
    for k, ffn in enumerate(point.experts):
        gate_inputs: list[Tensor] = []
        alone = mixtures.GatedMixture(point.base, [ffn], mixtures.constant_gate([1.0]))
        for batch in batches(islice(point.router_windows(k), CALIBRATION_WINDOWS), 2048):
            with torch.inference_mode():
                alone(torch.from_numpy(pad(batch, IGNORE_INDEX)[0]), gate_inputs)
        changed = {name: tensor.clone() for name, tensor in ffn.items()}
        for layer in range(point.base.config.n_layers):
            x_ND = torch.cat([x.flatten(0, 1) for x in gate_inputs[layer :: point.base.config.n_layers]])
            own, shared = (mixtures.swiglu(x_ND, *mixtures.matrices(weights, layer)).norm() for weights in (ffn, point.shared))
            changed[f"model.layers.{layer}.mlp.w2.weight"] *= shared / own
        experts.append(changed)
    gate = mixtures.top_k_gate(point.router(), point.setting.top_k)
    return point, mixtures.GatedMixture(point.routed, experts, gate)


def relabelled(point: Point) -> tuple[Point, LanguageModel]:
    """Documents go to the expert that predicts them best, after half of the experts' steps."""
    changed = Relabelled(point.setting, point.shared_steps, point.expert_steps, point.annealed, point.partition, point.recipe)
    return changed, changed.ours(point.setting.top_k)


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
    "experts in batches of 1, rate x 0.5": trained(batch=1, rate=0.5),
    "experts in batches of 2": trained(batch=2),
    "experts in batches of 2, rate x 0.5": trained(batch=2, rate=0.5),
    "experts in batches of 8": trained(batch=8),
    "experts in batches of 8, rate x 2": trained(batch=8, rate=2.0),
    "experts in batches of 16, rate x 2": trained(batch=16, rate=2.0),
    "experts trained under their gate": trained(gated=True),
    "an eighth general text": trained(general=0.125),
    "a quarter general text": trained(general=0.25),
    "an eighth openings of all documents": trained(openings=0.125),
    "a quarter openings of all documents": trained(openings=0.25),
    "shared phase not annealed": placed(annealed=False),
    "two volunteers a partition, averaged": two_volunteers,
    "two volunteers a partition, the better one": better_volunteer,
    "one relabelling": relabelled,
    "a generalist: the shared FFN": generalist(trained=False),
    "a generalist: trained on all documents": generalist(trained=True),
    "experts' output as large as the shared FFN's": calibrated,
    "experts decay in the last half": trained(decay=0.5),
    "experts with AdamW": trained(optimizer="adamw"),
    "experts from random weights": trained(init="random"),
    "2 experts, same tokens in sum": counted(2),
    "8 experts, same tokens in sum": counted(8),
    "16 experts, same tokens in sum": counted(16),
    "8 experts, same tokens each": counted(8, grow=True),
    "16 experts, same tokens each": counted(16, grow=True),
}


def measure_variants(point: Point, only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Every variant of a point whose name has `only` in it."""
    for name, change in VARIANTS.items():
        if wanted(name, only):
            yield result(name, point, partial(_row, change=change))


def _row(point: Point, change: Variant) -> Row:
    changed, model = change(point)
    return replace(modular_row(changed, model), losses=point.measure(model))
