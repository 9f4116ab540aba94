"""Every `forge` command on a finished tiny run, as a person types it."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
import re
import shutil

from huggingface_hub import ModelCard
import pytest

from forge.publish.card import PLOTS
from forge.vocabulary import MANIFEST_FILE
from tests.commands import is_one_sentence, run, tree, worked
from tests.conftest import Road
from tests.fakes.hub import fake_hub


@pytest.mark.parametrize("program", ["forge", "forge-coordinator", "forge-node"])
def test_the_help_of_a_program_is_not_cut_off(program: str, tmp_path: Path) -> None:
    usage, *lines = worked(run(f"{program} -h", tmp_path)).out.splitlines()
    assert usage.startswith("Usage:") and not [line for line in lines if line.endswith("...")], lines


def test_what_is_finished_is_not_done_again(road: Road) -> None:
    before = tree(road.desk / "run")
    assert "tokens in run" in worked(run("forge prepare tiny.yaml --run-dir run", road.desk)).out
    assert "2 of 2 experts are in run/model" in worked(run("forge train tiny.yaml --run-dir run", road.desk)).out
    assert "2 of 2 experts are in run/model" in worked(run("forge assemble run", road.desk)).out
    assert tree(road.desk / "run") == before


def test_assemble_makes_a_lost_model_again(road: Road, tmp_path: Path) -> None:
    shutil.copytree(road.desk / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    assert "0 of 2 experts" in worked(run("forge assemble run", tmp_path)).out
    assert (tmp_path / "run" / "model" / "expert-001.safetensors").is_file()


def test_verify_finds_the_whole_lineage_of_a_run_of_one_machine(road: Road, tmp_path: Path) -> None:
    text = worked(run("forge verify run", road.desk)).out
    assert "data: corpus.safetensors" in text and "partition 1: train" in text and "verified" in text
    assert "2 of 2 experts were trained by the run's own machine: nobody signed them." in text
    shutil.copytree(road.desk / "run" / "model", tmp_path / "copy")
    worked(run("forge verify copy", tmp_path))
    router = tmp_path / "copy" / "router.safetensors"
    held = router.read_bytes()
    router.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    is_one_sentence(run("forge verify copy", tmp_path), "provenance", "router.safetensors was changed")


def test_evaluate(road: Road) -> None:
    text = json.loads(worked(run("forge evaluate run/model --data text.txt --json", road.desk)).out)
    assert text["documents"] == 1 and text["perplexity"] > 1
    is_one_sentence(run("forge evaluate run/model --data blank.txt", road.desk), "data", "no text", "another source")


def test_generate_is_a_function_of_its_seed_and_takes_a_run_or_its_model(road: Road) -> None:
    first, second = (run(f"forge generate {where} 'The sail' --max-tokens 4 --seed 3", road.desk)
                     for where in ("run", "run/model"))  # fmt: skip
    assert first.code == 0 and first.out.startswith("The sail") and first.out == second.out
    assert len(first.err.splitlines()) == 1 and "tokens/s" in first.err


def test_report_is_one_file_that_asks_for_nothing(road: Road, tmp_path: Path) -> None:
    assert "report.html (" in worked(run("forge report run", road.desk)).out
    page = (road.desk / "run" / "reports" / "report.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|@import|<script""", page), "the page loads something"
    images = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(images) == 3 and all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    rows = json.loads((road.desk / "run" / "reports" / "evaluation.json").read_text())["rows"]
    assert all(f"{row['mean_perplexity']:,.2f}" in page for row in rows)
    assert all(sentence in html.unescape(page) for sentence in rows[-1]["explanation"])

    shutil.copytree(road.desk / "run", tmp_path / "run")
    manifest = tmp_path / "run" / "model" / MANIFEST_FILE
    manifest_tree = json.loads(manifest.read_text())
    manifest_tree["experts"][0]["credit"]["node_name"] = "<script>alert(1)</script>"
    manifest.write_text(json.dumps(manifest_tree))
    worked(run("forge report run --output story.html", tmp_path))
    story = (tmp_path / "story.html").read_text()
    assert "<script" not in story and "&lt;script&gt;alert(1)" in story
    (tmp_path / "run" / "reports" / "evaluation.json").unlink()
    is_one_sentence(run("forge report run", tmp_path), "storage", "has not been evaluated yet")


def test_push(road: Road) -> None:
    with fake_hub() as hub:
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_good", "HF_HUB_DISABLE_XET": "1",
                    "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
        assert "me/tiny" in worked(run("forge push run/model me/tiny", road.desk, environment=settings)).out
        pushed = hub.repos["me/tiny"].head.tree
        assert hub.repos["me/tiny"].tags == {"experts-2-final": hub.repos["me/tiny"].head.oid}
        # The coordinator's command finds nothing to send, and makes a repository of its own, private.
        again = worked(run("forge-coordinator push me/tiny --run-dir run", road.desk, environment=settings)).out
        assert again.strip().endswith(hub.repos["me/tiny"].head.oid) and len(hub.repos["me/tiny"].commits) == 2
        worked(run("forge-coordinator push me/own --run-dir run --private", road.desk, environment=settings))
        own = hub.repos["me/own"].head.tree
        assert hub.repos["me/own"].private and own.keys() == pushed.keys()
        assert {path for path in own if own[path] != pushed[path]} == {"README.md"}  # It says how to load this repository.
        assert b"me/own" in own["README.md"][0] and b"me/own" not in pushed["README.md"][0]
        hub.tokens = set()
        is_one_sentence(run("forge push run/model me/tiny", road.desk, environment=settings), "hub", "token")
    for path in (road.desk / "run" / "model").iterdir():
        assert pushed[path.name][0] == path.read_bytes()
    card = pushed["README.md"][0].decode()
    assert "tiny" in card and ModelCard(card).data.eval_results
    for name in PLOTS:
        assert f"]({name})" in card and pushed[name][0] == (road.desk / "run" / "reports" / name).read_bytes()


@pytest.mark.parametrize(("command", "code", "words"), [
    ("forge evaluate nowhere", "storage", ["nowhere is not a run directory", "--data SOURCE"]),
    ("forge evaluate run --contributions --data text.txt", "config", ["leave --data out"]),
    ("forge evaluate run/model --contributions", "storage", ["run/model is not a run directory"]),
    ("forge generate nowhere", "storage", ["There is no nowhere", "a model directory or a run directory"]),
    ("forge generate run 'The' --max-tokens 1000", "config", ["do not fit in the model's context of 128"]),
    ("forge generate run 'The' --seed 99999999999999999999", "config", ["must fit in 64 bits"]),
    ("forge chat text.txt", "storage", ["text.txt is not a model directory"]),
    ("forge push text.txt me/tiny", "storage", ["text.txt is not a model directory"]),
    ("forge push run/model tiny", "config", ["'tiny' must look like USER/REPO"]),
    ("forge-coordinator push tiny", "config", ["'tiny' must look like USER/REPO"]),
    ("forge verify nowhere", "storage", ["nowhere is not there"]),
    ("forge verify run/data", "storage", ["run/data has no provenance.json", "forge assemble"]),
    ("forge assemble run/model", "storage", ["run/model is not a run directory"]),
])  # fmt: skip
def test_a_wrong_directory(command: str, code: str, words: list[str], road: Road) -> None:
    before = tree(road.desk)
    is_one_sentence(run(command, road.desk), code, *words)
    assert tree(road.desk) == before
