"""The run at one moment, as JSON values: what the dashboard, `/metrics` and `status --json` show.

One function makes it, so all three say the same. docs/dashboard.md describes its sections. Sections keep their size
whatever joins or arrives: nodes beyond `MAX_NODES_SHOWN` are only counted.
"""

from __future__ import annotations

from collections.abc import Callable
import math
import threading
from typing import Any

from coordinator.activity import Activity
from coordinator.curves import SHARED, Curves
from coordinator.estimate import estimate
from coordinator.records import TRAINING, NodeRecord, PartitionRecord
from coordinator.state import State
from forge.config import RunConfig
from forge.evaluate.table import shares
from forge.files import RunDirectory
from forge.vocabulary import STAGES

#: Nodes that are listed, those heard of last.
MAX_NODES_SHOWN = 200

Json = dict[str, Any]


class Snapshots:
    """Takes snapshots of a coordinator; safe from any thread.

    Args:
        config: the run's config.
        run: the run directory, opened.
        state: the coordinator's memory.
        activity: what happens now.
        curves: the losses that were reported.
        clock: seconds since the epoch.
    """

    def __init__(self, *, config: RunConfig, run: RunDirectory, state: State, activity: Activity, curves: Curves,
                 clock: Callable[[], float]) -> None:  # fmt: skip
        self._config, self._run, self._state, self._activity = config, run, state, activity
        self._curves, self._clock = curves, clock
        self._lock = threading.Lock()
        self._run_id = run.run_id
        self._stamp: tuple[int, float] | None = None
        self._measured: Json = {"evaluations": [], "baseline": None, "router": None, "contributions": []}
        self._topics: list[Json] | None = None
        self._stages: dict[str, Json] = {}

    def take(self) -> Json:
        """The run now, by section.

        Raises:
            StorageError: the database cannot be used.
        """
        config = self._config
        self._state.counts()  # Lets overdue leases expire before they are shown.
        now, partitions = self._activity.snapshot(), self._state.partitions()
        with self._lock:
            measured, topics, stages = self._measure(), self._read_topics(), self._read_stages(now.phase)
        how_long = estimate(now, config, partitions, _evaluation_seconds(partitions, measured["evaluations"]))
        return {
            "now": round(self._clock(), 1),
            "run": {"run_id": self._run_id, "name": config.name, "config_fingerprint": config.fingerprint,
                    "experts": config.model.n_experts, "top_k": config.model.top_k, "layers": config.model.n_layers,
                    "parameters": config.model.total_parameters, "expert_parameters": config.model.expert_parameters},
            "phase": {"phase": now.phase, "sentence": now.sentence, "step": now.step, "steps": now.steps,
                      "loss": finite(now.loss), "tokens_per_second": finite(now.tokens_per_second),
                      "resident_bytes": now.resident_bytes, "predicted_bytes": now.predicted_bytes or None,
                      "remaining_seconds": finite(now.remaining),
                      "stages": stages},
            "estimate": {"seconds": finite(how_long.seconds), "until": how_long.until, "because": how_long.because},
            "quality": _quality(measured),
            "experts": [_expert(partition, config) for partition in partitions],
            "contributors": _contributors(partitions, measured["contributions"]),
            "nodes": self._nodes(partitions),
            "evaluations": measured["evaluations"],
            "baseline": measured["baseline"],
            "curves": self._curves.points(),
            "topics": topics or [],
            "router": measured["router"],
        }  # fmt: skip

    def _measure(self) -> Json:
        """The sections that only an evaluation changes; read again when there is a new one."""
        stamp = self._state.evaluation_stamp()
        if stamp != self._stamp:
            newest: list[Any] = [(-math.inf,), {}]  # When it was measured, and its row.

            def point(experts: int, final: bool, at: float, row: Json) -> Json:
                if (at, experts, final) > newest[0]:
                    newest[:] = [(at, experts, final), row]
                return _point(experts, final, at, row)

            evaluations = self._state.read_evaluations(point)
            self._measured = {"evaluations": evaluations, "baseline": _baseline(newest[1]), "router": _router(newest[1]),
                              "contributions": newest[1].get("contributions") or []}  # fmt: skip
            self._stamp = stamp
        return self._measured

    def _read_topics(self) -> list[Json] | None:
        if self._topics is None:
            published = self._run.marker("publish")
            if published is not None:
                self._topics = [{"partition": row["partition"], "documents": row.get("documents"), **row["topic"]}
                                for row in published["partitions"] if row.get("topic")]  # fmt: skip
        return self._topics

    def _read_stages(self, phase: str) -> list[Json]:
        for stage in STAGES:
            if stage not in self._stages and (facts := self._run.marker(stage)) is not None:
                self._stages[stage] = {"maturity": finite(facts.get("maturity"))} if stage == SHARED else {}
        return [{"stage": stage, "done": stage in self._stages, "now": stage == phase, **self._stages.get(stage, {})}
                for stage in STAGES]  # fmt: skip

    def _nodes(self, partitions: list[PartitionRecord]) -> Json:
        work = {partition.node_id: partition for partition in partitions if partition.state == "leased"}
        shown = sorted(self._state.nodes(newest=MAX_NODES_SHOWN), key=lambda node: (node.name, node.id))
        return {"total": self._state.count_nodes(), "shown": [_node(node, work.get(node.id)) for node in shown]}


def finite(value: Any) -> float | None:
    """The number, rounded to six digits, or None for what JSON cannot say."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def _expert(partition: PartitionRecord, config: RunConfig) -> Json:
    progress = partition.progress
    training = progress.get("activity") == TRAINING
    done, total = int(progress.get("step") or 0), int(progress.get("steps") or 0)
    counted = {"step": done, "steps": total, "bytes": 0, "bytes_total": 0} if training else {
        "step": 0, "steps": 0, "bytes": done, "bytes_total": total}  # fmt: skip
    return {
        "partition": partition.id, "state": partition.state, "shows": _shows(partition), "tokens": partition.tokens,
        "node_id": partition.node_id, "node_name": partition.node_name, "accepted_at": partition.decided_at,
        **counted,
        "training_loss": finite(progress.get("loss") or None) if training else None,
        "tokens_per_second": finite(progress.get("tokens_per_second") or None) if training else None,
        "loss": finite(partition.loss), "shared_loss": finite(partition.shared_loss),
        "rejected": list(partition.last_rejection),
    }  # fmt: skip


def _shows(partition: PartitionRecord) -> str:
    """What the grid shows: the partition's state, told apart further by what its node says that it does."""
    if partition.state == "uploaded":
        return "validating"
    if partition.state == "open":
        return "rejected" if partition.last_rejection else "open"
    activity = partition.progress.get("activity")
    return str(activity) if partition.state == "leased" and activity in (TRAINING, "uploading") else partition.state


def _node(node: NodeRecord, work: PartitionRecord | None) -> Json:
    machine, progress = node.machine, {} if work is None else work.progress
    return {
        "node_id": node.id, "name": node.name, "hostname": machine.get("hostname", ""), "device": machine.get("device", ""),
        "platform": machine.get("platform", ""), "version": machine.get("version", ""), "cores": machine.get("cores", 0),
        "memory_bytes": machine.get("memory_bytes", 0), "ram_limit_bytes": machine.get("ram_limit_bytes", 0),
        "resident_bytes": progress.get("resident_bytes") or None, "activity": progress.get("activity", ""),
        "tokens_per_second": finite(progress.get("tokens_per_second") or None),
        "partition": None if work is None else work.id, "seen_at": round(node.seen_at, 1),
        "accepted": node.accepted, "rejected": node.rejected, "revoked": node.revoked,
    }  # fmt: skip


def _contributors(partitions: list[PartitionRecord], contributions: list[Json]) -> list[Json]:
    """Who trained the accepted experts, the largest contribution first; as the newest evaluation measured it."""
    measured = {row["expert"]: finite(row["nats"]) for row in contributions}
    owners = {partition.id: (partition.node_id, partition.node_name)
              for partition in partitions if partition.state == "accepted"}  # fmt: skip
    return [{"node_id": node_id, "name": name, "nats": finite(share.nats),
             "experts": [{"partition": expert, "nats": measured.get(expert)} for expert in share.experts]}
            for (node_id, name), share in shares(owners, contributions)]  # fmt: skip


def _point(experts: int, final: bool, at: float, row: Json) -> Json:
    return {"experts": experts, "final": final, "at": round(at, 1), "mean_perplexity": finite(row.get("mean_perplexity")),
            "pooled_perplexity": finite(row.get("pooled_perplexity")),
            "bits_per_byte": finite(row.get("pooled_bits_per_byte")),
            "partitions": [finite(part.get("perplexity")) for part in row.get("partitions", ())]}  # fmt: skip


def _evaluation_seconds(partitions: list[PartitionRecord], evaluations: list[Json]) -> float | None:
    """How long the newest evaluation took: it begins when the shard that it is about is accepted."""
    accepted = sorted(partition.decided_at for partition in partitions if partition.decided_at is not None)
    took = [point["at"] - accepted[point["experts"] - 1] for point in evaluations
            if not point["final"] and 0 < point["experts"] <= len(accepted)]  # fmt: skip
    return max(0.0, took[-1]) if took else None


def _baseline(row: Json) -> Json | None:
    """Perplexities of the shared components alone, on the same documents."""
    if finite(row.get("shared_mean_perplexity")) is None:
        return None
    losses = [part.get("shared_loss") for part in row.get("partitions", ())]
    return {"mean_perplexity": finite(row["shared_mean_perplexity"]),
            "partitions": [None if loss is None else finite(math.exp(min(loss, 700.0))) for loss in losses]}  # fmt: skip


def _router(row: Json) -> Json | None:
    report = row.get("router")
    if not report or not report.get("layers"):
        return None
    layers = report["layers"]
    if "matrix" not in layers[0]:
        layers = []
    return {"token_accuracy": finite(report["token_accuracy"]), "tokens": report["tokens"],
            "layers": [{"token_accuracy": finite(layer["token_accuracy"]),
                        "matrix": [[round(cell, 3) for cell in cells] for cells in layer["matrix"]]}
                       for layer in layers]}  # fmt: skip


def _quality(measured: Json) -> Json | None:
    """The newest evaluation, and by which share its perplexity is below (-) that of the shared components alone."""
    if not measured["evaluations"]:
        return None
    newest = max(measured["evaluations"], key=lambda point: (point["at"], point["experts"], point["final"]))
    baseline = measured["baseline"]
    alone = None if baseline is None else baseline["mean_perplexity"]
    now = newest["mean_perplexity"]
    change = None if alone is None or now is None else finite(now / alone - 1)
    return {"experts": newest["experts"], "mean_perplexity": now, "pooled_perplexity": newest["pooled_perplexity"],
            "bits_per_byte": newest["bits_per_byte"], "partitions": newest["partitions"],
            "shared_mean_perplexity": alone, "change": change}  # fmt: skip
