from __future__ import annotations

from coordinator.activity import Activity

from .fakes import Clock


def event(step: int, steps: int = 400) -> dict[str, object]:
    return {"step": step, "steps": steps, "loss": 3.0, "tokens_per_second": 10.0, "resident_bytes": 5, "message": None}


def test_the_sentence_says_how_far_and_how_long() -> None:
    clock = Clock()
    activity = Activity(clock)
    assert activity.snapshot().sentence == "preparing the data"
    activity.enter("shared")
    activity.progress(event(60))
    assert activity.snapshot().retry_seconds == 3.0
    clock.now += 60
    activity.progress(event(120))
    now = activity.snapshot()
    assert now.sentence == "training the shared components: step 120 of 400, about 5 min"
    assert now.retry_seconds == 15.0
    clock.now += 270
    activity.progress(event(399))
    assert activity.snapshot().sentence.endswith("step 399 of 400, about 1 s")
    assert activity.snapshot().retry_seconds == 1.0


def test_a_new_phase_forgets_the_old_progress() -> None:
    activity = Activity(Clock())
    activity.progress(event(60))
    activity.enter("experts")
    activity.say("validating expert 3")
    assert activity.snapshot().sentence == "taking experts: validating expert 3"


def test_the_memory_of_a_job_stands_beside_what_was_predicted_for_it() -> None:
    activity = Activity(Clock())
    activity.enter("shared", 900)
    assert (activity.snapshot().resident_bytes, activity.snapshot().predicted_bytes) == (0, 900)
    activity.progress({"plan": {"peak_bytes": 700, "smaller": True}})
    activity.progress(event(60))
    assert (activity.snapshot().resident_bytes, activity.snapshot().predicted_bytes) == (5, 700)
    activity.say("validating expert 3", 300)
    assert activity.snapshot().predicted_bytes == 300
    activity.say("")
    assert activity.snapshot().predicted_bytes == 0
