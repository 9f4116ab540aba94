"""The tables and plots of the quality benchmark, from its rows."""

from __future__ import annotations

from collections.abc import Iterable
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Rows = list[dict[str, Any]]
#: What the two curves over maturity compare.
CURVES = {"alone": "Alone: one machine for a share of T and five for the rest, against one machine for all of T",
          "together": "Together: five machines by DiLoCo for a share of T, then an expert each, against DiLoCo for all of T"}


def line(row: dict[str, Any]) -> str:
    """One row, as it is printed when it was measured."""
    place = f"maturity {row['maturity']:g}, share {row['share']:g}, seed {row['seed']}"
    if "values" in row:
        return f"{row['row']}: {', '.join(f'{key} {value:.4f}' for key, value in row['values'].items())}  ({place})"
    return f"{row['mean']:.4f} nats, pooled {row['pooled']:.4f}, outside {row['ood']:.4f}  {row['row']}  ({place})"


def markdown(rows: Rows) -> str:
    """Every table, as Markdown."""
    parts = ["# Quality", "",
             "Printed by `benchmarks/quality.py`. Losses are in nats a token on held-out documents; `mean` gives every",
             "partition the same weight, `outside` is the domain that nobody trained on; ± is the standard deviation over",
             "seeds."]  # fmt: skip
    for table, title in (("rows", "Rivals"), ("variants", "Variants")):
        for maturity, share in _points(rows, table):
            here = [row for row in rows if row["table"] == table and (row["maturity"], row["share"]) == (maturity, share)]
            parts += ["", f"## {title}: {maturity:g} tokens a parameter, {share:.0%} of the time for the shared components",
                      "", *_rows(here)]  # fmt: skip
    for maturity, share in _points(rows, "properties"):
        here = [row for row in rows if row["table"] == "properties" and (row["maturity"], row["share"]) == (maturity, share)]
        parts += ["", f"## Properties: {maturity:g} tokens a parameter, {share:.0%} of the time for the shared components", "",
                  *_properties(here)]  # fmt: skip
    for table, title in CURVES.items():
        curves = [row for row in rows if row["table"] == table]
        if curves:
            parts += ["", f"## {title}", "", *_maturity(curves)]
    return "\n".join(parts) + "\n"


def _points(rows: Rows, table: str) -> list[tuple[float, float]]:
    return sorted({(row["maturity"], row["share"]) for row in rows if row["table"] == table})


def _properties(rows: Rows) -> list[str]:
    made = ["| property | | seeds | value |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["row"] for row in rows):
        same = [row["values"] for row in rows if row["row"] == name]
        made += [f"| {name} | {key} | {len(same)} | {spread(values[key] for values in same)} |" for key in same[0]]
    return made


def _rows(rows: Rows) -> list[str]:
    names = list(dict.fromkeys(row["row"] for row in rows))
    made = ["| row | seeds | mean | perplexity | bits a byte | pooled | outside | tokens | FLOPs |",
            "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in names:
        same = [row for row in rows if row["row"] == name]
        loss = mean(row["mean"] for row in same)
        made.append(f"| {name} | {len(same)} | {spread(row['mean'] for row in same)} | {math.exp(loss):.2f} | "
                    f"{mean(row['bits_per_byte'] for row in same):.4f} | {spread(row['pooled'] for row in same)} | "
                    f"{spread(row['ood'] for row in same)} | {same[0]['tokens'] / 1e6:.1f} M | "
                    f"{same[0]['flops']:.2e} |")  # fmt: skip
    return made


def _maturity(rows: Rows) -> list[str]:
    made = ["| tokens a parameter | share of T | seeds | rival | ours | ours is better by | partitions won |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    for maturity, share in sorted({(row["maturity"], row["share"]) for row in rows}):
        here = [row for row in rows if (row["maturity"], row["share"]) == (maturity, share)]
        pairs = [(dense, ours) for dense in here for ours in here
                 if dense["seed"] == ours["seed"] and "ours" not in dense["row"] and "ours" in ours["row"]]  # fmt: skip
        if pairs:
            won = mean(sum(ours["loss"][k] < dense["loss"][k] for k in dense["loss"]) for dense, ours in pairs)
            made.append(f"| {maturity:g} | {share:.0%} | {len(pairs)} | {spread(d['mean'] for d, _ in pairs)} | "
                        f"{spread(o['mean'] for _, o in pairs)} | {spread(d['mean'] - o['mean'] for d, o in pairs)} | "
                        f"{won:.1f} of {len(pairs[0][0]['loss'])} |")  # fmt: skip
    return made


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation; the deviation is left out for a single value."""
    found = list(values)
    return f"{mean(found):.4f}" + (f" ± {stdev(found):.4f}" if len(found) > 1 else "")


def plots(rows: Rows, directory: Path) -> None:
    """Draw the gain over the dense model against maturity, one line a share, one panel a comparison."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {table: here for table in CURVES if (here := [row for row in rows if row["table"] == table])}
    if not found:
        return
    figure = Figure(figsize=(6.5 * len(found), 4.5), layout="constrained")
    for number, (table, curves) in enumerate(found.items(), start=1):
        axes = figure.add_subplot(1, len(found), number)
        for share in sorted({row["share"] for row in curves}):
            points = []
            for maturity in sorted({row["maturity"] for row in curves}):
                here = [row for row in curves if (row["maturity"], row["share"]) == (maturity, share)]
                rival, ours = ([row["mean"] for row in here if ("ours" in row["row"]) == mine] for mine in (False, True))
                if rival and ours:
                    points.append((maturity, mean(rival) - mean(ours)))
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=f"{share:.0%} of T for the shared components")
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_title(table)
        axes.set_xlabel("training tokens per parameter at the split")
        axes.set_ylabel("nats better than dense for all of T")
        axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(directory / "maturity.png")
