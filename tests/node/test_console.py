from __future__ import annotations

import io

from node.console import Budget, Console
from node.messages import Progress

BUDGET = Budget(predicted=400 << 20, allowed=8 << 30)


def _training(step: int) -> Progress:
    return Progress(activity="training", step=step, steps=100, loss=4.1234, tokens_per_second=3210.0,
                    resident_bytes=300 << 20)  # fmt: skip


def test_plain_progress_is_one_line_every_few_seconds() -> None:
    now = [0.0]
    out = io.StringIO()
    console = Console(out, clock=lambda: now[0])
    for step in range(10, 21):
        console.progress("partition 3", _training(step), BUDGET)
        now[0] += 1.0
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[1] == ("partition 3: training, step 15/100 · loss 4.123 · 3,210 tokens/s · memory 300M "
                        "(predicted 400M, allowed 8.0G) · 1 min 25 s left")  # fmt: skip
    console.progress("partition 3", _training(100), BUDGET)
    assert "step 100/100" in out.getvalue().splitlines()[-1]


def test_the_same_wait_is_not_repeated_at_once() -> None:
    now = [0.0]
    out = io.StringIO()
    console = Console(out, clock=lambda: now[0])
    for pause in ("1.5", "2.7"):
        console.wait(f"waiting; trying again in {pause} s")
    assert len(out.getvalue().splitlines()) == 1
    now[0] = 31.0
    console.wait("waiting; trying again in 3.1 s")
    assert len(out.getvalue().splitlines()) == 2


def test_a_terminal_gets_a_live_line() -> None:
    out = io.StringIO()
    console = Console(out, live=True)
    console.progress("partition 3", _training(1), BUDGET)
    console.line("[bold] is not markup here")
    console.calm()
    assert "[bold] is not markup here" in out.getvalue()
