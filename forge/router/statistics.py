"""What the router is fitted on: sums over gate inputs that add up, so that a partition can join later.

Per layer, with x_D the exact input of the gate (the post-attention norm's output): n_k the tokens, s_kD their sum, for
each partition k; and S_DD the sum of x x' over all partitions. Float64, since means are subtracted from second moments.

Shapes: K partitions, D model width, L layers, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from forge.data.packing import batches, pad
from forge.model.lm import DenseLM
from forge.train.loss import IGNORE_INDEX
from forge.train.memory import STATISTICS_TOKENS

Array = npt.NDArray[np.float64]


@dataclass
class LayerStatistics:
    """Sums of one layer."""

    counts_K: Array
    sums_KD: Array
    second_DD: Array

    @classmethod
    def empty(cls, partitions: int, width: int) -> LayerStatistics:
        """No tokens yet."""
        return cls(np.zeros(partitions), np.zeros((partitions, width)), np.zeros((width, width)))

    def add(self, partition: int, x_ND: Array) -> None:
        """Add the gate inputs of N tokens of one partition."""
        self.counts_K[partition] += len(x_ND)
        self.sums_KD[partition] += x_ND.sum(axis=0)
        self.second_DD += x_ND.T @ x_ND

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        return LayerStatistics(self.counts_K + other.counts_K, self.sums_KD + other.sums_KD,
                               self.second_DD + other.second_DD)  # fmt: skip

    @property
    def means_KD(self) -> Array:
        """Mean gate input of each partition."""
        return self.sums_KD / np.maximum(self.counts_K, 1.0)[:, None]

    @property
    def within_DD(self) -> Array:
        """Pooled within-partition covariance: (S - sum_k n_k mu_k mu_k') / n."""
        means = self.means_KD
        between = (means * self.counts_K[:, None]).T @ means
        within: Array = (self.second_DD - between) / self.counts_K.sum()
        return within

    def shrunk_within_DD(self, shrinkage: float) -> Array:
        """W + eps * tr(W)/D * I, for the pooled within-partition covariance W and eps = `shrinkage`."""
        within_DD = self.within_DD
        shrunk: Array = within_DD + shrinkage * np.trace(within_DD) / len(within_DD) * np.eye(len(within_DD))
        return shrunk


def forward_batches(model: DenseLM, windows: Iterable[npt.NDArray[Any]]
                    ) -> Iterator[tuple[npt.NDArray[np.bool_], list[torch.Tensor]]]:  # fmt: skip
    """Run a model over windows, a batch of them at a time.

    Yields:
        Which positions (B, T) are tokens with a successor and no padding, and the gate input (B, T, D) of each layer.
    """
    for batch in batches(windows, STATISTICS_TOKENS):
        inputs_BT, targets_BT = pad(batch, IGNORE_INDEX)
        collected: list[torch.Tensor] = []
        with torch.inference_mode():
            model(torch.from_numpy(inputs_BT), collected)
        yield targets_BT != IGNORE_INDEX, collected
        collected.clear()  # The next batch comes in its place, not beside it.


def gate_inputs(model: DenseLM, windows: Iterable[npt.NDArray[Any]]) -> Iterator[tuple[int, Iterator[Array]]]:
    """Of a batch of windows after another: its tokens N, and the gate input (N, D) of each layer, widened as it is taken."""
    for kept_BT, collected in forward_batches(model, windows):
        yield int(kept_BT.sum()), (x_BTD.numpy()[kept_BT].astype(np.float64) for x_BTD in collected)


def collect(model: DenseLM, partition: int, windows: Iterable[npt.NDArray[Any]], into: list[LayerStatistics]) -> int:
    """Add the gate inputs of a partition's windows to the statistics of every layer; returns the tokens seen."""
    tokens = 0
    for count, layers in gate_inputs(model, windows):
        for layer, x_ND in zip(into, layers, strict=True):
            layer.add(partition, x_ND)
        tokens += count
    return tokens
