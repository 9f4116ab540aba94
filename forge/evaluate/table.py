"""What people see of `reports/evaluation.json`: the perplexities as a table, and what they mean. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import textwrap
from typing import Any, Final, NamedTuple, TypeVar

from forge.vocabulary import ALONE, ORACLE, OURS, SHARED, UNIFORM

NAME: Final = 28
"""Width of the first column."""
LINE: Final = 100
"""Width of the sentences."""
ROWS: Final = {ORACLE: "oracle: own expert for each"}
"""Rows that a name alone does not explain."""


Owner = TypeVar("Owner")


class Share(NamedTuple):
    """What one owner's experts contribute together."""

    experts: list[int]
    nats: float | None
    """Sum of what each of them contributes alone, in nats a token; None while none of them is measured."""


def shares(owners: Mapping[int, Owner], contributions: Iterable[Mapping[str, Any]] | None) -> list[tuple[Owner, Share]]:
    """Who contributed how much, the largest first, who is not measured last.

    Args:
        owners: expert -> who trained it.
        contributions: of an evaluation's row (`forge/evaluate/contributions.py`); None where none was measured.
    """
    measured = {row["expert"]: row["nats"] for row in contributions or () if row["nats"] is not None}
    experts: dict[Owner, list[int]] = {}
    for expert, owner in sorted(owners.items()):
        experts.setdefault(owner, []).append(expert)
    found = {owner: Share(own, sum(known) if (known := [measured[k] for k in own if k in measured]) else None)
             for owner, own in experts.items()}  # fmt: skip
    return sorted(found.items(), key=lambda row: (row[1].nats is None, -(row[1].nats or 0.0), row[1].experts))


def contribution_lines(contributions: Iterable[Mapping[str, Any]], names: Mapping[int, str]) -> list[str]:
    """A line for each expert, and one for each node, the largest contribution first.

    Args:
        contributions: of an evaluation's row.
        names: expert -> the node that trained it.
    """
    rows = list(contributions)
    if not rows:
        return ["No expert has arrived yet."]
    lines = ["nats a token by which the loss rises without an expert (the shared FFN in its place)", ""]
    lines += [f"{f'expert {expert}':{NAME}}{_number(share.nats, 9, 4)}"
              for expert, share in shares({row["expert"]: row["expert"] for row in rows}, rows)]  # fmt: skip
    return [*lines, "", *(f"{name:{NAME}}{_number(share.nats, 9, 4)}  {experts_of(share)}"
                          for name, share in shares(names, rows))]  # fmt: skip


def experts_of(share: Share) -> str:
    """The experts as words: `expert 2`, `experts 0, 3`."""
    return f"expert{'s' if len(share.experts) > 1 else ''} {', '.join(map(str, share.experts))}"


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
