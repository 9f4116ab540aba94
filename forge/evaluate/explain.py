"""What the report of a router means for this run, in plain words.

"Takes 4 % of the tokens" counts a token by the weight that the router gives the expert, as a mean over layers, so that the
shares of all experts add up to 100 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import math
from typing import Any, Final

from forge.vocabulary import ALONE, ORACLE, OURS, SHARED, UNIFORM

#: Nats under which two losses are called equal: what three decimals do not show.
SAME: Final = 0.0005
#: An expert that takes less of the tokens is called unused.
UNUSED: Final = 0.01
#: An expert stands out when its share of the tokens and its partition's differ by this factor.
APART: Final = 2.0
#: Layers are told apart when the share that they send to the right expert differs by this much.
LAYERS_APART: Final = 0.1
#: Sentences about single experts at most, the worst first.
MOST: Final = 3


def explain(row: Mapping[str, Any]) -> list[str]:
    """Sentences about a row of `reports/evaluation.json`; fields that are missing or null are passed over.

    Args:
        row: what `evaluate_model` returns.
    """
    traffic = Traffic.of(row)
    if traffic is None:
        return ["The router was not measured: there are no held-out tokens."]
    if traffic.arrived == []:
        return ["No expert has arrived: all are the shared FFN, so the model is the shared components, whatever the router "
                "decides."]  # fmt: skip
    if traffic.experts == 1:
        return ["There is one expert, so the router has nothing to decide.", *_gain(row)]
    sentences = [*_decisions(row, traffic), *_gain(row), *_uniform(row), *_missing(traffic), *_experts(traffic),
                 *_beaten(row, traffic), *_layers(row)]  # fmt: skip
    return sentences or ["Neither the router's decisions nor a loss to compare with was measured."]


@dataclass(frozen=True)
class Traffic:
    """Where the tokens of every partition go, as means over layers."""

    experts: int
    arrived: Sequence[int]
    weight: Sequence[Sequence[float]]
    """Of every partition (row), the share of its tokens that each expert takes."""
    held: Sequence[float]
    """The share of all held-out tokens that each partition holds."""
    taken: Sequence[float]
    """The share of all held-out tokens that each expert takes."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Traffic | None:
        """Read it from a row of the evaluation; None when nothing was measured."""
        matrices = [layer["matrix"] for layer in (row.get("router") or {}).get("layers") or [] if layer.get("matrix")]
        tokens = [partition.get("tokens") or 0 for partition in row.get("partitions") or []]
        if not matrices or not sum(tokens) or len(matrices[0]) != len(tokens):
            return None
        experts = len(matrices[0][0])
        weight = [[math.fsum(matrix[partition][expert] for matrix in matrices) / len(matrices) for expert in range(experts)]
                  for partition in range(len(tokens))]  # fmt: skip
        held = [count / sum(tokens) for count in tokens]
        taken = [math.fsum(share * line[expert] for share, line in zip(held, weight, strict=True))
                 for expert in range(experts)]  # fmt: skip
        arrived = row.get("arrived")
        return cls(experts, list(range(experts)) if arrived is None else arrived, weight, held, taken)

    @property
    def known(self) -> list[int]:
        """Experts that have arrived and whose partition has held-out tokens."""
        return [expert for expert in self.arrived if expert < len(self.held) and self.held[expert] > 0]

    def rival_of(self, expert: int) -> int:
        """The other expert that takes most of its partition's tokens."""
        return max((other for other in range(self.experts) if other != expert), key=lambda other: self.weight[expert][other])


def _decisions(row: Mapping[str, Any], traffic: Traffic) -> list[str]:
    """How often the router is right, and what its mistakes cost."""
    accuracy = _number(row["router"].get("token_accuracy"))
    gap = _difference(row, OURS, ORACLE)
    parts = []
    if accuracy is not None:
        chance = ", no more than by chance" if accuracy <= 1 / traffic.experts else ""
        parts.append(f"the router sends {percent(accuracy)} of the tokens first to their partition's expert{chance}")
    if gap is not None and abs(gap) <= SAME:
        parts.append("the mixture is as good as the oracle, which knows each document's partition")
    elif gap is not None and gap < 0:
        parts.append(f"the mixture is {-gap:.3f} nats better than the oracle, which knows each document's partition")
    elif gap is not None:
        gained = _difference(row, SHARED, ORACLE)
        share = ""
        if gained is not None and gained > SAME:
            share = f", {percent(gap / gained)} of what the oracle gains" if gap < gained else ", more than the oracle gains"
        parts.append(f"the gap to the oracle is {gap:.3f} nats{share}")
    return [_sentence("; ".join(parts))] if parts else []


def _gain(row: Mapping[str, Any]) -> list[str]:
    """What the experts are worth."""
    gained = _difference(row, SHARED, OURS)
    if gained is None:
        return []
    if abs(gained) <= SAME:
        return ["The experts gain nothing over the shared components alone."]
    return [f"The mixture is {abs(gained):.3f} nats {'better' if gained > 0 else 'worse'} than the shared components alone."]


def _uniform(row: Mapping[str, Any]) -> list[str]:
    """What the router is worth."""
    gained = _difference(row, UNIFORM, OURS)
    if gained is None:
        return []
    if gained > SAME:
        return [f"Choosing experts gains {gained:.3f} nats over giving every expert the same weight."]
    better = "as good" if gained >= -SAME else f"{-gained:.3f} nats better"
    return [f"Giving every expert the same weight would be {better}: the router's choices do not help this model."]


def _missing(traffic: Traffic) -> list[str]:
    """What goes to experts that are not there."""
    missing = [expert for expert in range(traffic.experts) if expert not in traffic.arrived]
    if not missing:
        return []
    share = percent(math.fsum(traffic.taken[expert] for expert in missing))
    if len(missing) == 1:
        return [f"Expert {missing[0]} has not arrived: the shared FFN in its place takes {share} of the tokens."]
    names = f"Experts {_list(missing)}" if len(missing) <= MOST else f"{len(missing)} experts"
    return [f"{names} have not arrived: the shared FFN in their place takes {share} of the tokens."]


def _experts(traffic: Traffic) -> list[str]:
    """Experts that take far more or far less than what their partition holds, or lose their own partition to another."""
    found = []
    for expert in traffic.known:
        held, taken, rival = traffic.held[expert], traffic.taken[expert], traffic.rival_of(expert)
        own, lost = traffic.weight[expert][expert], traffic.weight[expert][rival]
        name = f"expert {rival}" if rival >= len(traffic.held) else f"partition {rival}, whose expert"
        if taken < UNUSED or taken * APART < held:
            unused = "is all but unused: it " if taken < UNUSED else ""
            found.append((held / max(taken, 1e-9), f"Expert {expert} {unused}takes {percent(taken)} of the tokens, and its "
                          f"partition holds {percent(held)} of them: it overlaps with {name} takes {percent(lost)} of "
                          "its tokens"))  # fmt: skip
        elif lost >= own:
            found.append((lost / max(own, 1e-9), f"Partition {expert} is not told apart from {name} takes "
                          f"{percent(lost)} of its tokens, and expert {expert} only {percent(own)}"))  # fmt: skip
        elif taken > held * APART:
            found.append((taken / held, f"Expert {expert} takes {percent(taken)} of the tokens, and its partition holds only "
                          f"{percent(held)} of them: it serves other partitions too"))  # fmt: skip
    found.sort(key=lambda pair: -pair[0])
    sentences = [_sentence(text) for _, text in found[:MOST]]
    if len(found) > MOST:
        more = len(found) - MOST
        sentences.append(f"{more} more expert{'' if more == 1 else 's'} stand{'s' if more == 1 else ''} out like that.")
    if not found and len(traffic.known) > 1:
        shares = [traffic.taken[expert] for expert in traffic.known]
        least, most = percent(min(shares)), percent(max(shares))
        between = least if least == most else f"between {least} and {most}"
        sentences.append(f"The experts take {between} of the tokens each, in keeping with what their partitions hold.")
    silent = [partition for partition, held in enumerate(traffic.held) if not held]
    if silent:
        sentences.append(f"Partition{'' if len(silent) == 1 else 's'} {_list(silent)} {'has' if len(silent) == 1 else 'have'} "
                         "no held-out tokens, so nothing is known there.")  # fmt: skip
    return sentences


def _beaten(row: Mapping[str, Any], traffic: Traffic) -> list[str]:
    """Experts that another one beats on their own partition."""
    rows = {expert: ((row.get("rivals") or {}).get(ALONE.format(expert)) or {}).get("losses") or [] for expert in traffic.known}
    sentences = []
    for expert in traffic.known:
        losses = {other: _number(line[expert]) for other, line in rows.items() if len(line) > expert}
        known = {other: loss for other, loss in losses.items() if loss is not None}
        best = min(known, key=lambda other: known[other], default=expert)
        if best != expert and expert in known and known[expert] - known[best] > SAME:
            sentences.append(f"On partition {expert}, expert {best} alone is better than its own, {known[best]:.3f} nats against "
                             f"{known[expert]:.3f}: it had too little training, or too little text.")  # fmt: skip
    return sentences[:MOST]


def _layers(row: Mapping[str, Any]) -> list[str]:
    """Layers that decide unlike each other."""
    found = [(accuracy, number) for number, layer in enumerate(row["router"]["layers"])
             if (accuracy := _number(layer.get("token_accuracy"))) is not None]  # fmt: skip
    if not found or max(found)[0] - min(found)[0] < LAYERS_APART:
        return []
    (worst, low), (best, high) = min(found), max(found)
    return [f"The router is right least often in layer {low} ({percent(worst)}) and most often in layer {high} "
            f"({percent(best)})."]  # fmt: skip


def percent(share: float) -> str:
    """A share in whole per cent that never says 0 or 100 of what is only near it."""
    whole = round(100 * share)
    if whole == 0 and share > 0:
        return "less than 1 %"
    return "more than 99 %" if whole == 100 and share < 1 - 1e-9 else f"{whole} %"


def _difference(row: Mapping[str, Any], name: str, other: str) -> float | None:
    """Nats a token by which one rival is worse than another, as means over partitions; None when one is not known."""
    rivals = row.get("rivals") or {}
    first, second = (_number((rivals.get(key) or {}).get("mean_loss")) for key in (name, other))
    return None if first is None or second is None else first - second


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _list(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
