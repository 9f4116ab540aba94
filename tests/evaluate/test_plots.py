"""Plots are PNG files, also of runs that have hardly begun, and leave no figure open."""

from __future__ import annotations

import json
from pathlib import Path
import subprocess
import sys
from typing import Any

from matplotlib.image import imread
import pytest

from forge.errors import StorageError
from forge.evaluate.plots import loss_curves, perplexity_plot, read_metrics, router_heat_map


def metrics(path: Path, steps: int) -> Path:
    rows = [{"step": step, "tokens": 512 * step, "loss": 9 / step} for step in range(1, steps + 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def router(layers: int, partitions: int) -> dict[str, Any]:
    matrix = [[float(row == column) for column in range(partitions)] for row in range(partitions)]
    return {"tokens": 9, "layers": [{"token_accuracy": 1.0, "matrix": matrix} for _ in range(layers)]}


def row(experts: int, value: float | None) -> dict[str, Any]:
    return {"experts": experts, "mean_perplexity": value, "pooled_perplexity": value, "shared_mean_perplexity": 9.0}


def is_plot(path: Path) -> bool:
    pixels = imread(path)
    return bool(pixels.shape[0] > 300 and pixels.shape[1] > 300 and pixels.std() > 0.01)


def test_loss_curves(tmp_path: Path) -> None:
    shared = metrics(tmp_path / "shared.jsonl", 50)
    experts = {number: metrics(tmp_path / f"{number}.jsonl", 1 + number) for number in range(10)}
    for here, arrived in ((shared, experts), (shared, {}), (None, experts), (None, {})):
        loss_curves(tmp_path / "loss.png", here, arrived)
        assert is_plot(tmp_path / "loss.png")


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    path = metrics(tmp_path / "m.jsonl", 3)
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert read_metrics(path) == ([512.0, 1024.0, 1536.0], [9.0, 4.5, 3.0])
    with pytest.raises(StorageError, match="Cannot read the metrics"):
        read_metrics(tmp_path / "none.jsonl")


def test_router_heat_map(tmp_path: Path) -> None:
    for layers, partitions in ((1, 1), (4, 5), (6, 12), (2, 40)):
        router_heat_map(tmp_path / "router.png", router(layers, partitions))
        assert is_plot(tmp_path / "router.png")


def test_perplexity_plot(tmp_path: Path) -> None:
    for rows in ([], [row(0, 8.0)], [row(0, 8.0), row(2, 6.0), row(1, 7.0), row(2, 5.0)], [row(0, None)]):
        perplexity_plot(tmp_path / "perplexity.png", rows)
        assert is_plot(tmp_path / "perplexity.png")


def test_no_global_state() -> None:
    script = "import sys, forge.evaluate.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
