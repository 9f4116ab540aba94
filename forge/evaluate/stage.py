"""The evaluation of a run after each shard: a row in reports/evaluation.json, and the plots."""

from __future__ import annotations

from typing import Any

from forge.checkpoint.assembly import arrived
from forge.evaluate.plots import loss_curves, perplexity_plot, router_heat_map
from forge.evaluate.report import evaluate_model
from forge.evaluate.validation import load_shared, partition_loss
from forge.files import RunDirectory, read_json, write_json
from forge.train.loop import Progress
from forge.vocabulary import END_OF_TEXT_ID


def evaluate_run(run: RunDirectory, *, final: bool, progress: Progress) -> dict[str, Any]:
    """Measure the assembled model on the test documents of every partition and add a row to the report.

    Idempotent: a row for the same experts is replaced.

    Returns:
        The new row of `reports/evaluation.json`.
    """
    published, config = run.marker("publish"), run.config
    assert published is not None, "the publish stage comes before"
    experts = sorted(arrived(run.model))
    tests = [run.blobs.path(file["test"]["sha256"]) for file in published["partitions"]]
    calibration = None
    if final and config.assembly.calibrate_norms:
        from forge.checkpoint.calibrate import calibrate

        validation = [run.blobs.path(file["validation"]["sha256"]) for file in published["partitions"]]
        calibration = calibrate(run.model, validation, END_OF_TEXT_ID, config.model.max_seq_len, config.evaluation.tokens)
    report = _report(run)
    if report["shared_losses"] is None:
        report["shared_losses"] = _shared_losses(run, published)
    row = evaluate_model(run.model, tests, run.data / "tokenizer.json", config.evaluation, final=final,
                         shared_losses=report["shared_losses"], experts=len(experts), progress=progress)  # fmt: skip
    row |= {"arrived": experts, "calibration": calibration}
    report["rows"] = [old for old in report["rows"] if old["arrived"] != experts] + [row]
    write_json(run.reports / "evaluation.json", report)
    _draw(run, report["rows"])
    return row


def _shared_losses(run: RunDirectory, published: dict[str, Any]) -> list[float | None]:
    """A function of its own so that the dense model is gone before the assembled one is loaded."""
    shared = load_shared(run)
    return [partition_loss(run, shared, file["test"]["sha256"]) for file in published["partitions"]]


def _report(run: RunDirectory) -> dict[str, Any]:
    path = run.reports / "evaluation.json"
    return dict(read_json(path)) if path.is_file() else {"shared_losses": None, "rows": []}


def _draw(run: RunDirectory, rows: list[dict[str, Any]]) -> None:
    metrics = {k: run.work / f"partition-{k:03d}" / "metrics.jsonl" for k in range(run.config.model.n_experts)}
    shared = run.work / "shared" / "metrics.jsonl"
    loss_curves(run.reports / "loss.png", shared if shared.is_file() else None,
                {k: path for k, path in metrics.items() if path.is_file()})  # fmt: skip
    perplexity_plot(run.reports / "perplexity.png", rows)
    router_heat_map(run.reports / "router.png", rows[-1]["router"])
