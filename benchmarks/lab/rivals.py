"""What a person would train instead: the joint mixture, DiLoCo, merged experts, and ensembles that route by the text.

Shape suffixes: N tokens, E experts, K partitions, D d_model, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
import json
from pathlib import Path
import shutil
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.torch import load_file, save_file
import torch
from torch import Tensor, nn

from benchmarks.lab.mixtures import GatedMixture, keep_top
from benchmarks.lab.phases import DECAY, MICRO_BATCH, State, dense_model, kept, phase, run_phase, state_of
from benchmarks.lab.setting import TRAIN, Setting
from forge.config import ModelConfig
from forge.data.packing import batches, pad
from forge.evaluate.perplexity import Loss
from forge.files import TEMPORARY_SUFFIX
from forge.model.lm import INITIAL_STD, RESIDUAL_PROJECTIONS, DenseLM
from forge.model.moe import MixtureLM, Routing
from forge.train.loss import IGNORE_INDEX

#: Weight of the load-balance loss (Fedus et al. 2021, arXiv 2101.03961, eq. 4; Mixtral's own is 0.02).
BALANCE = 0.01
#: Share of the largest changes that TIES keeps (Yadav et al. 2023, arXiv 2306.01708, section 3).
TIES_KEEP = 0.2
#: DiLoCo (Douillard et al. 2023, arXiv 2311.08105, section 3): outer Nesterov momentum with these.
OUTER_RATE, OUTER_MOMENTUM = 0.7, 0.9
#: Learning rate of the fine-tuned router: a hundredth of the rows' own size a step.
ROUTER_RATE = 3e-3
#: Tokens of a document after which a document-level router decides (Filippova et al. 2024, SmallTalk: a short prefix).
PREFIX = 32


class JointMixture(MixtureLM):
    """A mixture of which every parameter learns, with the load-balance loss."""

    def __init__(self, config: ModelConfig, share: float, seed: int) -> None:
        super().__init__(config)
        self.share = share
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1:
                    parameter.fill_(1.0)
                else:
                    std = INITIAL_STD / (2 * config.n_layers) ** 0.5 if name.endswith(RESIDUAL_PROJECTIONS) else INITIAL_STD
                    parameter.normal_(0.0, std, generator=generator)

    def forward(self, tokens_BT: Tensor, *more: Any, **named: Any) -> Tensor:
        """Hidden states; the gradient of the balance loss joins on the way back."""
        if not torch.is_grad_enabled():
            return super().forward(tokens_BT, *more, **named)
        routing: list[Routing] = []
        hidden_BTD = super().forward(tokens_BT, routing=routing)
        balance = torch.stack([balance_loss(layer) for layer in routing]).mean()
        joined: Tensor = _Join.apply(hidden_BTD, balance, BALANCE * self.share)  # type: ignore[no-untyped-call]
        return joined


def balance_loss(routing: Routing) -> Tensor:
    """E * sum over experts of (share of the choices) * (mean probability): 1 when balanced."""
    experts = routing.probabilities_NE.shape[1]
    chosen_E = torch.bincount(routing.experts_NK.flatten(), minlength=experts) / routing.experts_NK.numel()
    return experts * (chosen_E * routing.probabilities_NE.mean(dim=0)).sum()


class _Join(torch.autograd.Function):
    """The identity, whose backward pass adds the gradient of another loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], torch.tensor(ctx.weight, dtype=grads[0].dtype), None


def joint_mixture(setting: Setting, steps: int) -> MixtureLM:
    """The mixture trained as one from the first step, on all documents."""
    config = setting.config(**setting.rival()).model
    share = min(MICRO_BATCH, setting.scale.batch_size) / setting.scale.batch_size
    model = JointMixture(config, share, setting.seed)

    def make() -> State:
        work = setting.work / f"joint-{steps}.work"
        run_phase(setting, cast(DenseLM, model), setting.sampler(setting.documents(TRAIN), setting.seed),
                  phase(setting, steps, setting.scale.learning_rate), work)  # fmt: skip
        shutil.rmtree(work)
        return state_of(model)

    model.load_state_dict(kept(setting.work / f"joint-{steps}.safetensors", make))
    return model.requires_grad_(False).eval()


class TrainedGate(GatedMixture):
    """A mixture of which only the gate learns."""

    def __init__(self, base: DenseLM, experts: Sequence[State], rows: Sequence[Tensor], k: int) -> None:
        learned = nn.ParameterList(nn.Parameter(rows_ED.clone()) for rows_ED in rows)
        super().__init__(base, experts, lambda layer, x_BTD: keep_top(x_BTD @ learned[layer].T, k))
        self.rows = learned


def fine_tuned_router(setting: Setting, base: DenseLM, experts: Sequence[State], rows: Sequence[Tensor], steps: int,
                      path: Path) -> GatedMixture:  # fmt: skip
    """The mixture after its gate alone was trained on all documents: what closed form gives away."""
    model = TrainedGate(base, experts, rows, setting.top_k)

    def make() -> State:
        work = path.with_suffix(".work")
        run_phase(setting, cast(DenseLM, model), setting.sampler(setting.documents(TRAIN), setting.seed),
                  phase(setting, steps, ROUTER_RATE, decay=1.0, warmup=5, optimizer="adamw"), work)  # fmt: skip
        shutil.rmtree(work)
        return {name: t for name, t in state_of(model).items() if name.startswith("rows.")}

    tuned = kept(path, make)
    with torch.no_grad():
        for name, parameter in model.rows.named_parameters(prefix="rows"):
            parameter.copy_(tuned[name])
    return model.requires_grad_(False).eval()


def diloco(setting: Setting, start: State, groups: Sequence[npt.NDArray[np.integer]], steps: int, rounds: int,
           name: str, rate: float, decay: float = DECAY, warmup: int = 50, **model: Any) -> State:  # fmt: skip
    """Workers that train a dense model apart and average after every round (DiLoCo).

    Args:
        setting: scale and seed.
        start: where all of them begin.
        groups: documents of each worker.
        steps: of each worker, in total.
        rounds: how often they meet.
        name: of the files.
        rate: peak learning rate of the workers.
        decay: share of the steps in which it falls to zero.
        warmup: steps in which it rises.
        model: fields of the architecture that differ.
    """

    def make() -> State:
        home = setting.work / f"{name}.work"
        home.mkdir(parents=True, exist_ok=True)
        point, velocity, first = _meeting(home, start)
        for number in range(first, rounds):
            until = round(steps * (number + 1) / rounds)
            reached: list[State] = []
            for worker, documents in enumerate(groups):
                work = home / f"worker-{worker}"
                if not _has_reached(work, until):
                    _set_weights(work, point)
                    sampler = setting.sampler(documents, setting.seed * 1000 + worker)
                    run_phase(setting, dense_model(setting, point, **model), sampler,
                              phase(setting, steps, rate, decay=decay, warmup=warmup), work, until=until)  # fmt: skip
                tensors = load_file(work / "checkpoint.safetensors")
                reached.append({key: tensors[f"model.{key}"] for key in point})
            for key in point:
                change = point[key] - torch.stack([weights[key] for weights in reached]).mean(dim=0)
                velocity[key] = OUTER_MOMENTUM * velocity[key] + change
                point[key] = point[key] - OUTER_RATE * (change + OUTER_MOMENTUM * velocity[key])
            _save_meeting(home, point, velocity, number + 1)
        shutil.rmtree(home)
        return point

    return kept(setting.work / f"{name}.safetensors", make)


def _meeting(home: Any, start: State) -> tuple[State, State, int]:
    path = home / "meeting.safetensors"
    if not path.is_file():
        return {k: t.clone() for k, t in start.items()}, {k: torch.zeros_like(t) for k, t in start.items()}, 0
    with safe_open(path, framework="pt") as file:
        first = int(file.metadata()["round"])
    tensors = load_file(path)
    return ({k: tensors[f"point.{k}"] for k in start}, {k: tensors[f"velocity.{k}"] for k in start}, first)


def _save_meeting(home: Any, point: State, velocity: State, number: int) -> None:
    temporary = home / f"meeting{TEMPORARY_SUFFIX}"
    save_file({**{f"point.{k}": t.contiguous() for k, t in point.items()},
               **{f"velocity.{k}": t.contiguous() for k, t in velocity.items()}}, temporary, {"round": str(number)})  # fmt: skip
    temporary.replace(home / "meeting.safetensors")


def _has_reached(work: Any, until: int) -> bool:
    path = work / "checkpoint.safetensors"
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        return int(json.loads(file.metadata()["facts"])["step"]) >= until


def _set_weights(work: Any, point: State) -> None:
    """Begin a round: the meeting's weights, the worker's own optimiser state."""
    path = work / "checkpoint.safetensors"
    if not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors.update({f"model.{key}": tensor.contiguous() for key, tensor in point.items()})
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    save_file(tensors, temporary, metadata)
    temporary.replace(path)


def average(shared: State, experts: Sequence[State]) -> State:
    """The uniform mean of the experts' weights, as one dense model."""
    return {**shared, **{name: torch.stack([expert[name] for expert in experts]).mean(dim=0) for name in experts[0]}}


def ties(shared: State, experts: Sequence[State]) -> State:
    """TIES: keep the largest changes of each expert, elect a sign for each weight, average those that agree."""
    merged = dict(shared)
    for name in experts[0]:
        changes = torch.stack([expert[name] - shared[name] for expert in experts])
        flat = changes.abs().flatten(1)
        floor = flat.kthvalue(round((1 - TIES_KEEP) * flat.shape[1]) + 1, dim=1).values
        changes = torch.where(changes.abs() >= floor.view(-1, *[1] * (changes.ndim - 1)), changes, 0.0)
        sign = changes.sum(dim=0).sign()
        agreeing = (changes.sign() == sign) & (changes != 0)
        merged[name] = shared[name] + (changes * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)
    return merged


def log_probabilities(model: Any, windows: Sequence[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.float64]]:
    """Log p of every target of every window, (T,) each, in the order of the windows."""
    where = {id(window): index for index, window in enumerate(windows)}
    found: list[npt.NDArray[np.float64]] = [np.empty(0)] * len(windows)
    for batch in batches(windows, 2048):
        inputs_BT, targets_BT = (torch.from_numpy(array) for array in pad(batch, IGNORE_INDEX))
        with torch.inference_mode():
            hidden_BTD = model(inputs_BT)
            for row, window in enumerate(batch):
                length = len(window) - 1
                logits_TV = hidden_BTD[row, :length] @ model.head_weight.T
                chosen_T = logits_TV.gather(1, targets_BT[row, :length, None])[:, 0]
                found[where[id(window)]] = (chosen_T - logits_TV.logsumexp(dim=1)).double().numpy()
    return found


def ensemble_loss(log_p: Sequence[Sequence[npt.NDArray[np.float64]]], prior_E: npt.NDArray[np.float64],
                  top: int, sizes: Sequence[int]) -> Loss:  # fmt: skip
    """Branch-Train-Merge's posterior ensemble (Li et al. 2022, arXiv 2208.03306, section 3): weights by the prefix.

    Args:
        log_p: for each expert, log p of every target of every window.
        prior_E: log prior of the experts.
        top: experts that are used on a token, those with the largest posterior.
        sizes: UTF-8 bytes of each window's targets.
    """
    weights = []
    for number in range(len(sizes)):
        log_p_ET = np.stack([expert[number] for expert in log_p])
        evidence_ET = prior_E[:, None] + np.concatenate(
            [np.zeros((len(log_p_ET), 1)), np.cumsum(log_p_ET, axis=1)[:, :-1]], axis=1)  # fmt: skip
        if top < len(log_p_ET):
            floor_T = np.sort(evidence_ET, axis=0)[-top]
            evidence_ET = np.where(evidence_ET >= floor_T, evidence_ET, -np.inf)
        weights.append(np.exp(evidence_ET - np.logaddexp.reduce(evidence_ET, axis=0)))
    return weighted_loss(log_p, weights, sizes)


def gate_weights(model: DenseLM, rows_ED: Tensor, windows: Sequence[npt.NDArray[np.int64]],
                 top: int) -> list[npt.NDArray[np.float64]]:  # fmt: skip
    """What the gate of the first layer gives each expert at every position of every window, (E, T) each, as `top_k` of them."""
    found = []
    for window in windows:
        gate_inputs: list[Tensor] = []
        with torch.inference_mode():
            model(torch.from_numpy(window[None, :-1]), gate_inputs)
            weights_TE = keep_top(gate_inputs[0][0] @ rows_ED.T, top)
        found.append(weights_TE.T.double().numpy())
    return found


def weighted_loss(log_p: Sequence[Sequence[npt.NDArray[np.float64]]], weights: Sequence[npt.NDArray[np.float64]],
                  sizes: Sequence[int]) -> Loss:  # fmt: skip
    """Loss of the experts' probabilities mixed by given weights, (E, T) a window, at every position."""
    nats, tokens = 0.0, 0
    for number, weights_ET in enumerate(weights):
        p_ET = np.exp(np.stack([expert[number] for expert in log_p]))
        nats -= float(np.log((weights_ET * p_ET).sum(axis=0)).sum())
        tokens += p_ET.shape[1]
    return Loss(nats, tokens, int(sum(sizes)))


def document_router_loss(log_p: Sequence[Sequence[npt.NDArray[np.float64]]], shared: Sequence[npt.NDArray[np.float64]],
                         sizes: Sequence[int]) -> Loss:  # fmt: skip
    """One expert a document, chosen by the likelihood of its prefix, which the shared components predict."""
    nats, tokens = 0.0, 0
    for number, plain_T in enumerate(shared):
        prefix = [float(expert[number][:PREFIX].sum()) for expert in log_p]
        chosen = int(np.argmax(prefix))
        nats -= float(plain_T[:PREFIX].sum() + log_p[chosen][number][PREFIX:].sum())
        tokens += len(plain_T)
    return Loss(nats, tokens, int(sum(sizes)))
