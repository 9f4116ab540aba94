"""lm-eval, unmodified, on an assembled model of ours: its likelihoods are ours. Nothing leaves this machine."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import yaml

from forge.checkpoint.assembly import accept, start
from forge.data.tokenizer import load_tokenizer
from forge.evaluate.perplexity import measure
from forge.evaluate.text import evaluate_text
from forge.model.moe import MixtureLM
from tests.checkpoint.conftest import TINY, make_shard, publish_run

CONTEXT = TINY["model"]["max_seq_len"]
#: The tokenizer has a token a byte, so the last text fills two windows exactly. (In a window that a text does not fill,
#: lm-eval goes back for more context, which we do not.)
TEXTS = ["a first text of a few words", "déjà vu,  twice\nand again", ("one window and another " * 6)[: 2 * CONTEXT - 1] + "."]
QUESTIONS = [{"question": "The sail and the", "choices": ["anchor", "oven"], "answer": 0},
             {"question": "Butter:", "choices": ["a comet", "an onion"], "answer": 1}]  # fmt: skip


#: `lm_eval --model hf --tasks ... --include_path ...`, without reading the thousands of tasks that come with it.
HARNESS = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

model, desk = sys.argv[1:]
found = lm_eval.simple_evaluate(model="hf", model_args=f"pretrained={model},dtype=float32", tasks=["local_texts", "local_choice"],
                                task_manager=TaskManager(include_path=desk, include_defaults=False), device="cpu", batch_size=1)
with open(f"{desk}/out.json", "w") as file:
    json.dump({key: found[key] for key in ("results", "samples")}, file, default=str)
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts have arrived, the third is the shared FFN."""
    run = publish_run(tmp_path_factory.mktemp("lm-eval") / "run")
    start(run)
    for partition in (0, 2):
        accept(run, partition, make_shard(run, partition), {})
    return run.model


@pytest.fixture(scope="module")
def harness(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What lm-eval, in a process of its own, found on two tasks that are files of this test."""
    desk = tmp_path_factory.mktemp("harness")
    data: dict[str, list[dict[str, Any]]] = {"texts": [{"text": text} for text in TEXTS], "choice": QUESTIONS}
    common = {"dataset_path": "json", "test_split": "test"}
    tasks: dict[str, dict[str, Any]] = {
        "texts": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                  "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}]},
        "choice": {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
                   "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}]},
    }  # fmt: skip
    for name, task in tasks.items():
        file = desk / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in data[name]))
        (desk / f"{name}.yaml").write_text(yaml.safe_dump(
            {"task": f"local_{name}", "dataset_kwargs": {"data_files": {"test": str(file)}}, **common, **task}))  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(desk / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", HARNESS, str(model_dir), str(desk)], cwd=desk, env={**os.environ, **offline},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads((desk / "out.json").read_text()))


def results(harness: dict[str, Any], task: str) -> dict[str, Any]:
    return {key.removesuffix(",none"): value for key, value in harness["results"][task].items()}


@pytest.mark.slow
def test_its_perplexities_are_ours(model_dir: Path, harness: dict[str, Any]) -> None:
    theirs, ours = results(harness, "local_texts"), evaluate_text(model_dir, TEXTS)
    nats, words = ours["loss"] * ours["tokens"], sum(len(text.split()) for text in TEXTS)
    assert ours["tokens"] == ours["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert theirs["bits_per_byte"] == pytest.approx(ours["bits_per_byte"], rel=1e-5)
    assert theirs["byte_perplexity"] == pytest.approx(2 ** ours["bits_per_byte"], rel=1e-5)
    assert theirs["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-4)


@pytest.mark.slow
def test_its_choices_are_ours(model_dir: Path, harness: dict[str, Any]) -> None:
    model, tokenizer = MixtureLM.load(model_dir), load_tokenizer(model_dir / "tokenizer.json")

    def nats(text: str) -> float:
        return measure(model, [np.array(tokenizer.encode(text).ids)]).nats

    right = []
    for sample in harness["samples"]["local_choice"]:
        question = sample["doc"]["question"]
        ours = [nats(question) - nats(f"{question} {choice}") for choice in sample["doc"]["choices"]]
        assert [float(likelihood) for likelihood, _ in sample["filtered_resps"]] == pytest.approx(ours, rel=1e-5)
        right.append(ours.index(max(ours)) == sample["doc"]["answer"])
    assert len(right) == len(QUESTIONS)
    assert results(harness, "local_choice")["acc"] == pytest.approx(sum(right) / len(right))
