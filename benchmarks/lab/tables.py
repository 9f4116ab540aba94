"""The tables and plots of the quality benchmark, from its rows."""

from __future__ import annotations

from collections.abc import Iterable
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Rows = list[dict[str, Any]]


def line(row: dict[str, Any]) -> str:
    """One row, as it is printed when it was measured."""
    place = f"maturity {row['maturity']:g}, share {row['share']:g}, seed {row['seed']}"
    return f"{row['mean']:.4f} nats, pooled {row['pooled']:.4f}, outside {row['ood']:.4f}  {row['row']}  ({place})"


def markdown(rows: Rows) -> str:
    """Every table, as Markdown."""
    parts = ["# Quality", "",
             "Printed by `benchmarks/quality.py`. Losses are in nats a token on held-out documents; `mean` gives every",
             "partition the same weight, `outside` is the domain that nobody trained on; ± is the standard deviation over",
             "seeds."]  # fmt: skip
    for maturity, share in sorted({(row["maturity"], row["share"]) for row in rows if row["table"] == "rows"}):
        here = [row for row in rows if row["table"] == "rows" and (row["maturity"], row["share"]) == (maturity, share)]
        parts += ["", f"## {maturity:g} tokens a parameter, {share:.0%} of the time for the shared components", "", *_rows(here)]
    curves = [row for row in rows if row["table"] == "maturity"]
    if curves:
        parts += ["", "## One machine for a share of T and five for the rest, against one machine for all of T", ""]
        parts += _maturity(curves)
    return "\n".join(parts) + "\n"


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
    made = ["| tokens a parameter | share of T | seeds | dense for T | ours | ours is better by | partitions won |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    for maturity, share in sorted({(row["maturity"], row["share"]) for row in rows}):
        here = [row for row in rows if (row["maturity"], row["share"]) == (maturity, share)]
        pairs = [(dense, ours) for dense in here for ours in here
                 if dense["seed"] == ours["seed"] and "dense" in dense["row"] and "ours" in ours["row"]]  # fmt: skip
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
    """Draw the gain over the dense model against maturity, one line a share."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = [row for row in rows if row["table"] == "maturity"]
    if not curves:
        return
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for share in sorted({row["share"] for row in curves}):
        points = []
        for maturity in sorted({row["maturity"] for row in curves}):
            here = [row for row in curves if (row["maturity"], row["share"]) == (maturity, share)]
            losses = {kind: [row["mean"] for row in here if kind in row["row"]] for kind in ("dense", "ours")}
            if all(losses.values()):
                points.append((maturity, mean(losses["dense"]) - mean(losses["ours"])))
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{share:.0%} of T for the shared components")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("training tokens per parameter at the split")
    axes.set_ylabel("nats better than dense for all of T")
    axes.legend()
    figure.tight_layout()
    figure.savefig(directory / "maturity.png", dpi=120)
    pyplot.close(figure)
