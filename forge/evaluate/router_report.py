"""What the router does on held-out documents: how often it is right, how it spreads the load, how sure it is.

Shape suffixes: N tokens of a batch, P partitions, E experts, K top_k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from forge.model.moe import Routing

#: Cells of the matrices of all layers above which they are not kept with an evaluation: some 5 MB of JSON each time.
MAX_CELLS = 300_000


class RouterReport:
    """Sums over held-out tokens, a layer at a time; constant memory.

    Args:
        n_layers: layers of the model.
        partitions: partitions that documents come from; partition k belongs to expert k.
        n_experts: experts of the model.
    """

    def __init__(self, n_layers: int, partitions: int, n_experts: int) -> None:
        kind = torch.float64
        self._tokens_P = torch.zeros(partitions, dtype=kind)
        self._right_LP = torch.zeros(n_layers, partitions, dtype=kind)
        self._entropy_L = torch.zeros(n_layers, dtype=kind)
        self._sent_LE = torch.zeros(n_layers, n_experts, dtype=kind)
        self._weight_LPE = torch.zeros(n_layers, partitions, n_experts, dtype=kind)

    def add(self, partition: int, routing: list[Routing], kept_N: Tensor) -> None:
        """Count a batch of tokens of one partition's documents.

        Args:
            partition: where the documents are from.
            routing: every layer's decisions.
            kept_N: which rows are tokens and not padding.
        """
        self._tokens_P[partition] += int(kept_N.sum())
        for layer, (probabilities_NE, experts_NK, weights_NK) in enumerate(routing):
            probabilities, experts, weights = probabilities_NE[kept_N], experts_NK[kept_N], weights_NK[kept_N]
            self._right_LP[layer, partition] += int((experts[:, 0] == partition).sum())
            self._entropy_L[layer] += float(torch.special.entr(probabilities).sum())
            self._sent_LE[layer] += torch.bincount(experts.flatten(), minlength=probabilities.shape[1]).cpu()
            shares_E = torch.zeros_like(probabilities).scatter_(1, experts, weights).sum(dim=0, dtype=torch.float64)
            self._weight_LPE[layer, partition] += shares_E.cpu()

    def result(self) -> dict[str, Any]:
        """The report, in JSON values.

        Returns:
            `tokens`; `token_accuracy`, the mean over layers; and `layers`, each with `token_accuracy` (share of tokens
            whose first expert is their document's), `partition_accuracy` (P,), `entropy` (nats a token, over all
            experts), `load` (share of the routed tokens that an expert gets, (E,), sums to 1) and `matrix` ((P, E):
            mean weight of an expert on a partition's tokens; rows sum to 1). Partitions without tokens have zeros.
        """
        total = self._tokens_P.sum().clamp(min=1)
        tokens_P = self._tokens_P.clamp(min=1)
        layers = [
            {
                "token_accuracy": float(right_P.sum() / total),
                "partition_accuracy": (right_P / tokens_P).tolist(),
                "entropy": float(entropy / total),
                "load": (sent_E / sent_E.sum().clamp(min=1)).tolist(),
                "matrix": (weight_PE / tokens_P[:, None]).tolist(),
            }
            for right_P, entropy, sent_E, weight_PE in zip(
                self._right_LP, self._entropy_L, self._sent_LE, self._weight_LPE, strict=True
            )
        ]
        mean = float(self._right_LP.sum() / total / max(len(layers), 1))
        return {"tokens": int(self._tokens_P.sum()), "token_accuracy": mean, "layers": layers}


def kept(report: dict[str, Any]) -> dict[str, Any]:
    """A report as it is kept: without its matrices when they have more than `MAX_CELLS` cells."""
    cells = sum(len(layer["matrix"]) * len(layer["load"]) for layer in report["layers"])
    if cells <= MAX_CELLS:
        return report
    return report | {"layers": [{key: value for key, value in layer.items() if key != "matrix"} for layer in report["layers"]]}
