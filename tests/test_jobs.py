"""Jobs as real processes: results, errors with their class, and death of either side."""

from __future__ import annotations

import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import psutil
import pytest

from forge.config import load_config
from forge.errors import DataError, ForgeError
from forge.files import RunDirectory
from forge.jobs import Job


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


def test_a_killed_child_is_an_error_that_says_so(tmp_path: Path) -> None:
    job = Job("stage", {"run_dir": str(tmp_path), "stage": "prepare"}, log=tmp_path / "log")
    os.kill(job.pid, signal.SIGKILL)
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
