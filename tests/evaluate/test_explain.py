"""The sentences about a router: known reports, edges, and any report at all."""

from __future__ import annotations

from collections.abc import Mapping
import math
import re
from types import MappingProxyType
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from forge.evaluate.explain import explain, percent
from forge.vocabulary import ALONE, ORACLE, OURS, SHARED, UNIFORM

EVEN = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]


def row(matrix: list[list[float]] = EVEN, *, accuracy: float = 0.87, tokens: list[int] | None = None,
        arrived: list[int] | None = None, losses: Mapping[str, float] = MappingProxyType({})) -> dict[str, Any]:  # fmt: skip
    known = {SHARED: 3.7, UNIFORM: 3.65, OURS: 3.512, ORACLE: 3.5, **losses}
    return {
        "arrived": arrived,
        "router": {"token_accuracy": accuracy, "layers": [{"token_accuracy": accuracy, "matrix": matrix}]},
        "partitions": [{"tokens": count} for count in tokens or [100] * len(matrix)],
        "rivals": {name: {"mean_loss": loss} for name, loss in known.items()},
    }


def test_a_router_that_does_its_work() -> None:
    assert explain(row()) == [
        "The router sends 87 % of the tokens first to their partition's expert; the gap to the oracle is 0.012 nats, 6 % of "
        "what the oracle gains.",
        "The mixture is 0.188 nats better than the shared components alone.",
        "Choosing experts gains 0.138 nats over giving every expert the same weight.",
        "The experts take 33 % of the tokens each, in keeping with what their partitions hold.",
    ]


def test_a_perfect_router() -> None:
    matrix = [[1.0, 0.0], [0.0, 1.0]]
    first, *_ = explain(row(matrix, accuracy=1.0, losses={OURS: 3.5}))
    assert first == ("The router sends 100 % of the tokens first to their partition's expert; the mixture is as good as the "
                     "oracle, which knows each document's partition.")  # fmt: skip


def test_a_router_that_beats_the_oracle_and_one_that_loses_more_than_it_could_gain() -> None:
    assert "the mixture is 0.010 nats better than the oracle" in explain(row(losses={OURS: 3.49}))[0]
    worse = explain(row(losses={OURS: 3.75}))
    assert "the gap to the oracle is 0.250 nats, more than the oracle gains." in worse[0]
    assert "The mixture is 0.050 nats worse than the shared components alone." in worse
    assert any("every expert the same weight would be 0.100 nats better" in sentence for sentence in worse)


def test_a_router_that_guesses() -> None:
    sentences = explain(row(accuracy=1 / 3, losses={SHARED: 3.512, UNIFORM: 3.512}))
    assert "no more than by chance" in sentences[0] and "nats, 6" not in sentences[0]
    assert "The experts gain nothing over the shared components alone." in sentences
    assert any("would be as good: the router's choices do not help" in sentence for sentence in sentences)


def test_an_expert_whose_partition_overlaps_with_another() -> None:
    matrix = [[0.9, 0.1, 0.0, 0.0], [0.0, 0.9, 0.1, 0.0], [0.0, 0.1, 0.88, 0.02], [0.0, 0.71, 0.13, 0.16]]
    (sentence,) = [sentence for sentence in explain(row(matrix)) if "Expert 3" in sentence]
    assert sentence == ("Expert 3 takes 4 % of the tokens, and its partition holds 25 % of them: it overlaps with partition 1, "
                        "whose expert takes 71 % of its tokens.")  # fmt: skip


def test_a_dead_expert() -> None:
    sentences = explain(row([[1.0, 0.0], [1.0, 0.0]]))
    assert any(sentence.startswith("Expert 1 is all but unused: it takes 0 % of the tokens") for sentence in sentences)


def test_partitions_that_are_not_told_apart_and_an_expert_that_serves_others() -> None:
    sentences = explain(row([[0.4, 0.6, 0.0], [0.2, 0.8, 0.0], [0.0, 0.1, 0.9]]))
    assert any(sentence == "Partition 0 is not told apart from partition 1, whose expert takes 60 % of its tokens, and expert "
               "0 only 40 %." for sentence in sentences)  # fmt: skip
    sentences = explain(row([[0.6, 0.4], [0.05, 0.95]], tokens=[900, 100]))
    assert ("Expert 1 takes 46 % of the tokens, and its partition holds only 10 % of them: it serves other partitions too."
            in sentences)  # fmt: skip


def test_only_the_worst_experts_are_named() -> None:
    matrix = [[1.0] + [0.0] * 7 for _ in range(8)]
    sentences = explain(row(matrix))
    assert sum("all but unused" in sentence for sentence in sentences) == 3
    assert "5 more experts stand out like that." in sentences


def test_experts_that_have_not_arrived() -> None:
    assert explain(row(arrived=[])) == ["No expert has arrived: all are the shared FFN, so the model is the shared components, "
                                        "whatever the router decides."]  # fmt: skip
    assert "Expert 1 has not arrived: the shared FFN in its place takes 33 % of the tokens." in explain(row(arrived=[0, 2]))
    sentences = explain(row(arrived=[0]))
    assert "Experts 1 and 2 have not arrived: the shared FFN in their place takes 67 % of the tokens." in sentences
    assert not any("Expert 1 takes" in sentence or "Partition 1" in sentence for sentence in sentences)


def test_one_expert_has_nothing_to_decide() -> None:
    assert explain(row([[1.0]], accuracy=1.0)) == [
        "There is one expert, so the router has nothing to decide.",
        "The mixture is 0.188 nats better than the shared components alone.",
    ]


def test_partitions_without_tokens() -> None:
    matrix = [[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.0, 0.0, 0.0]]
    sentences = explain(row(matrix, tokens=[50, 50, 0]))
    assert "Partition 2 has no held-out tokens, so nothing is known there." in sentences
    assert not any("Expert 2" in sentence for sentence in sentences)
    assert explain(row(tokens=[0, 0, 0])) == ["The router was not measured: there are no held-out tokens."]


def test_an_expert_that_another_one_beats_at_home() -> None:
    report = row()
    for expert, losses in enumerate(([3.4, 3.6, 3.9], [3.5, 3.65, 3.9], [3.6, None, 3.5])):
        report["rivals"][ALONE.format(expert)] = {"mean_loss": 3.6, "losses": losses}
    (sentence,) = [sentence for sentence in explain(report) if "alone is better" in sentence]
    assert sentence.startswith("On partition 1, expert 0 alone is better than its own, 3.600 nats against 3.650")


def test_layers_that_differ() -> None:
    report = row()
    report["router"]["layers"] = [{"token_accuracy": accuracy, "matrix": EVEN} for accuracy in (0.71, 0.9, 0.85)]
    assert explain(report)[-1] == "The router is right least often in layer 0 (71 %) and most often in layer 1 (90 %)."


@pytest.mark.parametrize(("share", "text"), [
    (0, "0 %"), (0.001, "less than 1 %"), (0.25, "25 %"), (0.999, "more than 99 %"), (1, "100 %")])
def test_a_share_near_nothing_or_all_is_not_called_so(share: float, text: str) -> None:
    assert percent(share) == text


SHARES = st.floats(0, 1)
LOSSES = st.none() | st.floats(0, 20) | st.just(math.nan)


@st.composite
def reports(draw: st.DrawFn) -> dict[str, Any]:
    """A row as `evaluate_model` makes it, of any size and any numbers, with fields missing or null."""
    experts = draw(st.integers(1, 6))
    partitions = draw(st.integers(1, experts))

    def line() -> list[float]:
        weights = [draw(SHARES) for _ in range(experts)]
        return [weight / sum(weights) if sum(weights) > 1e-9 else 0.0 for weight in weights]

    layers = [{"token_accuracy": draw(st.none() | SHARES), "matrix": [line() for _ in range(partitions)]}
              for _ in range(draw(st.integers(0, 3)))]  # fmt: skip
    names = [SHARED, UNIFORM, OURS, ORACLE, *(ALONE.format(expert) for expert in range(experts))]
    rivals = {name: draw(st.none() | st.fixed_dictionaries({"mean_loss": LOSSES, "losses": st.lists(
        LOSSES, min_size=partitions, max_size=partitions)})) for name in names if draw(st.booleans())}  # fmt: skip
    row = {
        "arrived": draw(st.none() | st.lists(st.integers(0, experts - 1), unique=True).map(sorted)),
        "router": draw(st.sampled_from([{"token_accuracy": draw(st.none() | SHARES), "layers": layers}] * 4 + [None])),
        "partitions": [{"tokens": draw(st.none() | st.integers(0, 1000))} for _ in range(partitions)],
        "rivals": draw(st.sampled_from([rivals] * 4 + [None])),
    }
    return {key: value for key, value in row.items() if value is not None or draw(st.booleans())}


@settings(max_examples=300, deadline=None)
@given(reports())
def test_any_report_gives_whole_sentences(report: dict[str, Any]) -> None:
    sentences = explain(report)
    assert sentences and sentences == explain(report)
    for sentence in sentences:
        assert re.fullmatch(r"[A-Z0-9].*\.", sentence), sentence
        assert not re.search(r"nan|inf\b|None|-\d|  ", sentence), sentence
        assert all(int(share) <= 100 for share in re.findall(r"(\d+) %", sentence)), sentence
