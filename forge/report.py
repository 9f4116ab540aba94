"""The story of a run as one self-contained HTML file: what `forge report` writes, to send to someone.

Everything in it comes from files of the run directory that the run wrote itself; nothing is measured again, and nothing is
loaded from elsewhere when it is read. Names of nodes and texts of samples are strangers' words: the template escapes all.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, StrictUndefined

from forge.checkpoint.assembly import credited
from forge.errors import StorageError
from forge.evaluate.table import ROWS, shares
from forge.files import RunDirectory, read_json, write_bytes
from forge.train.memory import format_size
from forge.vocabulary import OURS

#: Plots of the evaluation stage, in the order of the page, with what they show.
_PLOTS: Final = {
    "perplexity": "Perplexity against experts that have arrived",
    "loss": "Training loss against tokens",
    "router": "Where the router sends the tokens of each partition",
}
#: Telling words of a partition that are shown.
_WORDS: Final = 8


def write_report(run: RunDirectory, target: Path) -> int:
    """Write the report of a run that has been evaluated at least once; returns its size in bytes.

    Raises:
        StorageError: the run has no evaluation yet, a file of it is damaged, or the target cannot be written.
    """
    path = run.reports / "evaluation.json"
    if not path.is_file():
        raise StorageError(f"The run in {run.root} has not been evaluated yet: there is nothing to report.")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "size": format_size}
    template = resources.files("forge").joinpath("report.html").read_text(encoding="utf-8")
    page = environment.from_string(template).render(facts(run, read_json(path)["rows"])).encode()
    write_bytes(target, page)
    return len(page)


def facts(run: RunDirectory, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the template shows, as plain values.

    Args:
        run: the run directory.
        rows: of `reports/evaluation.json`, at least one.
    """
    last, published = rows[-1], run.marker("publish") or {}
    topics = {row["partition"]: row["topic"]["words"][:_WORDS] for row in published.get("partitions", ()) if row.get("topic")}
    owners = credited(run.model)
    memory = run.reports / "memory.json"
    return {
        "name": run.config.name,
        "written": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "run_id": run.run_id,
        "model": run.config.model,
        "train": run.config.train,
        "source": run.config.data.source,
        "corpus": run.marker("prepare") or {},
        "shared": run.marker("shared") or {},
        "router": run.config.router.method,
        "last": last,
        "rows": rows,
        "partitions": [row | {"words": topics.get(row["partition"], []), "node": owners.get(row["partition"])}
                       for row in last["partitions"]],
        "contributors": shares(owners, last.get("contributions")),
        "rivals": _rivals(last.get("rivals") or {}),
        "plots": [(title, _embedded(run.reports / f"{name}.png")) for name, title in _PLOTS.items()
                  if (run.reports / f"{name}.png").is_file()],
        "memory": read_json(memory) if memory.is_file() else {},
    }  # fmt: skip


def _rivals(rivals: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any], bool]]:
    """Name, figures and whether it is ours, the best first."""
    known = [(ROWS.get(name, name), figures, name == OURS) for name, figures in rivals.items()
             if figures.get("mean_loss") is not None]  # fmt: skip
    return sorted(known, key=lambda row: float(row[1]["mean_loss"]))


def _embedded(png: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode("ascii")


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
