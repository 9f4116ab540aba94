"""What a modular model must do beside a low loss: grow with every expert, lose one or gain one without the others noticing,
and write text worth reading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.lab import mixtures
from benchmarks.lab.phases import dense, dense_model
from benchmarks.lab.rows import Point, wanted
from benchmarks.lab.setting import TEST
from forge.evaluate.perplexity import measure
from forge.files import read_json, write_json
from forge.model.lm import LanguageModel
from forge.router.context import add_context
from forge.router.fit import bayes_rows

#: Random orders of arrival.
ORDERS = 5
#: Test tokens a partition: a difference of two models on the same tokens needs fewer than a loss does.
TOKENS = 40_000
#: Texts a partition, tokens of the prompt, and tokens written.
SAMPLES, PROMPT, WRITTEN = 50, 16, 64
TEMPERATURE = 0.8

Values = dict[str, float]


class Assembled:
    """The model of a point with any subset of its experts arrived; the others are the shared FFN."""

    def __init__(self, point: Point) -> None:
        self.point = point
        self._known: dict[frozenset[int], list[float]] = {}

    @cached_property
    def _gate(self) -> mixtures.Gate:
        return mixtures.top_k_gate(self.point.router(), self.point.setting.top_k)

    def losses(self, arrived: frozenset[int]) -> list[float]:
        """Nats a token on the test documents of every partition."""
        if arrived not in self._known:
            shared = {name: t for name, t in self.point.shared.items() if ".mlp." in name}
            experts = [expert if k in arrived else shared for k, expert in enumerate(self.point.experts)]
            self._known[arrived] = losses(self.point, mixtures.GatedMixture(self.point.routed, experts, self._gate))
        return self._known[arrived]


def losses(point: Point, model: LanguageModel, partitions: int | None = None) -> list[float]:
    """Nats a token on the test documents of the first partitions, or of all."""
    setting = point.setting
    return [measure(model, setting.windows(point.documents(TEST, k), TOKENS), batch_tokens=2048).nats_per_token
            for k in range(partitions or setting.experts)]  # fmt: skip


def arrivals(point: Point) -> Values:
    """Perplexity must fall with every expert, in whatever order they arrive."""
    assembled, count = Assembled(point), point.setting.experts
    rng = np.random.default_rng(point.setting.seed)
    curves = []
    for _ in range(ORDERS):
        order = rng.permutation(count)
        curves.append([float(np.mean(assembled.losses(frozenset(order[:k].tolist())))) for k in range(count + 1)])
    steps = np.diff(np.asarray(curves), axis=1)
    return {f"{k} experts: mean loss over the orders": float(np.mean([curve[k] for curve in curves])) for k in range(count + 1)
            } | {"the least that an arriving expert gained": float(-steps.max())}  # fmt: skip


def removal(point: Point) -> Values:
    """An expert taken away may cost its own partition only.

    Either the shared FFN takes its place, as when a node's shards are dropped, or its partition leaves the run with its
    counts, so that the router knows it no more.
    """
    setting, whole = point.setting, Assembled(point)
    everyone = frozenset(range(setting.experts))
    before_K = np.asarray(whole.losses(everyone))
    ways: dict[str, Callable[[int], list[float]]] = {
        "shared FFN in its place": lambda k: whole.losses(everyone - {k}),
        "with its counts": lambda k: losses(point, subset(point, sorted(everyone - {k})))}  # fmt: skip
    found: Values = {}
    for how, without in ways.items():
        cost_EK = np.asarray([np.asarray(without(k)) - before_K for k in range(setting.experts)])
        others = cost_EK[~np.eye(setting.experts, dtype=bool)]
        found |= {f"{how}: its own partition loses, mean": float(np.diag(cost_EK).mean()),
                  f"{how}: others lose, mean": float(others.mean()), f"{how}: others lose, at most": float(others.max()),
                  f"{how}: others move, at most": float(np.abs(others).max())}  # fmt: skip
    return found


def addition(point: Point) -> Values:
    """A run of one partition less gains it: its counts are added, head and rows made again, and no other expert is touched."""
    last = point.setting.experts - 1
    before, after = (np.asarray(losses(point, subset(point, range(count)))) for count in (last, last + 1))
    return {"the new partition gains": float(before[last] - after[last]),
            "old partitions lose, at most": float((after - before)[:last].max())}  # fmt: skip


def subset(point: Point, partitions: Sequence[int]) -> mixtures.GatedMixture:
    """The assembled model of a run that has only these partitions: their counts, head and rows made of them, their experts."""
    model, counts = dense_model(point.setting, point.shared).eval().requires_grad_(False), point.counts[partitions]
    # The shared components are as large as they were when the run began, with the last partition still to come.
    add_context(model, counts, point.scale_windows(range(point.setting.experts - 1)))
    rows = [bayes_rows(model.config, counts)] * model.config.n_layers
    gate = mixtures.top_k_gate(point.at_temperature(model, rows, partitions), point.setting.top_k)
    return mixtures.GatedMixture(model, [point.experts[k] for k in partitions], gate)


def generation(point: Point) -> Values:
    """Texts of ours and of the dense model of all tokens, from the same prompts, judged by the partition's own expert."""
    fields = point.setting.rival()
    rival = dense_model(point.setting, dense(point.setting, point.total_steps, "rival", **fields), **fields).eval()
    found: Values = {}
    for name, model in (("ours", point.ours(point.setting.top_k)), ("dense", rival)):
        distinct, repeated, nats = [], [], []
        for k in range(point.setting.experts):
            judge = dense_model(point.setting, {**point.shared, **point.experts[k]}).eval()
            texts_BT = write(model, prompts(point, k), point.setting.seed)
            distinct.append(distinct_2(texts_BT[:, PROMPT:].tolist()))
            repeated.append(repetition(texts_BT[:, PROMPT:].tolist()))
            nats.append(measure(judge, list(texts_BT.numpy()), batch_tokens=2048).nats_per_token)
        found |= {f"distinct-2, {name}": float(np.mean(distinct)), f"repetition, {name}": float(np.mean(repeated)),
                  f"nats under the partition's expert, {name}": float(np.mean(nats))}  # fmt: skip
    return found


def prompts(point: Point, partition: int) -> Tensor:
    """The beginnings of test documents, (SAMPLES, PROMPT)."""
    windows = point.setting.windows(point.documents(TEST, partition), SAMPLES * point.setting.scale.seq_len * 4)
    begun = [window[:PROMPT] for window in windows if len(window) >= PROMPT][:SAMPLES]
    return torch.from_numpy(np.stack(begun))


@torch.inference_mode()
def write(model: LanguageModel, prompts_BP: Tensor, seed: int) -> Tensor:
    """Continue prompts by sampling, (B, P + WRITTEN)."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = prompts_BP
    for _ in range(WRITTEN):
        logits_BV = model(tokens_BT)[:, -1] @ model.head_weight.T
        chosen_B1 = torch.multinomial((logits_BV / TEMPERATURE).softmax(dim=-1), 1, generator=generator)
        tokens_BT = torch.cat([tokens_BT, chosen_B1], dim=1)
    return tokens_BT


def distinct_2(texts: list[list[int]]) -> float:
    """Distinct pairs of tokens over all pairs (Li et al. 2016, arXiv 1510.03055, section 5.2)."""
    pairs = Counter(pair for text in texts for pair in zip(text[:-1], text[1:], strict=True))
    return len(pairs) / sum(pairs.values())


def repetition(texts: list[list[int]], n: int = 4) -> float:
    """Share of n-grams that the same text has had before (Welleck et al. 2020, arXiv 1908.04319, section 6: seq-rep-n)."""
    shares = []
    for text in texts:
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams))
    return float(np.mean(shares))


PROPERTIES: dict[str, Callable[[Point], Values]] = {
    "arrivals": arrivals, "removing an expert": removal, "adding a partition": addition, "generated text": generation,
}  # fmt: skip


def measure_properties(point: Point, only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Every property of a point whose name has `only` in it, measured once."""
    for name, make in PROPERTIES.items():
        path = point.home / "properties" / f"{name}.json"
        if not wanted(name, only):
            continue
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"row": name, "seed": point.setting.seed, "values": make(point)})
        yield dict(read_json(path))

