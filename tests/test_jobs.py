"""Jobs as real processes: results, errors with their class, and death of either side."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import psutil
import pytest

from forge import pipeline
from forge.config import load_config
from forge.errors import DataError, ForgeError, MemoryBudgetError
from forge.files import RunDirectory
from forge.jobs import Job
from forge.train.memory import candidates
from tests import expert_work


def _broken_run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(tmp_path / "run", load_config("smoke", [f"data.source={tmp_path}/none.txt"]))


def _wait_until(condition: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "the awaited state never came"
        time.sleep(0.02)


def test_an_error_in_the_child_keeps_its_class(tmp_path: Path) -> None:
    run = _broken_run(tmp_path)
    with pytest.raises(DataError, match=r"none\.txt"):
        Job("stage", {"run_dir": str(run.root), "stage": "prepare"}).result()


def test_a_finished_stage_answers_from_its_marker(tmp_path: Path) -> None:
    run = _broken_run(tmp_path)
    run.finish("prepare", {"documents": 7})
    job = Job("stage", {"run_dir": str(run.root), "stage": "prepare"})
    assert job.result()["documents"] == 7


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP")
@pytest.mark.parametrize(("policy", "spins"), [(None, "5000"), ("active", "30000000000")])
def test_threads_wait_for_each_other_asleep_unless_the_user_wants_it_otherwise(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str | None, spins: str) -> None:  # fmt: skip
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)  # Of a command that was tried in this process.
    if policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    run = _broken_run(tmp_path)
    run.finish("prepare", {})
    with suppress(ForgeError):  # There are no tokens, which is seen when PyTorch is there.
        Job("stage", {"run_dir": str(run.root), "stage": "shared"}, log=tmp_path / "log").result()
    assert f"GOMP_SPINCOUNT = '{spins}'" in (tmp_path / "log").read_text()


def test_a_killed_child_is_an_error_that_says_so(tmp_path: Path) -> None:
    job = Job("stage", {"run_dir": str(tmp_path), "stage": "prepare"}, log=tmp_path / "log")
    os.kill(job.pid, signal.SIGKILL)
    with pytest.raises(ForgeError, match="killed by SIGKILL"):
        job.result()


#: A job that is killed when the pipe has taken a part of an event.
_TORN_JOB = """
import os, signal, threading, time
from forge import pipeline

def torn(arguments, progress, should_stop):
    progress(message="a whole event")
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
    progress(message="x" * (1 << 24), step=1, steps=1)

pipeline.JOBS["torn"] = torn
"""


def test_a_child_that_is_killed_as_it_writes_an_event_is_an_error_that_says_so(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (tmp_path / "sitecustomize.py").write_text(_TORN_JOB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = Job("torn", {}, log=tmp_path / "log")
    messages = []
    for event in job.events():
        messages.append(event["message"])
        time.sleep(2.0)  # Nobody reads meanwhile: the pipe is full.
    assert messages == ["a whole event"]
    with pytest.raises(ForgeError, match="killed by SIGKILL"):
        job.result()


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    code = ("import sys, time; from forge.jobs import Job; import subprocess; "
            "p = subprocess.Popen([sys.executable, '-c', "
            "'import sys, threading; from forge.jobs import _watch_parent; _watch_parent(threading.Event())'], "
            "stdin=subprocess.PIPE); print(p.pid, flush=True); time.sleep(60)")  # fmt: skip
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


# Memory ---------------------------------------------------------------------------------------------------------------


def _train(directory: Path, assignment: dict[str, Any], limit: int | None) -> tuple[dict[str, Any], list[str], list[float]]:
    """Train an expert within a limit that its plan knows nothing of: its result, its messages, its losses."""
    arguments = {"assignment": assignment, "work_dir": str(directory), "ram_bytes": 8 << 30, "device": "cpu"}
    job = Job("train-expert", arguments, threads=1, ram_bytes=limit, log=directory.with_suffix(".log"))
    messages = [event["message"] for event in job.events() if event["message"]]
    result = job.result()
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return result, messages, [json.loads(line)["loss"] for line in lines]


def test_training_that_outgrows_its_limit_goes_on_smaller_to_the_same_losses(tmp_path: Path) -> None:
    assignment = expert_work.assignment(tmp_path / "files")
    largest, second, *_ = candidates(expert_work.CONFIG, "expert")
    free, messages, losses = _train(tmp_path / "free", assignment, None)
    assert messages == [] and free["predicted_bytes"] == largest.peak_bytes
    # The watchdog asks at 97 % of it, which lies well between what the two plans hold.
    limit = free["peak_bytes"] - (largest.peak_bytes - second.peak_bytes) // 4
    held, messages, held_losses = _train(tmp_path / "held", assignment, limit)
    assert held["finished"] and held["predicted_bytes"] == second.peak_bytes and held["peak_bytes"] < limit
    assert len(messages) == 1 and "Training partition 1 held" in messages[0] and "with a smaller plan" in messages[0]
    assert len(losses) == len(held_losses) == 4
    np.testing.assert_allclose(held_losses, losses, rtol=0, atol=1e-4)


#: A job that holds as much as its plan says, in place of training: what holds less is found at once and stays steady.
_HOLDING_JOB = """
import json, pathlib, time
from forge import pipeline
from forge.system import resident_bytes

def hold(arguments, progress, should_stop):
    plans = [size for size in arguments["plans"] if size <= arguments["ram_bytes"]]
    checkpoint = pathlib.Path(arguments["checkpoint"])
    step = int(checkpoint.read_text()) if checkpoint.is_file() else 0
    progress(plan={"peak_bytes": plans[0], "smaller": len(plans) > 1})
    held = []
    while resident_bytes() < plans[0]:
        held.append(bytes(b"x" * (1 << 19)))
    first = step
    while step < arguments["steps"] and not should_stop():
        time.sleep(0.01)
        step += 1
    checkpoint.write_text(str(step))
    return {"finished": step == arguments["steps"], "step": step, "first": first, "plan": plans[0]}

pipeline.JOBS["hold"] = hold
"""


@pytest.fixture
def holding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """Start the job `hold` in a real child process; sizes in MB."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(_HOLDING_JOB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"))

    def start(plans: list[int], limit: int, steps: int = 100) -> Job:
        arguments = {"plans": [size << 20 for size in plans], "ram_bytes": 1 << 40, "steps": steps,
                     "checkpoint": str(tmp_path / "step")}  # fmt: skip
        return Job("hold", arguments, ram_bytes=limit << 20, log=tmp_path / "log")

    return start


def test_training_near_its_limit_is_asked_to_stop_and_loses_no_step(holding: Callable[..., Job]) -> None:
    job = holding([198, 150], limit=200, steps=500)
    first = job.pid
    messages = [event["message"] for event in job.events() if event["message"]]
    result = job.result()
    assert result["finished"] and result["plan"] == 150 << 20 and result["first"] > 0, "it went on where it was asked to stop"
    assert len(messages) == 1 and job.pid != first and 194 << 20 < job.peak_rss < 200 << 20


def test_the_smallest_plan_may_come_near_the_limit(holding: Callable[..., Job]) -> None:
    job = holding([198], limit=200)
    assert [event["message"] for event in job.events() if event["message"]] == []
    assert job.result()["finished"]


def test_every_plan_is_tried_before_the_sentence(holding: Callable[..., Job]) -> None:
    job = holding([300, 250, 220], limit=200, steps=10**6)
    messages = [event["message"] for event in job.events() if event["message"]]
    assert len(messages) == 2
    with pytest.raises(MemoryBudgetError, match=r"The hold stage used 2\d\dM, more than the 200M .*its checkpoint is kept"):
        job.result()


def test_a_job_that_is_to_finish_stops_at_its_checkpoint_with_the_next_plan(holding: Callable[..., Job]) -> None:
    job = holding([300, 150], limit=200, steps=10**6)
    for event in job.events():
        if event["message"]:
            job.finish()
    result = job.result()
    assert result["finished"] is False and result["plan"] == 150 << 20


def test_a_job_that_is_asked_to_finish_near_its_limit_does_not_begin_again(holding: Callable[..., Job]) -> None:
    job = holding([198, 150], limit=200, steps=10**6)
    job.finish()
    assert [event["message"] for event in job.events() if event["message"]] == []
    assert job.result()["finished"] is False


def test_no_smaller_plan_is_the_sentence_that_names_a_limit(tmp_path: Path) -> None:
    assignment = expert_work.assignment(tmp_path / "files")
    *_, smallest = candidates(expert_work.CONFIG, "expert")
    arguments = {"assignment": assignment, "work_dir": str(tmp_path / "w"), "ram_bytes": smallest.peak_bytes, "device": "cpu"}
    sentence = rf"partition 1 used {expert_work.USED}, more than the 100M that --ram allows.* --ram \d+M"
    with pytest.raises(MemoryBudgetError, match=sentence):
        Job("train-expert", arguments, threads=1, ram_bytes=100 << 20, log=tmp_path / "log").result()


def test_a_stage_that_outgrows_its_limit_ends_with_the_same_sentence(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path / "run", load_config("smoke"))  # Text enough to be looked at while it lasts.
    with pytest.raises(MemoryBudgetError, match=r"The prepare stage used \d+M, more than the 24M"):
        pipeline.call("stage", {"run_dir": str(run.root), "stage": "prepare"}, lambda event: None, 1, 24 << 20)
    assert run.marker("prepare") is None


def test_a_killed_job_does_not_begin_again(tmp_path: Path) -> None:
    assignment = expert_work.assignment(tmp_path / "files")
    arguments = {"assignment": assignment, "work_dir": str(tmp_path / "w"), "ram_bytes": 8 << 30, "device": "cpu"}
    job = Job("train-expert", arguments, threads=1, log=tmp_path / "log")
    first = job.pid
    for event in job.events():
        if event.get("plan"):
            job.kill()
    with pytest.raises(ForgeError, match="killed by SIGKILL"):
        job.result()
    assert job.pid == first
