"""What each expert contributes: how much the loss of the assembled model rises when the shared FFN stands in its place.

A contribution is measured in nats a token, on the windows that rivals are compared on, as the mean of the partitions with
equal weight. It may be negative: without such an expert the model would be better. What two experts contribute together is
not the sum of both: either may stand in for the other.

All of them together cost no more than the evaluation while there are no more experts than the windows' stride
(`heldout.HeldOut`), plus one pass over the compared windows: with four experts of `configs/smoke.yaml` an evaluation after
a shard takes 3.1 s of CPU time with them and 1.7 s without. A batch of windows no token of which is routed to an expert
cannot change without it, so its loss is not computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forge.config import ModelConfig
from forge.data.packing import batches
from forge.evaluate.heldout import HeldOut
from forge.evaluate.perplexity import BATCH_TOKENS, Loss, equal_weight_mean, finite, measure
from forge.model import names
from forge.model.layers import FeedForward
from forge.model.lm import read_tensors
from forge.model.moe import MixtureLayer, MixtureLM, Routing


def contributions(
    model: MixtureLM, shared_ffn: Path, held_out: HeldOut, arrived: Sequence[int]
) -> list[dict[str, Any]]:
    """Measure the model without each of its experts, one at a time.

    Args:
        model: the assembled model.
        shared_ffn: safetensors file of the shared FFN, which is mapped: it takes the memory of one expert more.
        held_out: the windows.
        arrived: the experts that are not the shared FFN.

    Returns:
        `expert`, `loss_without` (nats a token, mean of the partitions) and `nats` (by how much that is above the loss with
        the expert) of each, in the order of `arrived`. What was not measured is null.

    Raises:
        StorageError: the shared FFN cannot be read, or is another model's.
    """
    ffn = _load(shared_ffn, model.config)
    whole: list[Loss] = []
    without: dict[int, list[Loss]] = {expert: [] for expert in arrived}
    for partition in range(held_out.partitions):
        total, lacking = Loss(), dict.fromkeys(arrived, Loss())
        for batch in batches(held_out.compared(partition), BATCH_TOKENS):
            asked: set[int] = set()

            def watch(routing: list[Routing], kept_N: Tensor, asked: set[int] = asked) -> None:
                asked.update(*(layer.experts_NK[kept_N].flatten().tolist() for layer in routing))

            loss = measure(model, batch, observe=watch)
            total += loss
            for expert in arrived:
                if expert in asked:
                    with replaced(model, expert, ffn):
                        lacking[expert] += measure(model, batch)
                else:
                    lacking[expert] += loss
        whole.append(total)
        for expert, other in lacking.items():
            without[expert].append(other)
    mean = equal_weight_mean(whole)
    means = {expert: equal_weight_mean(losses) for expert, losses in without.items()}
    return [{"expert": expert, "loss_without": finite(loss), "nats": finite(loss - mean)} for expert, loss in means.items()]


@contextmanager
def replaced(model: MixtureLM, expert: int, ffn: Sequence[FeedForward]) -> Iterator[None]:
    """Put other layers in the place of an expert, one a layer, for the time of a `with`."""
    places = experts_of(model)
    held = [experts[expert] for experts in places]
    try:
        for experts, other in zip(places, ffn, strict=True):
            experts[expert] = other
        yield
    finally:
        for experts, own in zip(places, held, strict=True):
            experts[expert] = own


def experts_of(model: MixtureLM) -> list[nn.ModuleList]:
    """The experts of every layer."""
    return [layer.block_sparse_moe.experts for layer in model.model.layers if isinstance(layer, MixtureLayer)]


def _load(path: Path, config: ModelConfig) -> list[FeedForward]:
    tensors = read_tensors(path, names.ffn_tensors(config))
    with torch.device("meta"):
        layers = [FeedForward(config.d_model, config.ffn_width) for _ in range(config.n_layers)]
    for layer, ffn in enumerate(layers):
        weights = {f"{matrix}.weight": tensors[names.ffn_name(layer, matrix)] for matrix in names.MATRICES}
        ffn.load_state_dict(weights, assign=True)
    return layers
