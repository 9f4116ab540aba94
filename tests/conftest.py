from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
import shutil

import pytest

from tests import commands
from tests.commands import Outcome
from tests.disk import disk, why_not


@dataclass
class Road:
    """A finished run in `desk/run`, and what happened on a disk that was too small on the way."""

    desk: Path
    #: Where it was when the disk was full -> how `forge run` ended, and what was on the disk then.
    full: dict[str, tuple[Outcome, Mapping[str, str]]] = field(default_factory=dict)


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Road:
    """One `forge run` typed until it is through: the disk is enlarged each time that it was full."""
    road = Road(commands.write_inputs(tmp_path_factory.mktemp("desk")))
    if why_not():
        commands.worked(commands.run("forge run tiny.yaml --run-dir run --threads 1", road.desk))
        return road
    with disk(road.desk / "disk", "40k") as small:
        for where, size in (("prepare", "40k"), ("checkpoint", "160k"), ("nowhere", "8m")):
            small.remount(f"size={size}")
            outcome = commands.run("forge run tiny.yaml --run-dir disk/run --threads 1", road.desk, small)
            road.full[where] = outcome, commands.tree(small.seen)
        shutil.copytree(small.seen / "run", road.desk / "run")
    return road
