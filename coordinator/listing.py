"""What `nodes`, `experts`, `partitions` and `events` of `forge-coordinator` print: sections of the snapshot, and the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
import json
from pathlib import Path
import time
from typing import Any

from forge.errors import StorageError, storage_errors

EVENTS_FILE = "events.jsonl"
#: Seconds between two looks for new events.
LOOK_SECONDS = 0.2

Json = dict[str, Any]


def partitions(snapshot: Json) -> list[Json]:
    """A row for each partition: its text, and how well the model and the shared components alone read it now."""
    topics = {topic["partition"]: topic for topic in snapshot["topics"]}
    now, alone = ((snapshot[section] or {}).get("partitions", ()) for section in ("quality", "baseline"))
    rows = []
    for expert in snapshot["experts"]:
        index = expert["partition"]
        topic = topics.get(index, {})
        rows.append({"partition": index, "tokens": expert["tokens"], "documents": topic.get("documents"),
                     "words": topic.get("words", []), "perplexity": _at(now, index),
                     "shared_perplexity": _at(alone, index)})  # fmt: skip
    return rows


def node_lines(snapshot: Json) -> list[str]:
    """A line for each node, and how many more there are."""
    nodes, now = snapshot["nodes"], snapshot["now"]
    rows = [[node["name"], node["device"] or "-", str(node["cores"]), _size(node["resident_bytes"]),
             _size(node["ram_limit_bytes"]), "-" if node["partition"] is None else str(node["partition"]),
             node["activity"] or "-", _number(node["tokens_per_second"], 0), str(node["accepted"]), str(node["rejected"]),
             "revoked" if node["revoked"] else f"{max(0.0, now - node['seen_at']):.0f} s ago"]
            for node in nodes["shown"]]  # fmt: skip
    lines = table("node device cores memory allowed partition does tokens/s accepted rejected seen", rows)
    more = nodes["total"] - len(nodes["shown"])
    return [*lines, f"and {more} more"] if more > 0 else lines


def expert_lines(snapshot: Json) -> list[str]:
    """A line for each expert."""
    rows = [[str(expert["partition"]), expert["shows"], expert["node_name"] or "-",
             f"{expert['step']:,}/{expert['steps']:,}" if expert["steps"] else "-", _number(expert["tokens_per_second"], 0),
             _number(expert["training_loss"], 4), _number(expert["loss"], 4), _number(expert["shared_loss"], 4),
             "; ".join(expert["rejected"])] for expert in snapshot["experts"]]  # fmt: skip
    return table("expert state node step tokens/s training loss shared rejected", rows)


def partition_lines(snapshot: Json) -> list[str]:
    """A line for each partition."""
    rows = [[str(row["partition"]), f"{row['tokens']:,}", "-" if row["documents"] is None else f"{row['documents']:,}",
             _number(row["perplexity"], 2), _number(row["shared_perplexity"], 2), " ".join(map(str, row["words"][:8]))]
            for row in partitions(snapshot)]  # fmt: skip
    return table("partition tokens documents perplexity shared words", rows)


def table(head: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they need to be."""
    cells = [head.split(), *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def event_line(line: str) -> str:
    """A line of the journal for people: local time, event, and its sentence or else its facts."""
    facts = dict(json.loads(line))
    at = datetime.fromisoformat(facts.pop("ts")).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    name, sentence = facts.pop("event"), facts.pop("sentence", "")
    said = sentence or "  ".join(f"{key}={value}" for key, value in facts.items())
    return f"{at}  {name:18} {said}".rstrip()


def events(run_dir: Path, *, follow: bool = False, sleep: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """The lines of a run's journal, and with `follow` those to come, whichever process writes them; without end then.

    Raises:
        StorageError: the directory has no journal.
    """
    path = run_dir / EVENTS_FILE
    if not path.is_file():
        raise StorageError(f"{run_dir} is not a coordinator's run directory: give one with --run-dir.")
    with storage_errors(path), open(path, encoding="utf-8", errors="replace") as file:
        rest = ""
        while True:
            # A line that was cut by a kill is no event.
            while (rest := rest + file.readline()).endswith("\n"):
                if _is_event(rest):
                    yield rest.rstrip("\n")
                rest = ""
            if not follow:
                return
            sleep(LOOK_SECONDS)


def _is_event(line: str) -> bool:
    try:
        return bool({"ts", "event"} <= json.loads(line).keys())
    except (ValueError, AttributeError):
        return False


def _at(values: Sequence[float | None], index: int) -> float | None:
    return values[index] if index < len(values) else None


def _size(value: int | None) -> str:
    return "-" if not value else f"{value / (1 << 20):.0f}M"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
