"""The router's report on decisions that are known."""

from __future__ import annotations

import math

import pytest
import torch

from forge.evaluate.router_report import RouterReport
from forge.model.moe import Routing


def decide(probabilities: list[list[float]], top_k: int = 2) -> Routing:
    probabilities_NE = torch.tensor(probabilities)
    weights_NK, experts_NK = probabilities_NE.topk(top_k, dim=-1)
    return Routing(probabilities_NE, experts_NK, weights_NK / weights_NK.sum(dim=-1, keepdim=True))


def test_known_decisions() -> None:
    report = RouterReport(n_layers=2, partitions=2, n_experts=3)
    right, wrong = [0.6, 0.4, 0.0], [0.0, 0.0, 1.0]
    report.add(0, [decide([right, right, wrong]), decide([right, wrong, wrong])], torch.tensor([True, True, False]))
    report.add(1, [decide([right]), decide([right])], torch.tensor([True]))
    result = report.result()
    assert result["tokens"] == 3
    assert result["token_accuracy"] == pytest.approx((2 + 1) / 6)
    first, second = result["layers"]
    assert first["token_accuracy"] == pytest.approx(2 / 3)
    assert first["partition_accuracy"] == [1.0, 0.0]
    assert first["load"] == pytest.approx([0.5, 0.5, 0.0])
    assert first["entropy"] == pytest.approx(-0.6 * math.log(0.6) - 0.4 * math.log(0.4))
    assert first["matrix"] == [pytest.approx([0.6, 0.4, 0.0]), pytest.approx([0.6, 0.4, 0.0])]
    assert second["matrix"][0] == pytest.approx([0.3, 0.2, 0.5])
    assert sum(second["load"]) == pytest.approx(1.0)


def test_nothing_seen_is_all_zeros() -> None:
    result = RouterReport(1, 2, 2).result()
    assert result["tokens"] == 0 and result["token_accuracy"] == 0.0
    assert result["layers"][0]["load"] == [0.0, 0.0]
