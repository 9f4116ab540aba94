"""The coordinator's child processes are held to the memory that its operator gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coordinator.jobs import JobRunner
from forge.errors import MemoryBudgetError


def test_a_job_that_outgrows_the_coordinators_ram_is_ended(tmp_path: Path) -> None:
    ended: list[Any] = []
    runner = JobRunner(tmp_path / "jobs.log", lambda *job: ended.append(job), ram_bytes=48 << 20)
    with pytest.raises(MemoryBudgetError, match="48M"):  # An interpreter with torch is several times that.
        runner("evaluate", {"run_dir": str(tmp_path), "final": False}, lambda event: None)
    assert not ended
