"""A publication: a model with its card and the plots of its run in one commit of the Hub, and a tag for its evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
import re
from typing import Any

from forge.checkpoint.assembly import arrived
from forge.errors import ConfigError
from forge.files import RunDirectory, read_json
from forge.publish.card import PLOTS, model_card, run_facts
from forge.publish.hub import push_model
from forge.vocabulary import REPOSITORY


def check_repository(repo: str) -> None:
    """Refuse what no repository of the Hub can be called.

    Raises:
        ConfigError: it does not look like `USER/REPO`.
    """
    if not re.fullmatch(REPOSITORY, repo):
        raise ConfigError(f"The repository {repo!r} must look like USER/REPO.")


def publish(model_dir: Path, repo: str, *, message: str = "", rows: Iterable[Mapping[str, Any]] | None = None,
            private: bool = False) -> str:  # fmt: skip
    """Push a model directory; what is known of its run is found beside it.

    A model whose evaluation failed never shows the figures of the one before it: then there are none, no plots and no tag.

    Args:
        model_dir: an assembled model, mostly `RUN_DIR/model`.
        repo: `USER/REPO`.
        message: first line of the commit; empty says how many experts the model has.
        rows: rows of evaluations, the newest last; None reads those of `RUN_DIR/reports/evaluation.json`.
        private: whether a repo that is made now is private.

    Returns:
        The address of the commit.

    Raises:
        HubError, StorageError: as `push_model` does.
    """
    run = RunDirectory(model_dir.parent) if (model_dir.parent / "run.yaml").is_file() else None
    if rows is None:
        report = None if run is None else run.reports / "evaluation.json"
        rows = read_json(report)["rows"] if report is not None and report.is_file() else []
    experts = sorted(arrived(model_dir))
    measured = [row for row in rows if row["arrived"] == experts]
    plots = {name: (run.reports / name).read_bytes() for name in PLOTS
             if run is not None and measured and (run.reports / name).is_file()}  # fmt: skip
    facts = {"name": model_dir.resolve().name, "repo": repo} if run is None else run_facts(run, repo)
    card = model_card(model_dir, run=facts, evaluation=measured[-1] if measured else None, plots=plots)
    return push_model(model_dir, repo, message=message or f"{len(experts)} experts", card=card, plots=plots, private=private,
                      tag=_tag(measured[-1]) if measured else None)  # fmt: skip


def _tag(row: Mapping[str, Any]) -> str:
    return f"experts-{row['experts']}{'-final' if row['final'] else ''}"
