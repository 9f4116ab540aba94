"""Training in the laboratory: one trunk at a constant rate, branches that anneal from it, and experts.

A trunk and its branches (Hägele et al. 2024, arXiv 2405.18392) give the model that a run of X tokens would have reached,
for many X, at the price of one long run and the short decays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import copy
from dataclasses import dataclass
from pathlib import Path
import shutil
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file, save_file
import torch
from torch import Tensor, nn

from benchmarks.lab.setting import CONTEXT_CHANNELS, TRAIN, Setting
from forge.config import ExpertPhaseConfig, PhaseConfig
from forge.data.packing import SequenceSampler
from forge.files import TEMPORARY_SUFFIX
from forge.model.layers import FeedForward
from forge.model.lm import DenseLayer, DenseLM
from forge.train.loop import LoopResult, LoopSettings, train
from forge.vocabulary import END_OF_TEXT_ID

State = dict[str, Tensor]
#: Share of a phase's steps in which the rate falls to zero.
DECAY = 0.25
#: Steps in which the rate rises.
WARMUP_STEPS = 50
#: Sequences of a forward pass: the fastest on a core with these sizes.
MICRO_BATCH = 8


def steps_of(setting: Setting, tokens: float) -> int:
    """Optimiser steps of the shared phase that see so many tokens."""
    return max(1, round(tokens / (setting.scale.batch_size * setting.scale.seq_len)))


def tokens_of(setting: Setting, steps: int) -> int:
    """Tokens of so many optimiser steps of the shared phase."""
    return steps * setting.scale.batch_size * setting.scale.seq_len


def phase(setting: Setting, steps: int, rate: float, decay: float = DECAY, warmup: int = WARMUP_STEPS,
          **more: Any) -> PhaseConfig:  # fmt: skip
    """A phase of so many steps."""
    return ExpertPhaseConfig(tokens=tokens_of(setting, steps), learning_rate=rate, decay_fraction=decay,
                             warmup_fraction=min(1.0, warmup / steps), **more)  # fmt: skip


def run_phase(setting: Setting, model: DenseLM, sampler: SequenceSampler, config: PhaseConfig, directory: Path,
              until: int | None = None, batch_size: int | None = None) -> LoopResult:  # fmt: skip
    """Train through the product's own loop, to the end of the phase or to the step `until`."""
    reached = 0
    batch_size = batch_size or setting.scale.batch_size

    def progress(step: int = 0, **_: object) -> None:
        nonlocal reached
        reached = step

    return train(model, sampler, LoopSettings(
        phase=config, batch_size=batch_size, sequence_length=setting.scale.seq_len,
        micro_batch=min(MICRO_BATCH, batch_size), directory=directory, checkpoint_seconds=60.0,
        stage=directory.name), progress, lambda: until is not None and reached >= until)  # fmt: skip


def kept(path: Path, make: Callable[[], State]) -> State:
    """The tensors of a file, made once."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        save_file({name: tensor.contiguous() for name, tensor in make().items()}, temporary)
        temporary.replace(path)
    tensors: State = load_file(path)
    return tensors


def state_of(model: nn.Module) -> State:
    """The weights of a model, detached."""
    return {name: p.detach() for name, p in model.named_parameters()}


def dense_model(setting: Setting, state: State | None = None, **model: Any) -> DenseLM:
    """A dense model with given weights, or new ones."""
    made = DenseLM(setting.config(**model).model)
    if state is None:
        made.initialise(torch.Generator().manual_seed(setting.seed))
    else:
        made.load_state_dict(state)
    return made


def dense(setting: Setting, steps: int, name: str = "dense", annealed: bool = True, **model: Any) -> State:
    """The dense model after a run of so many steps, from the trunk of that name.

    Args:
        setting: scale and seed.
        steps: optimiser steps.
        name: of the trunk; one trunk an architecture.
        annealed: whether the run ends in a decay, which is a branch from the trunk; else the trunk itself at that step.
        model: fields of the architecture that differ.
    """
    home = setting.work / name

    def make() -> State:
        fork = steps - round(DECAY * steps) if annealed else steps
        trunk = _trunk(setting, home, fork, **model)
        if not annealed:
            return {key.removeprefix("model."): t for key, t in load_file(trunk).items() if key.startswith("model.")}
        branch = home / f"branch-{steps}"
        if not (branch / "checkpoint.safetensors").is_file():
            branch.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(trunk, branch / f"checkpoint{TEMPORARY_SUFFIX}")
            (branch / f"checkpoint{TEMPORARY_SUFFIX}").replace(branch / "checkpoint.safetensors")
        made = dense_model(setting, **model)
        run_phase(setting, made, setting.sampler(setting.documents(TRAIN), setting.seed),
                  phase(setting, steps, setting.scale.learning_rate, decay=1 - fork / steps), branch)  # fmt: skip
        shutil.rmtree(branch)
        return state_of(made)

    return kept(home / f"{'annealed' if annealed else 'constant'}-{steps}.safetensors", make)


def _trunk(setting: Setting, home: Path, step: int, **model: Any) -> Path:
    """The trunk's checkpoint at a step; trains on from the last one below it."""
    wanted = home / f"trunk-{step}.safetensors"
    if wanted.is_file():
        return wanted
    below = [int(path.stem.split("-")[1]) for path in home.glob("trunk-*.safetensors")]
    nearest = max((at for at in below if at < step), default=None)
    work = home / "trunk-work"
    work.mkdir(parents=True, exist_ok=True)
    if nearest is not None:
        shutil.copyfile(home / f"trunk-{nearest}.safetensors", work / "checkpoint.safetensors")
    made = dense_model(setting, **model)
    # A phase of 20 times the steps with no decay: at a constant rate from the warm-up on.
    forever = phase(setting, 20 * step, setting.scale.learning_rate, decay=0.0)
    run_phase(setting, made, setting.sampler(setting.documents(TRAIN), setting.seed), forever, work, until=step)
    (work / "checkpoint.safetensors").replace(wanted)
    shutil.rmtree(work)
    return wanted


@dataclass(frozen=True)
class Recipe:
    """How an expert is trained; the defaults are the product's."""

    rate: float = 1.0
    """Peak learning rate, as a multiple of the scale's for experts."""
    decay: float = 1.0
    """Share of the steps in which the rate falls to zero."""
    batch: int | None = None
    """Sequences of an optimiser step, for the same tokens; the scale's if None."""
    optimizer: Literal["muon", "adamw"] = "muon"
    init: Literal["copy", "random"] = "copy"
    general: float = 0.0
    """Share of each batch that comes from the whole corpus instead of the partition."""
    openings: float = 0.0
    """Share of each batch that is the openings of everybody's documents, where no router can know the partition yet."""
    volunteer: int = 0
    """Which of several volunteers on the same partition: each has an order of the text of its own."""
    gated: bool = False
    """Whether the expert learns under its gate, y = S(x) + p(x) (E(x) - S(x)), p the router's probability."""


class GatedFFN(FeedForward):
    """An expert that learns beside the frozen shared FFN, weighted as the router will weigh it."""

    def __init__(self, shared: FeedForward, rows_ED: Tensor, expert: int) -> None:
        super().__init__(shared.w1.weight.shape[1], shared.w1.weight.shape[0])
        self.load_state_dict(shared.state_dict())
        self._shared = [copy.deepcopy(shared).requires_grad_(False)]  # in a list, so that it is no part of this module
        self._rows_ED, self._expert = rows_ED, expert

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        share = (x @ self._rows_ED.T).softmax(dim=-1)[..., self._expert, None]
        # The context channels are for the router: no expert may learn to read them.
        x = torch.cat([x[..., :-CONTEXT_CHANNELS], torch.zeros_like(x[..., -CONTEXT_CHANNELS:])], dim=-1)
        shared: Tensor = self._shared[0](x)
        return shared + share * (super().forward(x) - shared)


class MixedSampler(SequenceSampler):
    """Batches of a partition with a share of windows from elsewhere."""

    def __init__(self, setting: Setting, documents: npt.NDArray[np.integer], seed: int, share: float,
                 other: SequenceSampler) -> None:  # fmt: skip
        super().__init__(setting.corpus, setting.scale.seq_len, seed, END_OF_TEXT_ID, documents)
        self._other, self._share = other, share

    def batch(self, step: int, batch_size: int) -> npt.NDArray[np.int64]:
        """The windows of one optimiser step; a share of less than a window comes in every few steps."""
        windows, other = super().batch(step, batch_size), self._share * batch_size
        count = int((step + 1) * other) - int(step * other)
        if count:
            windows[:count] = self._other.batch(step, batch_size)[:count]
        return windows


#: Tokens of a document, its end-of-text included, that count as its opening.
OPENING = 32


class OpeningSampler(SequenceSampler):
    """Batches of the first tokens of documents, one opening after the other."""

    def window(self, index: int) -> npt.NDArray[np.int64]:
        """Openings of documents chosen by the window's number, (seq_len + 1,)."""
        count = -(-(self.seq_len + 1) // OPENING)
        rows = np.random.default_rng([self.seed, index]).integers(len(self._documents), size=count)
        openings = []
        for row in rows:
            opening = np.empty(min(OPENING, int(self._starts[row + 1] - self._starts[row])), dtype=np.int64)
            self._fill(opening, int(row), 0)
            openings.append(opening)
        window = np.concatenate(openings)
        return np.resize(window, self.seq_len + 1)


def expert(setting: Setting, base: DenseLM, documents: npt.NDArray[np.integer], steps: int, path: Path, number: int,
           recipe: Recipe, router: Callable[[], Sequence[Tensor]]) -> State:  # fmt: skip
    """The FFNs of one expert: a copy of the shared ones, trained on the documents of a partition.

    Args:
        setting: scale and seed.
        base: the shared components.
        documents: of the partition.
        steps: optimiser steps.
        path: of the expert's file.
        number: of the expert.
        recipe: how it is trained.
        router: makes the rows of every layer's gate; only called when the recipe is gated.
    """

    def make() -> State:
        state = train_expert(setting, base, documents, steps, path, number, recipe, router)
        shutil.rmtree(path.with_suffix(".work"))
        return state

    return kept(path, make)


def train_expert(setting: Setting, base: DenseLM, documents: npt.NDArray[np.integer], steps: int, path: Path, number: int,
                 recipe: Recipe, router: Callable[[], Sequence[Tensor]], until: float = 1.0) -> State:  # fmt: skip
    """The FFNs of an expert after a share `until` of its steps, from the checkpoint beside `path` on if there is one."""
    model = copy.deepcopy(base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    layers = [cast(DenseLayer, layer) for layer in model.model.layers]
    if recipe.init == "random":
        fresh = dense_model(setting).state_dict()
        model.load_state_dict({**model.state_dict(), **{name: t for name, t in fresh.items() if ".mlp." in name}})
    if recipe.gated:
        for layer, rows_ED in zip(layers, router(), strict=True):
            layer.mlp = GatedFFN(layer.mlp, rows_ED, number)
    seed = setting.seed * 1000 + number + 100 * recipe.volunteer
    sampler = setting.sampler(documents, seed)
    everybody = setting.documents(TRAIN)
    if recipe.openings:
        other: SequenceSampler = OpeningSampler(setting.corpus, setting.scale.seq_len, seed, END_OF_TEXT_ID, everybody)
        sampler = MixedSampler(setting, documents, seed, recipe.openings, other)
    elif recipe.general:
        sampler = MixedSampler(setting, documents, seed, recipe.general, setting.sampler(everybody, seed))
    config = phase(setting, steps, recipe.rate * setting.scale.expert_learning_rate, decay=recipe.decay,
                   warmup=min(10, max(1, steps // 10)), optimizer=recipe.optimizer)  # fmt: skip
    batch_size = recipe.batch or setting.scale.expert_batch_size
    until_step = round(until * steps * setting.scale.batch_size / batch_size)
    run_phase(setting, model, sampler, config, path.with_suffix(".work"), until=until_step, batch_size=batch_size)
    return {name: t for name, t in state_of(model).items() if ".mlp." in name}
