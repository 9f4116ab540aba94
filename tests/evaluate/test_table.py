"""What people see of a report."""

from __future__ import annotations

from typing import Any

from forge.evaluate.perplexity import Loss, figures
from forge.evaluate.table import Share, contribution_lines, evaluation_lines, shares
from forge.vocabulary import ALONE, ORACLE, OURS, SHARED, UNIFORM

KNOWN = figures([Loss(30.0, 10, 40), Loss(20.0, 10, 40)])
UNKNOWN = figures([Loss(), Loss()])


def row(experts: int, **more: Any) -> dict[str, Any]:
    return {"experts": experts, "partitions": [{"tokens": 1200}, {"tokens": 800}], **KNOWN,
            **{f"shared_{key}": value for key, value in KNOWN.items()}, **more}  # fmt: skip


def test_the_rows_of_a_run_and_the_rivals_of_its_last_model() -> None:
    names = [SHARED, ALONE.format(2), ALONE.format(10), UNIFORM, OURS, ORACLE]
    rivals = {name: KNOWN for name in sorted(names)}  # as JSON on disk has them
    samples = [{"partition": 0, "prompt": "The\n", "text": " sail", "seed": 0}]
    last = row(2, final=True, arrived=[2, 10], rivals=rivals, compared_tokens=1000, explanation=["One thing."] * 20,
               samples=samples)  # fmt: skip
    lines = evaluation_lines({"rows": [row(0), row(1), last]})
    assert lines[1] == "perplexity                       mean   pooled  bits/byte"
    assert lines[2] == "shared components alone         12.18    12.18     0.9017"
    assert [line[:18].strip() for line in lines[3:6]] == ["0 experts", "1 expert", "2 experts (final)"]
    assert lines[7] == "rivals, all on the same 1,000 of 2,000 tokens"
    assert [line[:28].strip() for line in lines[8:14]] == [
        "shared components alone", "expert 2 alone", "expert 10 alone", "uniform gate", "ours",
        "oracle: own expert for each",
    ]
    assert {len(line) for line in lines[1:6] + lines[8:14]} == {57}
    assert max(map(len, lines[15:-3])) <= 100 and " ".join(lines[15:-3]) == " ".join(["One thing."] * 20)
    assert lines[-2:] == ["sample, partition 0: 'The\\n'", "  -> ' sail'"]


def test_a_report_of_an_earlier_version_and_unknown_figures() -> None:
    old = {"experts": 1, "mean_perplexity": 9.5, "pooled_perplexity": 9.25, "pooled_bits_per_byte": None,
           "shared_mean_perplexity": 10.0}  # fmt: skip
    lines = evaluation_lines({"rows": [old]})
    assert lines[2].split() == ["shared", "components", "alone", "10.00", "-", "-"]
    assert lines[3].split() == ["1", "expert", "9.50", "9.25", "-"]
    assert "nan" not in "".join(evaluation_lines({"rows": [row(1, **UNKNOWN)]}))


def test_who_contributed_most_comes_first_and_who_is_not_measured_last() -> None:
    measured = [{"expert": expert, "nats": nats} for expert, nats in enumerate((0.01, 0.2, -0.005, None))]
    owners = {3: "new", 0: "laptop", 1: "desktop", 2: "laptop"}
    assert shares(owners, measured) == [("desktop", Share([1], 0.2)), ("laptop", Share([0, 2], 0.01 - 0.005)),
                                        ("new", Share([3], None))]  # fmt: skip
    assert shares(owners, None)[0] == ("laptop", Share([0, 2], None))
    assert contribution_lines([], {}) == ["No expert has arrived yet."]
    lines = contribution_lines(measured, owners)
    assert [" ".join(line.split()) for line in lines[2:]] == [
        "expert 1 0.2000", "expert 0 0.0100", "expert 2 -0.0050", "expert 3 -", "",
        "desktop 0.2000 expert 1", "laptop 0.0050 experts 0, 2", "new - expert 3"]  # fmt: skip
