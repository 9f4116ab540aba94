"""`/metrics`: the snapshot in Prometheus' text format (version 0.0.4), written by hand: it is four rules.

A help line and a type line come before a series; label values escape backslash, quote and line feed; what has no value
has no line. Names end in their unit. docs/dashboard.md lists them, and a test holds that list against `SERIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from coordinator.snapshot import Json

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: Labels and value of one line.
Sample = tuple[dict[str, str], float | int | bool | None]

PHASES = ("prepare", "shared", "partition", "router", "publish", "experts", "evaluate", "done")
SHOWN = ("open", "leased", "training", "uploading", "validating", "accepted", "rejected")


class Series(NamedTuple):
    """One gauge."""

    name: str
    unit: str
    labels: str
    help: str
    read: Callable[[Json], Iterator[Sample]]


def _one(section: str, key: str) -> Callable[[Json], Iterator[Sample]]:
    def read(snapshot: Json) -> Iterator[Sample]:
        held = snapshot[section]
        yield {}, None if held is None else held[key]

    return read


def _experts(key: str) -> Callable[[Json], Iterator[Sample]]:
    def read(snapshot: Json) -> Iterator[Sample]:
        for expert in snapshot["experts"]:
            yield {"expert": str(expert["partition"])}, expert[key]

    return read


def _nodes(key: str) -> Callable[[Json], Iterator[Sample]]:
    def read(snapshot: Json) -> Iterator[Sample]:
        for node in snapshot["nodes"]["shown"]:
            yield {"node_id": node["node_id"], "node": node["name"]}, node[key]

    return read


def _contributions(snapshot: Json) -> Iterator[Sample]:
    for node in snapshot["contributors"]:
        yield {"node_id": node["node_id"], "node": node["name"]}, node["nats"]


def _expert_contributions(snapshot: Json) -> Iterator[Sample]:
    for node in snapshot["contributors"]:
        for expert in node["experts"]:
            yield {"expert": str(expert["partition"])}, expert["nats"]


def _phase(snapshot: Json) -> Iterator[Sample]:
    for phase in PHASES:
        yield {"phase": phase}, phase == snapshot["phase"]["phase"]


def _states(snapshot: Json) -> Iterator[Sample]:
    shown = [expert["shows"] for expert in snapshot["experts"]]
    for state in SHOWN:
        yield {"state": state}, shown.count(state)


def _partition_perplexity(snapshot: Json) -> Iterator[Sample]:
    newest = snapshot["quality"]["partitions"] if snapshot["quality"] else []
    for partition, perplexity in enumerate(newest):
        yield {"partition": str(partition)}, perplexity


def _information(snapshot: Json) -> Iterator[Sample]:
    run = snapshot["run"]
    yield {"run_id": run["run_id"], "name": run["name"], "config_fingerprint": run["config_fingerprint"]}, 1


SERIES = (
    Series("modularforge_run_info", "", "run_id, name, config_fingerprint", "The run; always 1.", _information),
    Series("modularforge_phase", "", "phase", "1 for the phase that the run is in, 0 for the others.", _phase),
    Series("modularforge_phase_step", "steps", "", "Steps done in the current phase.", _one("phase", "step")),
    Series("modularforge_phase_steps", "steps", "", "Steps of the current phase; 0 when it has none.", _one("phase", "steps")),
    Series("modularforge_phase_loss_nats", "nats a token", "", "Training loss that the current phase reports.",
           _one("phase", "loss")),
    Series("modularforge_phase_tokens_per_second", "tokens a second", "", "Pace of the current phase on the coordinator.",
           _one("phase", "tokens_per_second")),
    Series("modularforge_job_resident_bytes", "bytes", "", "Resident memory of the coordinator's working child process.",
           _one("phase", "resident_bytes")),
    Series("modularforge_job_predicted_bytes", "bytes", "", "Memory that was predicted for that process.",
           _one("phase", "predicted_bytes")),
    Series("modularforge_remaining_seconds", "seconds", "", "Estimate of the time left; absent while it cannot be told.",
           _one("estimate", "seconds")),
    Series("modularforge_experts", "experts", "state", "Experts in each state of the grid.", _states),
    Series("modularforge_expert_step", "steps", "expert", "Training steps that the expert's node has done.",
           _experts("step")),
    Series("modularforge_expert_steps", "steps", "expert", "Training steps that it has to do; 0 while none is at work.",
           _experts("steps")),
    Series("modularforge_expert_training_loss_nats", "nats a token", "expert", "Training loss that the expert's node reports.",
           _experts("training_loss")),
    Series("modularforge_expert_loss_nats", "nats a token", "expert", "Held-out loss of the accepted expert on its partition.",
           _experts("loss")),
    Series("modularforge_expert_shared_loss_nats", "nats a token", "expert",
           "Held-out loss of the shared components alone on the partition.", _experts("shared_loss")),
    Series("modularforge_expert_contribution_nats", "nats a token", "expert",
           "By how much the loss rises with the shared FFN in the expert's place.", _expert_contributions),
    Series("modularforge_partition_tokens", "tokens", "expert", "Training tokens of the expert's partition.", _experts("tokens")),
    Series("modularforge_evaluated_experts", "experts", "", "Experts in the model that was evaluated last.",
           _one("quality", "experts")),
    Series("modularforge_mean_perplexity", "", "", "Held-out perplexity of the model, partitions with equal weight.",
           _one("quality", "mean_perplexity")),
    Series("modularforge_pooled_perplexity", "", "", "Held-out perplexity of the model, tokens with equal weight.",
           _one("quality", "pooled_perplexity")),
    Series("modularforge_bits_per_byte", "bits a byte", "", "Held-out bits that the model needs for a byte of text.",
           _one("quality", "bits_per_byte")),
    Series("modularforge_shared_mean_perplexity", "", "", "Held-out perplexity of the shared components alone.",
           _one("quality", "shared_mean_perplexity")),
    Series("modularforge_partition_perplexity", "", "partition", "Held-out perplexity of the model on one partition.",
           _partition_perplexity),
    Series("modularforge_router_token_accuracy", "share, 0 to 1", "",
           "Held-out tokens that the router sends to their partition's expert first.", _one("router", "token_accuracy")),
    Series("modularforge_nodes", "nodes", "", "Nodes that ever joined.", _one("nodes", "total")),
    Series("modularforge_node_seen_timestamp_seconds", "seconds since 1970", "node_id, node", "When the node was last heard of.",
           _nodes("seen_at")),
    Series("modularforge_node_tokens_per_second", "tokens a second", "node_id, node", "Training pace that the node reports.",
           _nodes("tokens_per_second")),
    Series("modularforge_node_resident_bytes", "bytes", "node_id, node", "Resident memory of the node's training process.",
           _nodes("resident_bytes")),
    Series("modularforge_node_ram_limit_bytes", "bytes", "node_id, node", "Memory that the node's owner allows (--ram).",
           _nodes("ram_limit_bytes")),
    Series("modularforge_node_accepted_shards", "shards", "node_id, node", "Shards of the node that were accepted.",
           _nodes("accepted")),
    Series("modularforge_node_contribution_nats", "nats a token", "node_id, node",
           "What the node's accepted experts contribute, summed.", _contributions),
    Series("modularforge_node_rejected_shards", "shards", "node_id, node", "Shards of the node that were rejected.",
           _nodes("rejected")),
)  # fmt: skip


def exposition(snapshot: Json) -> str:
    """The text that Prometheus reads."""
    lines = []
    for series in SERIES:
        samples = [f"{series.name}{_labels(labels)} {float(value):g}" if isinstance(value, bool) else
                   f"{series.name}{_labels(labels)} {value!r}" for labels, value in series.read(snapshot)
                   if value is not None]  # fmt: skip
        if samples:
            lines += [f"# HELP {series.name} {series.help}", f"# TYPE {series.name} gauge", *samples]
    return "\n".join(lines) + "\n"


def _labels(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items()) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
