"""PNG plots of a run: loss curves, what the router does, perplexity as experts arrive. No display, no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
import numpy as np

from forge.errors import StorageError
from forge.files import atomic_file

#: Okabe and Ito's colours, which stay apart for colour-blind readers; black is left for the shared components.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
INK = "#222222"
#: Share of a curve's points that its moving mean spans.
SMOOTHING = 0.04
DPI = 150


def loss_curves(path: Path, shared: Path | None, experts: Mapping[int, Path]) -> None:
    """Draw training loss against tokens: the shared components on the left, every expert on the right.

    Args:
        path: the PNG to write.
        shared: `metrics.jsonl` of the shared phase, if there is one here.
        experts: partition -> `metrics.jsonl` of its expert.

    Raises:
        StorageError: the plot cannot be written.
    """
    curves = [("Shared components", {"shared": shared} if shared is not None else {}),
              ("Experts", {f"expert {number}": file for number, file in sorted(experts.items())})]  # fmt: skip
    drawn = [(title, files) for title, files in curves if files] or curves[:1]
    figure = Figure(figsize=(5.6 * len(drawn), 4.2), layout="constrained")
    for number, (title, files) in enumerate(drawn, start=1):
        axes = figure.add_subplot(1, len(drawn), number)
        for index, (label, file) in enumerate(files.items()):
            colour = INK if label == "shared" else COLOURS[index % len(COLOURS)]
            style = "-" if index < len(COLOURS) else "--"
            _curve(axes, *read_metrics(file), label, colour, style)
        axes.set_title(title)
        axes.set_xlabel("training tokens")
        axes.set_ylabel("loss (nats per token)")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        _tidy(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, ncols=1 + (len(files) - 1) // 8, fontsize=9, title="last loss", loc=1)
    _save(figure, path)


def router_heat_map(path: Path, router: Mapping[str, Any]) -> None:
    """Draw, for each layer, the mean weight of every expert on every partition's held-out tokens.

    Args:
        path: the PNG to write.
        router: what `RouterReport.result` returns.

    Raises:
        StorageError: the plot cannot be written.
    """
    layers = router["layers"]
    columns = min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    partitions, experts = np.asarray(layers[0]["matrix"]).shape
    width, height = min(5.0, max(2.6, 0.5 * experts + 0.9)), min(5.0, max(2.6, 0.45 * partitions + 1.2))
    figure = Figure(figsize=(width * columns + 1.0, height * rows + 0.5), layout="constrained")
    grid = [figure.add_subplot(rows, columns, number + 1) for number in range(len(layers))]
    for number, (axes, layer) in enumerate(zip(grid, layers, strict=True)):
        matrix_PE = np.asarray(layer["matrix"])
        image = axes.imshow(matrix_PE, vmin=0.0, vmax=1.0, cmap="Blues", aspect="auto")
        axes.set_title(f"layer {number}: {layer['token_accuracy']:.0%} token accuracy", fontsize=10)
        axes.set_xticks(*_labels(experts))
        axes.set_yticks(*_labels(partitions))
        axes.tick_params(length=0, labelsize=9)
        axes.spines[:].set_visible(False)
        if number >= len(layers) - columns:
            axes.set_xlabel("expert")
        if number % columns == 0:
            axes.set_ylabel("partition")
        if max(partitions, experts) <= 10:
            _annotate(axes, matrix_PE)
    figure.colorbar(image, ax=grid, label="mean weight of the expert", shrink=0.9)
    figure.suptitle(f"Where the router sends {router['tokens']:,} held-out tokens", fontsize=12)
    _save(figure, path)


def perplexity_plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw held-out perplexity against the number of experts that have arrived.

    Args:
        path: the PNG to write.
        rows: what `evaluate_model` returned at each evaluation; of several with one number of experts the last counts.

    Raises:
        StorageError: the plot cannot be written.
    """
    latest = {int(row["experts"]): row for row in rows}
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    series = (("mean_perplexity", "mean over partitions", COLOURS[0], "o"),
              ("pooled_perplexity", "all tokens pooled", COLOURS[1], "s"))  # fmt: skip
    for key, label, colour, marker in series:
        points = [(experts, latest[experts][key]) for experts in sorted(latest) if latest[experts].get(key) is not None]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, label=label)
        axes.annotate(f"{points[-1][1]:.1f}", points[-1], xytext=(7, 0), textcoords="offset points", va="center",
                      color=colour, fontsize=9)  # fmt: skip
    shared = [row["shared_mean_perplexity"] for row in latest.values() if row.get("shared_mean_perplexity") is not None]
    if shared:
        axes.axhline(shared[-1], color=INK, linestyle="--", linewidth=1, label="shared components alone (mean)")
    axes.set_title("Perplexity as experts arrive")
    axes.set_xlabel("experts arrived")
    axes.set_ylabel("perplexity on held-out documents")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.08, y=0.12)
    _tidy(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def read_metrics(path: Path) -> tuple[list[float], list[float]]:
    """Tokens and losses of a `metrics.jsonl`; a last line that a kill cut off is left out.

    Raises:
        StorageError: the file cannot be read.
    """
    tokens, losses = list[float](), list[float]()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise StorageError(f"Cannot read the metrics in {path}: {error.strerror}.", detail=str(error)) from error
    for line in lines:
        try:
            row = json.loads(line)
            point = float(row["tokens"]), float(row["loss"])
        except (ValueError, KeyError, TypeError):
            continue
        tokens.append(point[0])
        losses.append(point[1])
    return tokens, losses


def _curve(
    axes: Axes, tokens: Sequence[float], losses: Sequence[float], label: str, colour: str, style: str
) -> None:
    """One loss curve: every step faintly, its moving mean on top."""
    if not tokens:
        return
    span = max(1, round(SMOOTHING * len(losses)))
    sums = np.concatenate(([0.0], np.cumsum(losses)))
    centres = np.arange(len(losses))
    starts, ends = np.maximum(centres - span // 2, 0), np.minimum(centres + span // 2 + 1, len(losses))
    axes.plot(tokens, losses, color=colour, alpha=0.2, linewidth=0.7)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    axes.plot(tokens, means, style, color=colour, linewidth=1.6, label=f"{label}: {means[-1]:.2f}")


def _labels(count: int) -> tuple[list[int], list[str]]:
    step = max(1, math.ceil(count / 16))
    ticks = list(range(0, count, step))
    return ticks, [str(tick) for tick in ticks]


def _annotate(axes: Axes, matrix_PE: np.ndarray[Any, np.dtype[Any]]) -> None:
    for (row, column), value in np.ndenumerate(matrix_PE):
        axes.text(column, row, f"{value:.2f}".removeprefix("0"), ha="center", va="center", fontsize=8,
                  color="white" if value > 0.55 else INK)  # fmt: skip


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=DPI)
