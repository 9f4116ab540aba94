"""The evaluation of a run after each shard: a row in reports/evaluation.json, and the plots."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from forge.checkpoint.assembly import arrived
from forge.data.tokenizer import load_tokenizer
from forge.evaluate.contributions import contributions
from forge.evaluate.heldout import HeldOut, Measured
from forge.evaluate.perplexity import Loss
from forge.evaluate.plots import loss_curves, perplexity_plot, router_heat_map
from forge.evaluate.report import evaluate_model
from forge.evaluate.router_report import kept
from forge.evaluate.validation import load_shared
from forge.files import RunDirectory, read_json, write_json
from forge.model.moe import MixtureLM
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
    tests, shared_ffn = _published(run, published)
    tokenizer = run.data / "tokenizer.json"
    calibration = None
    if final and config.assembly.calibrate_norms and len(experts) == config.model.n_experts:
        from forge.checkpoint.calibrate import calibrate

        validation = [run.blobs.path(file["validation"]["sha256"]) for file in published["partitions"]]
        calibration = calibrate(run.model, validation, END_OF_TEXT_ID, config.model.max_seq_len, config.evaluation.tokens)
    report = _report(run)
    # `evaluation` may change between two commands on one run; what was measured on other windows is no rival.
    if (report["shared"] or {}).get("evaluation_tokens") != config.evaluation.tokens:
        report = {"shared": {"evaluation_tokens": config.evaluation.tokens, **_measure_shared(run, tests, tokenizer)}, "rows": []}
    shared = Measured(*([Loss(**loss) for loss in report["shared"][which]] for which in Measured._fields))
    row = evaluate_model(run.model, tests, tokenizer, config.evaluation, final=final, shared=shared, arrived=experts,
                         shared_ffn=shared_ffn, progress=progress)  # fmt: skip
    row["calibration"] = calibration
    report["rows"] = [old for old in report["rows"] if old["arrived"] != experts] + [row]
    _draw(run, report["rows"])
    row["router"] = kept(row["router"])
    write_json(run.reports / "evaluation.json", report)
    return row


def contributions_of(run: RunDirectory) -> dict[str, Any]:
    """What each expert of a run contributes, measured anew; the report stays as it is.

    Returns:
        `contributions`: see `contributions.contributions`.
    """
    published = run.marker("publish")
    assert published is not None, "the publish stage comes before"
    tests, shared_ffn = _published(run, published)
    held_out = HeldOut.of(tests, run.config.model, run.config.evaluation)
    return {"contributions": contributions(MixtureLM.load(run.model), shared_ffn, held_out, sorted(arrived(run.model)))}


def _published(run: RunDirectory, published: dict[str, Any]) -> tuple[list[Path], Path]:
    """The token files of the partitions' test documents, and the file of the shared FFN."""
    tests = [run.blobs.path(file["test"]["sha256"]) for file in published["partitions"]]
    return tests, run.blobs.path(published["shared_ffn"]["sha256"])


def _measure_shared(run: RunDirectory, tests: list[Path], tokenizer: Path) -> dict[str, Any]:
    """A function of its own so that the dense model is gone before the assembled one is loaded."""
    held_out = HeldOut.of(tests, run.config.model, run.config.evaluation)
    measured = held_out.measure(load_shared(run), load_tokenizer(tokenizer))
    return {which: [asdict(loss) for loss in losses] for which, losses in measured._asdict().items()}


def _report(run: RunDirectory) -> dict[str, Any]:
    """The report so far: the rows, and the shared components' losses, which are measured once."""
    path = run.reports / "evaluation.json"
    return {"shared": None, "rows": [], **(read_json(path) if path.is_file() else {})}


def _draw(run: RunDirectory, rows: list[dict[str, Any]]) -> None:
    metrics = {k: run.work / f"partition-{k:03d}" / "metrics.jsonl" for k in range(run.config.model.n_experts)}
    shared = run.work / "shared" / "metrics.jsonl"
    loss_curves(run.reports / "loss.png", shared if shared.is_file() else None,
                {k: path for k, path in metrics.items() if path.is_file()})  # fmt: skip
    perplexity_plot(run.reports / "perplexity.png", rows)
    router_heat_map(run.reports / "router.png", rows[-1]["router"])
