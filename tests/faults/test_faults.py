"""A part of the sweep, another part in every hour: `make test-faults` runs all of it."""

from __future__ import annotations

import os
import time

import pytest

from .sweep import sweep

#: About one point in so many; a run takes a few seconds, and minutes where its coordinator waits for who was killed last.
EVERY = 150


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_coordinator_or_node_killed_anywhere_loses_nothing() -> None:
    offset = int(time.time() // 3600)
    outcomes = sweep(EVERY, jobs=2, offset=offset)
    wrong = [f"{outcome.role}, {outcome.point}: {sentence}" for outcome in outcomes for sentence in outcome.wrong]
    assert not wrong, "\n".join([f"with offset {offset}:", *wrong])
    assert len(outcomes) >= 5
