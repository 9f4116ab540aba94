"""The rows of the table: each a way to spend the same tokens, measured on the same documents.

Every row is made from what was trained (kept on disk) and measured once (kept as JSON), so a killed benchmark goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.lab import mixtures, rivals
from benchmarks.lab.phases import Recipe, State, dense, dense_model, expert, tokens_of
from benchmarks.lab.setting import OUTSIDE, TEST, TRAIN, VALIDATION, Setting
from forge.config import RouterConfig
from forge.data.features import document_features
from forge.data.partition import assign
from forge.data.tokenizer import load_tokenizer
from forge.evaluate.perplexity import Loss, equal_weight_mean, pooled
from forge.files import read_json, write_json
from forge.model.lm import DenseLM
from forge.router.context import add_context, count_tokens
from forge.router.fit import bayes_rows, fit_rows
from forge.router.stage import SCALE_WINDOWS, temperatures
from forge.router.statistics import Array, LayerStatistics, collect
from forge.train.memory import TEMPERATURE_TOKENS


@dataclass
class Point:
    """One operating point: how long the shared components and each expert are trained."""

    setting: Setting
    shared_steps: int
    expert_steps: int
    annealed: bool = True
    """Whether the shared phase ends in its decay; else only the experts' rate falls, and the shared components never settle."""
    partition: str = "clustered"
    recipe: Recipe = Recipe()

    @property
    def shared_work(self) -> int:
        """Optimiser steps of everybody in the shared phase."""
        return self.shared_steps

    @property
    def total_steps(self) -> int:
        """Optimiser steps that everybody together takes."""
        return self.shared_work + self.setting.experts * self.expert_steps

    @property
    def shared_name(self) -> str:
        """Of the shared components."""
        return f"{'annealed' if self.annealed else 'constant'}-{self.shared_steps}"

    @property
    def name(self) -> str:
        """Of its files."""
        changed = [f"-{field.name}={getattr(self.recipe, field.name)}" for field in fields(Recipe)
                   if getattr(self.recipe, field.name) != field.default]  # fmt: skip
        return f"{self.shared_name}-{self.partition}-{self.setting.experts}x{self.expert_steps}{''.join(changed)}"

    @property
    def home(self) -> Path:
        """Where its files lie."""
        return self.setting.work / self.name

    @cached_property
    def shared(self) -> State:
        """The shared components at the split."""
        return self.train_shared()

    def train_shared(self) -> State:
        """Train the shared components, or read them."""
        return dense(self.setting, self.shared_steps, annealed=self.annealed)

    @cached_property
    def base(self) -> DenseLM:
        """The shared components, frozen, as they were trained."""
        return dense_model(self.setting, self.shared).eval().requires_grad_(False)

    @cached_property
    def routed(self) -> DenseLM:
        """The shared components with their context head, as they are assembled."""
        model = dense_model(self.setting, self.shared).eval().requires_grad_(False)
        add_context(model, self.counts, self.scale_windows(range(self.setting.experts)))
        return model

    @cached_property
    def counts(self) -> Array:
        """How often each token occurs in the training documents of each partition, (K, V)."""
        corpus = self.setting.corpus
        return np.stack([count_tokens((corpus.document(index) for index in self.documents(TRAIN, k)), corpus.vocab_size)
                         for k in range(self.setting.experts)])  # fmt: skip

    def scale_windows(self, partitions: Iterable[int]) -> Iterator[npt.NDArray[np.int64]]:
        """Some windows of these partitions, by which the context channels are scaled."""
        tokens = SCALE_WINDOWS * self.setting.scale.seq_len
        return chain.from_iterable(self.setting.windows(self.documents(TRAIN, k), tokens) for k in partitions)

    def router_windows(self, partition: int) -> Iterator[npt.NDArray[np.int64]]:
        """The training windows of a partition that a router is fitted on."""
        tokens = self.setting.scale.router_tokens // self.setting.experts
        return self.setting.windows(self.documents(TRAIN, partition), tokens)

    @cached_property
    def assignment(self) -> npt.NDArray[np.integer]:
        """Partition of each document, by the features of the shared components."""
        setting = self.setting
        path = setting.work / f"assignment-{self.shared_name}-{self.partition}-{self.setting.experts}.npy"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            features = None
            if self.partition == "clustered":
                features = document_features(self.base, setting.corpus, setting.scale.seq_len, path.with_suffix(".f32"),
                                             lambda **_: None)  # fmt: skip
            tokenizer = load_tokenizer(setting.data / "tokenizer.json")
            np.save(path, assign(
                self.partition, setting.experts, split=setting.split, tokens_per_document=setting.corpus.lengths,
                seed=setting.seed, features=features,
                texts=lambda index: tokenizer.decode(setting.corpus.document(index).tolist())))  # fmt: skip
        found: npt.NDArray[np.integer] = np.load(path)
        return found

    def documents(self, split: int, partition: int) -> npt.NDArray[np.intp]:
        """Documents of one partition and split."""
        return self.setting.documents(split, self.assignment, partition)

    @cached_property
    def experts(self) -> list[State]:
        """The experts, trained apart."""
        return [expert(self.setting, self.routed if self.recipe.gated else self.base, self.documents(TRAIN, k),
                       self.expert_steps, self.home / f"expert-{k}.safetensors", k, self.recipe, self.router)
                for k in range(self.setting.experts)]  # fmt: skip

    @cached_property
    def statistics(self) -> dict[bool, list[LayerStatistics]]:
        """What ridge, lda and centroid are fitted on, with and without the context head."""
        return {context: self._collect(model) for context, model in ((True, self.routed), (False, self.base))}

    def _collect(self, model: DenseLM) -> list[LayerStatistics]:
        experts = self.setting.experts
        layers = [LayerStatistics.empty(experts, model.config.d_model) for _ in range(model.config.n_layers)]
        for k in range(experts):
            collect(model, k, self.router_windows(k), layers)
        return layers

    def router(self, method: str = RouterConfig().method, context: bool = True) -> list[Tensor]:
        """Rows of the gate of every layer, (E, D), at the fitted temperature."""
        config = RouterConfig.model_validate({"method": method})
        if method == "bayes":
            rows = [bayes_rows(self.routed.config, self.counts)] * self.routed.config.n_layers
        else:
            rows = [fit_rows(layer, config) for layer in self.statistics[context]]
        return self.at_temperature(self.routed if context else self.base, rows)

    def at_temperature(self, model: DenseLM, rows: Sequence[Array], partitions: Iterable[int] | None = None) -> list[Tensor]:
        """The rows of each layer times the factor that suits the validation documents of the partitions, all unless given."""
        held_out = [self.setting.windows(self.documents(VALIDATION, k), TEMPERATURE_TOKENS)
                    for k in partitions or range(self.setting.experts)]  # fmt: skip
        factors, _ = temperatures(model, rows, held_out)
        return [torch.from_numpy(factor * rows_ED).float() for factor, rows_ED in zip(factors, rows, strict=True)]

    def ours(self, k: int, method: str = RouterConfig().method, context: bool = True) -> mixtures.GatedMixture:
        """The assembled model: experts, router, nothing retrained."""
        gate = mixtures.top_k_gate(self.router(method, context), k)
        return mixtures.GatedMixture(self.routed if context else self.base, self.experts, gate)

    def mixture(self, gate: mixtures.Gate) -> mixtures.GatedMixture:
        """The experts under any gate."""
        return mixtures.GatedMixture(self.base, self.experts, gate)

    def measure(self, model: Any) -> dict[str, Loss]:
        """Test losses of a model on every partition and on the domain nobody trained on."""
        return mixtures.losses(self.setting, model, self.assignment)

    @cached_property
    def test_windows(self) -> dict[str, list[npt.NDArray[np.int64]]]:
        """Test windows by partition, and those of the domain nobody trained on."""
        tokens = self.setting.scale.eval_tokens
        found = {str(k): list(self.setting.windows(self.documents(TEST, k), tokens)) for k in range(self.setting.experts)}
        return found | {OUTSIDE: list(self.setting.outside_windows())}

    @cached_property
    def log_p(self) -> dict[str, list[list[npt.NDArray[np.float64]]]]:
        """Log p of every test target under each expert alone and, last, under the shared components."""
        models = [dense_model(self.setting, {**self.shared, **ffn}) for ffn in self.experts] + [self.base]
        return {name: [rivals.log_probabilities(model, windows) for model in models]
                for name, windows in self.test_windows.items()}  # fmt: skip

    def sizes(self, name: str) -> list[int]:
        """UTF-8 bytes of the targets of each test window."""
        return [int(self.setting.token_bytes[window[1:]].sum()) for window in self.test_windows[name]]


@dataclass(frozen=True)
class Row:
    """A measured row."""

    losses: dict[str, Loss]
    tokens: int
    flops: float


Maker = Callable[[Point], Row]


def wanted(name: str, only: Sequence[str]) -> bool:
    """Whether a row is asked for: by a part of its name, or because nothing else is."""
    return not only or any(part in name for part in only)


def result(name: str, point: Point, make: Maker) -> dict[str, Any]:
    """The JSON of a row, measured once."""
    path = point.home / "rows" / f"{name}.json"
    if path.is_file():
        return dict(read_json(path))
    row = make(point)
    inside = [loss for key, loss in row.losses.items() if key != OUTSIDE]
    found = {"row": name, "seed": point.setting.seed, "tokens": row.tokens, "flops": row.flops,
             "loss": {key: loss.nats_per_token for key, loss in row.losses.items() if key != OUTSIDE},
             "mean": equal_weight_mean(inside), "pooled": pooled(inside).nats_per_token,
             "bits_per_byte": pooled(inside).bits_per_byte, OUTSIDE: row.losses[OUTSIDE].nats_per_token}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    return found


def trained_flops(point: Point, steps: int, **model: Any) -> float:
    """6 N a token for a model that trains all of its N parameters, the head's matrix included."""
    return 6.0 * point.setting.config(**model).model.dense_parameters * tokens_of(point.setting, steps)


def modular_flops(point: Point) -> float:
    """The shared phase, then experts: 6 N a trained and 4 N a frozen parameter and token."""
    model = point.setting.config().model
    frozen = model.dense_parameters - model.expert_parameters
    tokens = tokens_of(point.setting, point.expert_steps) * point.setting.experts
    return trained_flops(point, point.shared_work) + tokens * (6.0 * model.expert_parameters + 4.0 * frozen)


def dense_row(point: Point, steps: int, name: str, **model: Any) -> Row:
    """A rival that trains all of its parameters for so many steps."""
    fields = point.setting.rival(**model)
    trained = dense_model(point.setting, dense(point.setting, steps, name, **fields), **fields).eval()
    return Row(point.measure(trained), tokens_of(point.setting, steps), trained_flops(point, steps, **fields))


def shared_row(point: Point) -> Row:
    """The shared components at the split, annealed."""
    trained = dense_model(point.setting, dense(point.setting, point.shared_steps)).eval()
    steps = point.shared_steps
    return Row(point.measure(trained), tokens_of(point.setting, steps), trained_flops(point, steps))


def joint_row(point: Point) -> Row:
    """A mixture of which every parameter learned, with the load-balance loss."""
    model = rivals.joint_mixture(point.setting, point.total_steps)
    config = model.config
    active = config.dense_parameters + (config.top_k - 1) * config.expert_parameters + config.router_parameters
    tokens = tokens_of(point.setting, point.total_steps)
    return Row(point.measure(model), tokens, 6.0 * active * tokens)


def diloco_row(point: Point) -> Row:
    """From the split on: one worker a partition trains all parameters, and they meet every 25 steps."""
    setting = point.setting
    groups = [point.documents(TRAIN, k) for k in range(setting.experts)]
    rounds = max(1, round(point.expert_steps / ROUND_STEPS))
    state = rivals.diloco(setting, dense(setting, point.shared_steps, annealed=False), groups, point.expert_steps, rounds,
                          f"{point.name}-diloco", setting.scale.learning_rate / 3, decay=0.5, warmup=10)  # fmt: skip
    return Row(point.measure(dense_model(setting, state).eval()), tokens_of(setting, point.total_steps),
               trained_flops(point, point.total_steps))  # fmt: skip


def modular_row(point: Point, model: Any) -> Row:
    """Something that is made of the experts without another step."""
    return Row(point.measure(model), tokens_of(point.setting, point.total_steps), modular_flops(point))


def from_log_p(point: Point, loss: Callable[[str, list[list[npt.NDArray[np.float64]]], list[int]], Loss]) -> Row:
    """A row computed from each expert's log p of every token."""
    losses = {name: loss(name, log_p, point.sizes(name)) for name, log_p in point.log_p.items()}
    return Row(losses, tokens_of(point.setting, point.total_steps), modular_flops(point))


def _oracle(name: str, log_p: list[list[npt.NDArray[np.float64]]], sizes: list[int]) -> Loss:
    # Outside of all partitions nobody knows the right expert; the shared components stand in.
    chosen = log_p[-1] if name == OUTSIDE else log_p[int(name)]
    return _sum(chosen, sizes)


def _sum(log_p: list[npt.NDArray[np.float64]], sizes: list[int]) -> Loss:
    return Loss(-float(sum(some.sum() for some in log_p)), sum(len(some) for some in log_p), sum(sizes))


def _ensemble(point: Point, top: int) -> Row:
    prior_E = np.full(point.setting.experts, -np.log(point.setting.experts))
    return from_log_p(point, lambda name, log_p, sizes: rivals.ensemble_loss(log_p[:-1], prior_E, top, sizes))


def _routed_ensemble(point: Point, top: int) -> Row:
    """c-BTM (Gururangan et al. 2023): whole models, mixed in their probabilities by what the text so far is about.

    The weights are those of our own router, so that only what they weigh is different.
    """
    rows_ED = point.router()[0]

    def loss(name: str, log_p: list[list[npt.NDArray[np.float64]]], sizes: list[int]) -> Loss:
        weights = rivals.gate_weights(point.routed, rows_ED, point.test_windows[name], top)
        return rivals.weighted_loss(log_p[:-1], weights, sizes)

    return from_log_p(point, loss)


def _best_single(point: Point) -> Row:
    def mean(expert: int) -> float:
        return equal_weight_mean(_sum(log_p[expert], point.sizes(name)) for name, log_p in point.log_p.items() if name != OUTSIDE)

    best = min(range(point.setting.experts), key=mean)
    return from_log_p(point, lambda name, log_p, sizes: _sum(log_p[best], sizes))


def _fine_tuned(point: Point) -> Row:
    setting, steps = point.setting, max(1, point.expert_steps // 2)
    model = rivals.fine_tuned_router(setting, point.routed, point.experts, point.router(), steps,
                                     point.home / "router.safetensors")  # fmt: skip
    row = modular_row(point, model)
    # Forward and backward through the experts of a token, of which only the gate learns.
    config = point.routed.config
    frozen = config.dense_parameters + (setting.top_k - 1) * config.expert_parameters
    return replace(row, tokens=row.tokens + tokens_of(setting, steps), flops=row.flops + 4.0 * frozen * tokens_of(setting, steps))


def _random_router(point: Point) -> Row:
    generator = torch.Generator().manual_seed(point.setting.seed)
    rows = [torch.randn(row.shape, generator=generator) * 0.1 for row in point.router()]
    return modular_row(point, point.mixture(mixtures.top_k_gate(rows, 2)))


def _merged(point: Point, merge: Callable[[State, list[State]], State]) -> Row:
    return modular_row(point, dense_model(point.setting, merge(point.shared, point.experts)).eval())


#: Optimiser steps between two meetings of DiLoCo's workers.
ROUND_STEPS = 25

#: Every row of the table, in its order.
ROWS: dict[str, Maker] = {
    "shared components alone": shared_row,
    "dense, same active parameters, all tokens": lambda p: dense_row(p, p.total_steps, "rival"),
    "dense, same total parameters, all tokens": lambda p: dense_row(p, p.total_steps, "rival-wide",
                                                                    d_ff=wide(p.setting)),
    "mixture trained jointly, all tokens": joint_row,
    "DiLoCo from the split": diloco_row,
    "average of the experts": lambda p: _merged(p, rivals.average),
    "TIES": lambda p: _merged(p, rivals.ties),
    "uniform gate": lambda p: modular_row(p, p.mixture(mixtures.constant_gate([1 / p.setting.experts] * p.setting.experts))),
    "random router, top-2": _random_router,
    "c-BTM, top-1": lambda p: _routed_ensemble(p, 1),
    "c-BTM, top-2": lambda p: _routed_ensemble(p, 2),
    "Branch-Train-Merge, top-1": lambda p: _ensemble(p, 1),
    "Branch-Train-Merge, top-2": lambda p: _ensemble(p, 2),
    "Branch-Train-Merge, all experts": lambda p: _ensemble(p, p.setting.experts),
    "document-level router": lambda p: from_log_p(p, lambda name, log_p, sizes: rivals.document_router_loss(
        log_p[:-1], log_p[-1], sizes)),
    "best single expert": _best_single,
    "oracle: the partition's expert": lambda p: from_log_p(p, _oracle),
    "ours without context (ridge), top-2": lambda p: modular_row(p, p.ours(2, "ridge", context=False)),
    "ours (centroid), top-1": lambda p: modular_row(p, p.ours(1, "centroid")),
    "ours (centroid), top-2": lambda p: modular_row(p, p.ours(2, "centroid")),
    "ours (lda), top-1": lambda p: modular_row(p, p.ours(1, "lda")),
    "ours (lda), top-2": lambda p: modular_row(p, p.ours(2, "lda")),
    "ours (ridge), top-1": lambda p: modular_row(p, p.ours(1, "ridge")),
    "ours (ridge), top-2": lambda p: modular_row(p, p.ours(2, "ridge")),
    "ours (bayes), top-1": lambda p: modular_row(p, p.ours(1)),
    "ours (bayes), top-2": lambda p: modular_row(p, p.ours(2)),
    "ours, router then fine-tuned (retraining)": _fine_tuned,
}  # fmt: skip


def wide(setting: Setting) -> int:
    """The d_ff with which a dense model has the parameters of all experts."""
    config = setting.config(**setting.rival()).model
    return config.ffn_width * setting.experts * 3 // 2
