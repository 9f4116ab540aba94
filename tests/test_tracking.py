"""`--track`: what each tracker itself reads back of what it wrote."""

from __future__ import annotations

import ast
from collections.abc import Callable
import io
import os
from pathlib import Path
import shutil
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coordinator.console import watching
from forge.files import read_json
from forge.live import Output
from forge.tracking import tracking
from tests.commands import DOCUMENTED, Outcome, is_one_sentence, run, worked, write_inputs
from tests.conftest import Road
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
    # So many tokens that training takes seconds: it tells its progress twice a second.
    worked(run("forge run tiny.yaml train.shared.tokens=131072 --run-dir run --threads 1 --track tensorboard", tmp_path))
    found, rows = read(tmp_path / "run"), read_json(tmp_path / "run" / "reports" / "evaluation.json")["rows"]
    assert {"loss/shared", "loss/expert_0", "loss/expert_1", "tokens_per_second/shared"} <= set(found)
    losses = found["loss/shared"]
    assert [step for step, _ in losses] == sorted({step for step, _ in losses}) and losses[-1][1] < losses[0][1]
    assert [step for step, _ in found["perplexity/mean"]] == [0, 1, 2]
    assert [value for _, value in found["perplexity/mean"]] == pytest.approx([row["mean_perplexity"] for row in rows[:3]])


#: What trackio has in its database, read as its own page reads it.
TRACKIO = """
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("modularforge")
rows = [(row["step"], tag, row[tag]) for row in SQLiteStorage.get_logs("modularforge", name) for tag in row if "/" in tag]
"""
#: What is in the file that `wandb sync` sends: LevelDB's log format behind a header of seven bytes, in blocks of 32 KiB, whose
#: records (checksum, length, type) are messages of wandb's own protocol.
WANDB = """
import json, struct
from pathlib import Path
from wandb.proto.wandb_internal_pb2 import Record
(path,) = Path("run/wandb").glob("offline-run-*/*.wandb")
data, at, part, rows = path.read_bytes(), 7, b"", []
while at < len(data):
    if 32768 - at % 32768 < 7:
        at += 32768 - at % 32768
        continue
    _, length, kind = struct.unpack_from("<IHB", data, at)
    part += data[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):
        record, part = Record.FromString(part), b""
        items = {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        rows += [(items["step"], tag, items[tag]) for tag in items if "/" in tag]
"""


@pytest.mark.parametrize(("name", "reader"), [("trackio", TRACKIO), ("wandb", WANDB)])
def test_a_tracker_gets_every_value_once_and_keeps_it_here(name: str, reader: str, tmp_path: Path) -> None:
    written = f"""
from pathlib import Path
from forge.tracking import tracking
with tracking("{name}", Path("run")) as tracker:
    tracker.log(0, {{"loss/shared": None}})
    assert not list(Path("run").iterdir())
    for step, loss in ((1, 3.5), (2, 3.25), (2, 9.0)):
        tracker.log(step, {{"loss/shared": loss, "tokens_per_second/shared": None}})
    tracker.log(1, {{"loss/expert_0": 3.0}})
"""
    (tmp_path / "run").mkdir()
    shown = "print(*sorted(rows), sep=chr(10))"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "TRACKIO"))}
    environment |= {"HOME": str(tmp_path / "home"), "TRACKIO_DIR": str(tmp_path / "run" / "trackio")}
    outputs = [subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True,
                              check=True, env=environment).stdout for code in (written, reader + shown)]  # fmt: skip
    assert outputs[0] == ""
    assert [ast.literal_eval(line) for line in outputs[1].splitlines()] == [
        (1, "loss/expert_0", 3.0), (1, "loss/shared", 3.5), (2, "loss/shared", 3.25)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_the_same_command_on_a_finished_run_tells_a_tracker_of_it(name: str, road: Road, tmp_path: Path) -> None:
    shutil.copytree(road.desk / "run", tmp_path / "run")
    shutil.copy(road.desk / "tiny.yaml", tmp_path)
    worked(run(f"forge run tiny.yaml --run-dir run --threads 1 --track {name}", tmp_path))
    assert any(path.is_file() for path in (tmp_path / "run" / name).rglob("*"))


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
    assert outcome.code == DOCUMENTED["usage"] and "'sacred' is not one of 'tensorboard', 'trackio', 'wandb'" in outcome.err
