"""What people see of `reports/evaluation.json`: the perplexities as a table, and what they mean. No torch."""

from __future__ import annotations

from collections.abc import Mapping
import textwrap
from typing import Any, Final

from forge.vocabulary import ALONE, ORACLE, OURS, SHARED, UNIFORM

NAME: Final = 28
"""Width of the first column."""
LINE: Final = 100
"""Width of the sentences."""
ROWS: Final = {ORACLE: "oracle: own expert for each"}
"""Rows that a name alone does not explain."""


def evaluation_lines(report: Mapping[str, Any]) -> list[str]:
    """The report of a run: a row after each accepted shard, the rivals of the last one, what it means, samples."""
    rows = report["rows"]
    lines = ["", f"{'perplexity':{NAME}}{'mean':>9}{'pooled':>9}{'bits/byte':>11}"]
    if rows[0].get("shared_mean_perplexity") is not None:
        lines.append(_line(SHARED, rows[0], "shared_"))
    for row in rows:
        name = f"{row['experts']} expert{'' if row['experts'] == 1 else 's'}" + (" (final)" if row.get("final") else "")
        lines.append(_line(name, row))
    last = rows[-1]
    if last.get("rivals"):
        tokens = sum(partition["tokens"] for partition in last["partitions"])
        lines += ["", f"rivals, all on the same {last['compared_tokens']:,} of {tokens:,} tokens"]
        names = [SHARED, *map(ALONE.format, last.get("arrived") or []), UNIFORM, OURS, ORACLE]
        lines += [_line(ROWS.get(name, name), last["rivals"][name]) for name in names if name in last["rivals"]]
    if last.get("explanation"):
        lines += ["", *textwrap.wrap(" ".join(last["explanation"]), LINE)]
    for sample in last.get("samples") or []:
        lines += ["", f"sample, partition {sample['partition']}: {sample['prompt']!r}", f"  -> {sample['text']!r}"]
    return lines


def _line(name: str, figures: Mapping[str, Any], prefix: str = "") -> str:
    columns = (("mean_perplexity", 9, 2), ("pooled_perplexity", 9, 2), ("pooled_bits_per_byte", 11, 4))
    return f"{name:{NAME}}" + "".join(_number(figures.get(prefix + key), width, digits) for key, width, digits in columns)


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"
