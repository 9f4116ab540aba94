"""Whether an expert is another one again, and whether its weights are of the size that training gives them.

Both compare with the shared FFN, which experts start from. Shape suffixes: F hidden units, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
import math

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]

#: Cosine between what two experts learned, from which on one is a copy of the other (benchmarks/attacks.py).
COPY = 0.9
#: Largest weight of a matrix, as a multiple of the largest of the same matrix of the shared FFN (benchmarks/attacks.py).
LARGEST = 16.0
#: Hidden units that are compared with all of the other expert's at a time, which bounds the memory of the products.
_ROWS = 512
#: Smallest size that something is compared with.
_TINY = 1e-12


def learned_alike(expert: Weights, other: Weights, start: Weights) -> float:
    """Cosine, over the layers' w1, between what two experts learned: their differences from where they started.

    The hidden units of an FFN can be put in another order, and w3 scaled against w2, without any change of what it computes.
    So only w1 is looked at, and each unit is compared with that unit of the other expert whose row points the same way.

    Args:
        expert: w1 of every layer, (F, D), under the shared FFN's names; other matrices are not looked at.
        other: the same of the other expert.
        start: the same of the shared FFN, or zeros where experts start from random weights.

    Returns:
        1.0 for a copy whatever the order of its units; 0.0 when one of them learned nothing.
    """
    product = mine = theirs = 0.0
    for name in (name for name in start if name.endswith("w1.weight")):
        expert_FD, other_FD, start_FD = expert[name].float(), other[name].float(), start[name].float()
        directions_DF = torch.nn.functional.normalize(other_FD, dim=1).T
        match_F = torch.cat([rows_RD.matmul(directions_DF).argmax(dim=1) for rows_RD in torch.split(expert_FD, _ROWS)])
        learned_FD, known_FD = expert_FD - start_FD[match_F], (other_FD - start_FD)[match_F]
        product += float(learned_FD.flatten() @ known_FD.flatten())
        mine, theirs = mine + float(learned_FD.square().sum()), theirs + float(known_FD.square().sum())
    return product / math.sqrt(mine * theirs) if mine and theirs else 0.0


def growth(expert: Weights, shared: Weights) -> tuple[float, str]:
    """The largest weight of a matrix as a multiple of the largest of the same matrix of the shared FFN, and which matrix.

    Args:
        expert: every matrix, under the shared FFN's names.
        shared: the shared FFN.
    """
    return max((float(expert[name].abs().max()) / max(float(matrix.abs().max()), _TINY), name)
               for name, matrix in shared.items())  # fmt: skip


def suspicions(expert: Weights, accepted: Mapping[int, Weights], shared: Weights, *, copied: bool) -> list[str]:
    """A sentence when an expert's weights are too large, or when it is an accepted expert of another partition again.

    Args:
        expert: the new expert.
        accepted: partition -> its expert; read one after another.
        shared: the shared FFN.
        copied: whether experts start as a copy of it (`train.expert.init`).
    """
    start = shared if copied else {name: torch.zeros(()).expand(matrix.shape) for name, matrix in shared.items()}
    grown, name = growth(expert, shared)
    if not grown <= LARGEST:
        return [f"its largest weight in {name} is {grown:.3g} times the shared FFN's, and at most {LARGEST:g} times is accepted: "
                "what it computes can be written with smaller weights"]  # fmt: skip
    for partition in accepted:
        alike = learned_alike(expert, accepted[partition], start)
        if alike >= COPY:
            return [f"it is the accepted expert {partition} again, changed a little: the cosine between what the two learned is "
                    f"{alike:.2f}, and experts of two partitions stay below {COPY:g}"]  # fmt: skip
    return []
