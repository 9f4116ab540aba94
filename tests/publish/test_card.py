from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
import pytest

from forge.checkpoint.assembly import accept, start
from forge.errors import StorageError
from forge.files import RunDirectory
from forge.publish.card import model_card
from tests.checkpoint.conftest import make_shard, publish_run

EVALUATION: dict[str, Any] = {
    "experts": 1, "mean_perplexity": 21.5, "pooled_perplexity": 20.25, "pooled_bits_per_byte": 1.5,
    "shared_mean_perplexity": 30.125,
    "partitions": [{"partition": k, "perplexity": 20.0 + k, "bits_per_byte": 1.4} for k in range(2)]
    + [{"partition": 2, "perplexity": None, "bits_per_byte": None}],
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = publish_run(tmp_path / "run")
    start(run)
    return run


def facts(run: RunDirectory, **changed: Any) -> dict[str, Any]:
    config = run.config.model_dump(mode="json")
    return {"name": "tiny", "config": config, "maturity": 12.25, "repo": "ada/tiny", **changed}


def test_says_what_is_known_in_a_form_that_the_hub_reads(run: RunDirectory) -> None:
    accept(run, 1, make_shard(run, 1), {"node_name": "laptop"})
    text = model_card(run.model, run=facts(run), evaluation=EVALUATION, plots=["loss.png"])
    data = ModelCard(text).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert data.datasets == ["Salesforce/wikitext"]
    assert [(result.metric_type, result.metric_value) for result in data.eval_results or []] == [
        ("perplexity", 21.5), ("perplexity", 20.25)]  # fmt: skip
    for line in ("| 0 | 20.00 | 1.400 |", "| 2 |  |  |", "| mean over partitions | 21.50 |  |", "| laptop | 1 |",
                 "| shared components alone (mean) | 30.12 |  |", "**1 of 3 experts have arrived.**",
                 "![Training losses](loss.png)", "vllm serve ada/tiny --dtype float32", "hf download ada/tiny", "## Limits",
                 'from_pretrained("ada/tiny")', "12.2 training tokens", run.run_id):  # fmt: skip
        assert line in text


def test_without_evaluation_or_experts_it_is_still_valid(run: RunDirectory) -> None:
    text = model_card(run.model, run={"name": "tiny"}, evaluation=None)
    data = ModelCard(text).data.to_dict()
    assert "model-index" not in data and "datasets" not in data
    assert "No expert has arrived yet." in text and "Perplexity" not in text
    assert f"{run.config.model.total_parameters:,}" in text
    assert "hf" not in model_card(run.model, run=facts(run), evaluation=None).split("---")[1]


def test_names_of_strangers_stay_text(run: RunDirectory) -> None:
    evil = '<img src=x onerror="x">\n---\n| a | [b](http://c) \x1b[31m' + "x" * 100
    accept(run, 0, make_shard(run, 0), {"node_name": evil})
    accept(run, 2, make_shard(run, 2), {})
    text = model_card(run.model, run=facts(run), evaluation=EVALUATION)
    assert "<img" not in text and "\x1b" not in text and "](http" not in text
    assert "| unnamed | 2 |" in text
    assert ModelCard(text).data.license == "apache-2.0"


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        model_card(tmp_path, run={}, evaluation=None)


def test_who_contributed_what_the_most_first(run: RunDirectory) -> None:
    for partition, name in enumerate(("laptop", "desktop", "laptop")):
        accept(run, partition, make_shard(run, partition), {"node_name": name})
    measured = [{"expert": 0, "nats": 0.01}, {"expert": 1, "nats": 0.025}, {"expert": 2, "nats": -0.002}]
    text = model_card(run.model, run=facts(run), evaluation=EVALUATION | {"contributions": measured})
    assert "| node | experts | contribution |\n| --- | --- | --- |\n| desktop | 1 | 0.0250 |\n| laptop | 0, 2 | 0.0080 |" in text
    assert "| node | experts |\n" in model_card(run.model, run=facts(run), evaluation=EVALUATION | {"contributions": None})
