"""The tables and plots of the quality benchmark, from its rows."""

from __future__ import annotations

from collections.abc import Iterable
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.lab.maturity import PAIRS

Rows = list[dict[str, Any]]
#: What the curves over maturity compare.
CURVES = {"alone": "Alone: one machine for a share of T and five for the rest, against one machine for all of T",
          "equal tokens": "Equal tokens: the same, against a dense model that saw as many tokens as everybody together",
          "jointly": "Jointly: the same, against the mixture trained as one on as many tokens",
          "together": "Together: five machines by DiLoCo for a share of T, then an expert each, against DiLoCo for all of T"}
#: The row that the others of its table are compared with, seed by seed.
BASELINES = {"rows": "ours (bayes), top-2", "variants": "as in the table of rows"}


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
             "seeds. `above ours` is the difference to the same seed's row in bold: seeds move all rows together, so it is",
             "steadier than either of the two."]  # fmt: skip
    for table, make in (("rows", _rows), ("variants", _rows), ("properties", _properties)):
        for scale, maturity, share in sorted({(r["scale"], r["maturity"], r["share"]) for r in rows if r["table"] == table}):
            here = [row for row in rows if (row["table"], row["scale"], row["maturity"], row["share"]) ==
                    (table, scale, maturity, share)]  # fmt: skip
            point = f"{scale} model, {maturity:g} tokens a parameter, {share:.0%} of the time for the shared components"
            parts += ["", f"## {table.capitalize()}: {point}", "", *make(here)]
    for curve, title in CURVES.items():
        for scale in sorted({row["scale"] for row in rows}):
            made = _maturity([row for row in rows if row["scale"] == scale], curve)
            parts += ["", f"## {title} ({scale} model)", "", *made] if made else []
    for scale in sorted({row["scale"] for row in rows if row["table"] == "split"}):
        parts += ["", f"## Split: how much better ours is than the dense model, by the share of a given T ({scale} model)", "",
                  *_split([row for row in rows if row["table"] == "split" and row["scale"] == scale])]  # fmt: skip
    drawn = sorted({row["scale"] for row in rows if any(row["row"] in pair for pair in PAIRS.values())})
    parts += [line for scale in drawn for line in ("", f"![The curves of the {scale} model over maturity](maturity-{scale}.png)")]
    return "\n".join(parts) + "\n"


def _properties(rows: Rows) -> list[str]:
    made = ["| property | | seeds | value |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["row"] for row in rows):
        same = [row["values"] for row in rows if row["row"] == name]
        made += [f"| {name} | {key} | {len(same)} | {spread(values[key] for values in same)} |" for key in same[0]]
    return made


def _rows(rows: Rows) -> list[str]:
    names = list(dict.fromkeys(row["row"] for row in rows))
    baseline = BASELINES[rows[0]["table"]]
    ours = {row["seed"]: row["mean"] for row in rows if row["row"] == baseline}
    made = ["| row | seeds | mean | above ours | perplexity | bits a byte | pooled | outside | tokens | FLOPs |",
            "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in names:
        same = [row for row in rows if row["row"] == name]
        loss = mean(row["mean"] for row in same)
        above = [row["mean"] - ours[row["seed"]] for row in same if row["seed"] in ours]
        shown = (f"**{name}**", "") if name == baseline else (name, spread(above) if above else "")
        made.append(f"| {shown[0]} | {len(same)} | {spread(row['mean'] for row in same)} | {shown[1]} | {math.exp(loss):.2f} | "
                    f"{mean(row['bits_per_byte'] for row in same):.4f} | {spread(row['pooled'] for row in same)} | "
                    f"{spread(row['ood'] for row in same)} | {same[0]['tokens'] / 1e6:.1f} M | "
                    f"{same[0]['flops']:.2e} |")  # fmt: skip
    return made


def _maturity(rows: Rows, curve: str) -> list[str]:
    made = []
    for maturity, share, pairs in _compared(rows, curve):
        won = mean(sum(ours["loss"][k] < rival["loss"][k] for k in ours["loss"]) for ours, rival in pairs)
        ours, rival = pairs[0]
        made.append(f"| {maturity:g} | {share:.0%} | {ours['time_tokens'] / 1e6:.2f} M | {ours['tokens'] / 1e6:.2f} M | "
                    f"{rival['tokens'] / 1e6:.2f} M | {len(pairs)} | {spread(r['mean'] for _, r in pairs)} | "
                    f"{spread(o['mean'] for o, _ in pairs)} | {spread(r['mean'] - o['mean'] for o, r in pairs)} | "
                    f"{won:.1f} of {len(ours['loss'])} |")  # fmt: skip
    head = ["| tokens a parameter | share of T | T | tokens of ours | of the rival | seeds | rival | ours | ours is better by | "
            "partitions won |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    return head + made if made else []


def _split(rows: Rows) -> list[str]:
    """A line a T, a column a share, the best in bold; T in tokens of one machine per live parameter.

    Other shares make other partitions, over which the mean is taken, so only differences to the rival can be compared.
    """
    shares = sorted({row["share"] for row in rows})
    made = ["| T, tokens a parameter | T, tokens | steps | " + " | ".join(f"{share:.0%}" for share in shares) + " |",
            "|" + "---|" * (3 + len(shares))]  # fmt: skip
    for maturity in sorted({row["maturity"] for row in rows}):
        here = [row for row in rows if row["maturity"] == maturity]
        gains: dict[float, list[float]] = {}
        for share in shares:
            dense, ours = ({row["seed"]: row["mean"] for row in here if row["row"] == name and row["share"] == share}
                           for name in ("split: dense for all of T", "split: ours"))  # fmt: skip
            gains[share] = [dense[seed] - ours[seed] for seed in sorted(dense.keys() & ours.keys())]
        best = max((mean(gain) for gain in gains.values() if gain), default=None)
        cells = ("" if not gain else f"**{spread(gain)}**" if mean(gain) == best else spread(gain) for gain in gains.values())
        made.append(f"| {maturity:g} | {here[0]['time_tokens'] / 1e6:.2f} M | {here[0]['steps']:,} | {' | '.join(cells)} |")
    return made


def _compared(rows: Rows, curve: str) -> list[tuple[float, float, list[tuple[dict[str, Any], dict[str, Any]]]]]:
    """At every maturity and share the pairs of (ours, rival) of the same seed."""
    names = PAIRS[curve]
    found: dict[tuple[float, float], dict[int, dict[str, dict[str, Any]]]] = {}
    for row in rows:
        if row["row"] in names:
            found.setdefault((row["maturity"], row["share"]), {}).setdefault(row["seed"], {})[row["row"]] = row
    pairs = {point: [(of[names[0]], of[names[1]]) for _, of in sorted(seeds.items()) if len(of) == len(names)]
             for point, seeds in sorted(found.items())}  # fmt: skip
    return [(*point, both) for point, both in pairs.items() if both]


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation; the deviation is left out for a single value."""
    found = list(values)
    return f"{mean(found):.4f}" + (f" ± {stdev(found):.4f}" if len(found) > 1 else "")


def plots(rows: Rows, directory: Path) -> None:
    """Draw ours against each rival over maturity, one line a share, a panel a comparison, a file a scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for scale in sorted({row["scale"] for row in rows}):
        here = [row for row in rows if row["scale"] == scale]
        curves = {curve: found for curve in CURVES if (found := _compared(here, curve))}
        if not curves:
            continue
        shares = sorted({share for found in curves.values() for _, share, _ in found})
        figure = Figure(figsize=(5.0 * len(curves), 4.6), layout="constrained")
        for axes, (curve, found) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
            for number, share in enumerate(shares):
                gains = {maturity: [rival["mean"] - ours["mean"] for ours, rival in pairs]
                         for maturity, at, pairs in found if at == share}  # fmt: skip
                axes.errorbar(list(gains), [mean(gain) for gain in gains.values()], marker="o", capsize=3,
                              yerr=[stdev(gain) if len(gain) > 1 else 0 for gain in gains.values()],
                              color=f"C{number}", label=f"{share:.0%}")  # fmt: skip
            axes.axhline(0, color="grey", linewidth=0.8)
            axes.set_xscale("log")
            ticks = sorted({maturity for maturity, _, _ in found})
            axes.set_xticks(ticks, [f"{maturity:g}" for maturity in ticks])
            axes.minorticks_off()
            axes.set_title(curve)
            axes.set_xlabel("training tokens per parameter at the split")
            axes.set_ylabel("nats that ours is better by")
        figure.legend(*axes.get_legend_handles_labels(), title="share of T for the shared components", frameon=False,
                      ncols=len(shares), loc="outside lower center")  # fmt: skip
        FigureCanvasAgg(figure).print_png(directory / f"maturity-{scale}.png")
