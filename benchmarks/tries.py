"""What became of hostile shards, as tables: what was caught and why, what got through and what it does. For attacks.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
import re

from benchmarks.common import table


@dataclass(frozen=True, kw_only=True)
class Try:
    """What became of one hostile shard."""

    attack: str
    strength: str
    partition: int
    reason: str
    """Why it was refused; empty when it was accepted."""
    change: list[float] = field(default_factory=list)
    """Of an accepted one: by how many nats a token every partition's test loss differs from that of the honest expert's model."""
    likeness: float | None = None
    largest: float | None = None
    layers: list[float] = field(default_factory=list)
    """What each of its layers gains, as `layer_gains` measures it."""
    trigger: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Of a backdoor: text -> by partition, what `Arena.followed` says of it."""


def span(values: Sequence[float | None], form: str = "+.4f") -> str:
    """The least and the largest, as a cell of the table."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = format(min(known), form), format(max(known), form)
    return low if low == high else f"{low} to {high}"


def tables(tries: list[Try], honest: list[tuple[float, float]], texts: int) -> str:
    """What was caught and why, what got through and what it does, and how often the backdoor's trigger works."""
    groups: dict[tuple[str, str], list[Try]] = {}
    for one in tries:
        groups.setdefault((one.attack, one.strength), []).append(one)
    caught, through, triggers = [], [], []
    for (name, strength), rows in groups.items():
        passed = [row for row in rows if not row.reason]
        reasons = dict.fromkeys(re.sub(r"[\d.]+", "…", row.reason) for row in rows if row.reason)
        caught.append([name, strength, f"{len(rows) - len(passed)} of {len(rows)}", "; ".join(reasons)[:200],
                       span([row.likeness for row in rows], ".2f"), span([row.largest for row in rows], ".3g")])  # fmt: skip
        if passed:
            through.append([name, strength, f"{len(passed)} of {len(rows)}", span([row.change[row.partition] for row in passed]),
                            span([change for row in passed for k, change in enumerate(row.change) if k != row.partition]),
                            span([min(row.layers) for row in passed])])  # fmt: skip
        triggers += [[strength, str(row.partition), text, *(f"{share:.0%}, {nats:.2f}" for share, nats in found)]
                     for row in passed for text, found in row.trigger.items()]  # fmt: skip
    text = table(["attack", "strength", "caught", "why", "likeness", "largest weight"], caught)
    text += "\nWhat got through, against the model with the honest expert, nats a token on test documents:\n\n"
    text += table(["attack", "strength", "accepted", "own partition", "others", "least gain of a layer"], through)
    if triggers:
        count = len(honest)
        triggers.insert(0, ["none", "", "the trigger", *(f"{share:.0%}, {nats:.2f}" for share, nats in honest)])
        text += (f"\nHow often the payload follows, of {texts} test texts of each partition with the trigger (or a line like "
                 "it, that was not trained) behind them, and its loss in nats a token:\n\n")  # fmt: skip
        text += table(["backdoor", "in expert", "text", *(f"behind partition {k}" for k in range(count))], triggers)
    return text
