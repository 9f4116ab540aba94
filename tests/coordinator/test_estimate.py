from __future__ import annotations

from typing import Any

from coordinator.activity import Snapshot
from coordinator.estimate import estimate
from coordinator.records import PartitionRecord, PartitionState
from forge.config import parse_config

#: A step is 4 x 32 = 128 tokens; an expert has 10 steps.
CONFIG = parse_config({
    "name": "tiny", "model": {"vocab_size": 260, "d_model": 16, "n_layers": 1, "n_heads": 2, "n_experts": 4, "max_seq_len": 32},
    "train": {"batch_size": 4, "shared": {"tokens": 1000}, "expert": {"tokens": 1280}}})  # fmt: skip
EXPERTS = Snapshot(phase="experts")


def part(number: int, state: PartitionState, **progress: Any) -> PartitionRecord:
    return PartitionRecord(id=number, state=state, tokens=10, shared_loss=3.0, loss=None, node_name="n", progress=progress)


def training(number: int, step: int, pace: float) -> PartitionRecord:
    return part(number, "leased", activity="training", step=step, steps=10, tokens_per_second=pace)


def test_a_stage_says_its_pace_and_what_comes_after_it() -> None:
    told = estimate(Snapshot(phase="router", step=2, steps=4, remaining=120.0, tokens_per_second=1500.0), CONFIG, [])
    assert told.seconds == 120 and told.until == "the end of this phase"
    assert told.because == ("Step 2 of 4 at 1,500 tokens/s: 2 min at this pace; after that come publish and 4 experts, whose "
                            "time is known when nodes train.")  # fmt: skip
    assert estimate(Snapshot(phase="prepare"), CONFIG, []).seconds is None


def test_the_slowest_node_decides() -> None:
    told = estimate(EXPERTS, CONFIG, [part(0, "accepted"), training(1, 5, 64.0), training(2, 5, 128.0)])
    assert told.seconds == 10.0
    assert told.because == ("1 of 3 experts is accepted; 2 experts are with 2 nodes, the slowest with 10 s to go at its pace; "
                            "validation and evaluation come on top.")  # fmt: skip


def test_open_experts_go_to_whoever_is_free_first() -> None:
    # Free in 10 and in 5 s; the median pace takes an expert in 1280 / 96 s: the open one begins after 5 s.
    told = estimate(EXPERTS, CONFIG, [training(0, 5, 64.0), training(1, 5, 128.0), part(2, "open")])
    assert told.seconds is not None and abs(told.seconds - (5 + 1280 / 96)) < 1e-9
    assert "1 expert is open, and a node takes the next one as soon as it is free" in told.because


def test_evaluations_queue_up_behind_each_other() -> None:
    quick = [training(k, 9, 12800.0) for k in range(3)]
    told = estimate(EXPERTS, CONFIG, quick, 30.0)
    assert told.seconds == 90.0 and "evaluating the model takes 30 s after each" in told.because
    assert estimate(EXPERTS, CONFIG, [part(0, "uploaded")], 30.0).seconds == 30.0


def test_what_nobody_can_tell_is_not_told() -> None:
    for parts, words in (
            ([part(0, "open"), part(1, "open")], "2 experts are open and no node is at work, so the time cannot be told"),
            ([part(0, "leased", activity="downloading", step=1, steps=2)], "1 expert is with 1 node without a pace yet"),
            ([part(0, "leased", activity="uploading", step=1, steps=2), part(1, "open")], "1 expert is open, and"),
            ([training(0, 1, 1e-300), part(1, "open")], "without a pace yet"),
            ([part(0, "uploaded")], "1 shard is in validation or waits for it")):  # fmt: skip
        told = estimate(EXPERTS, CONFIG, parts)
        assert told.seconds is None and words in told.because, told


def test_a_finished_run_takes_no_time() -> None:
    assert estimate(Snapshot(phase="done"), CONFIG, []).seconds == 0.0
