"""`--track tensorboard`: what TensorBoard itself reads back."""

from __future__ import annotations

from collections.abc import Callable
import io
from pathlib import Path
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coordinator.console import watching
from forge.files import read_json
from forge.live import Output
from forge.tracking import tracking
from tests.commands import DOCUMENTED, Outcome, is_one_sentence, run, worked, write_inputs
from tests.coordinator.conftest import World, make_world
from tests.coordinator.fakes import Clock, until

__all__ = ["make_world"]


@pytest.fixture
def clock() -> Clock:
    return Clock()


def read(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> points (step, value)."""
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_coordinator_tracks_its_nodes_and_the_model(make_world: Callable[[], World]) -> None:
    world = make_world()
    world.start()
    assert world.coordinator is not None
    node = world.node("laptop")
    lease = node.lease(2).lease_id
    for step, loss in ((5, 3.25), (6, 3.0)):
        node.heartbeat(lease, activity="training", step=step, steps=10, loss=loss, tokens_per_second=64.0)
        with tracking("tensorboard", world.root) as tracker:
            with watching(Output(io.StringIO(), live=False), world.coordinator.snapshot, None, tracker):
                until(lambda: world.coordinator is not None and bool(world.coordinator.snapshot()["evaluations"]))
    found = read(world.root)
    assert found["loss/expert_2"] == [(5, 3.25), (6, 3.0)]
    assert found["tokens_per_second/expert_2"] == [(5, 64.0), (6, 64.0)]
    (first, *_) = world.coordinator.snapshot()["evaluations"]
    ((experts, perplexity), *_) = found["perplexity/mean"]
    assert experts == 0 and perplexity == pytest.approx(first["mean_perplexity"])


@pytest.mark.slow
def test_a_run_is_tracked_from_the_shared_components_to_the_last_shard(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    worked(run("forge run tiny.yaml --run-dir run --threads 1 --track tensorboard", tmp_path))
    found, rows = read(tmp_path / "run"), read_json(tmp_path / "run" / "reports" / "evaluation.json")["rows"]
    assert {"loss/shared", "loss/expert_0", "loss/expert_1", "tokens_per_second/shared"} <= set(found)
    losses = found["loss/shared"]
    assert [step for step, _ in losses] == sorted({step for step, _ in losses}) and losses[-1][1] < losses[0][1]
    assert [step for step, _ in found["perplexity/mean"]] == [0, 1, 2]
    assert [value for _, value in found["perplexity/mean"]] == pytest.approx([row["mean_perplexity"] for row in rows[:3]])


@pytest.mark.parametrize(("program", "command"), [("forge.cli", ["run", "smoke"]),
                                                  ("coordinator.cli", ["serve", "--config", "smoke"])])  # fmt: skip
def test_a_tracker_that_is_not_installed_is_one_sentence_and_leaves_nothing(program: str, command: list[str],
                                                                           tmp_path: Path) -> None:  # fmt: skip
    hidden = f"import sys; sys.modules['tensorboard'] = None; from {program} import main; "
    code = hidden + f"main({[*command, '--track', 'tensorboard']})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    is_one_sentence(Outcome(done.returncode, done.stdout, done.stderr), "config", "pip install 'modularforge[tensorboard]'")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_an_unknown_tracker_is_a_wrong_option(tmp_path: Path) -> None:
    outcome = run("forge run smoke --track sacred", tmp_path)
    assert outcome.code == DOCUMENTED["usage"] and "'sacred' is not 'tensorboard'" in outcome.err
