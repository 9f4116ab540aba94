"""A run, stage by stage: prepare, shared, partition, router, publish; then experts, validation, assembly, evaluation.

Each stage is idempotent: what is finished has a marker and is skipped, what was interrupted goes on. `forge run` calls the
stages one after another on one machine; a coordinator calls the same ones as child processes and leaves the experts to
its nodes. Only the functions that run inside a child process import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from forge.checkpoint.assembly import accept, arrived, start
from forge.checkpoint.provenance import keep, origin
from forge.config import RunConfig
from forge.errors import ForgeError, ShardError
from forge.files import RunDirectory, hash_file, read_json, write_json
from forge.jobs import Job
from forge.system import peak_resident_bytes, total_memory
from forge.train.memory import STAGES as MEMORY_STAGES
from forge.train.memory import Stage, check_ram, hungriest, plan, process_bytes
from forge.vocabulary import STAGES

Progress = Callable[..., None]
ShouldStop = Callable[[], bool]
OnEvent = Callable[[dict[str, Any]], None]


# What runs inside a child process -------------------------------------------------------------------------------------


def run_stage(arguments: dict[str, Any], progress: Progress, should_stop: ShouldStop) -> dict[str, Any]:
    """Job `stage`: run one stage of a run directory, or return its facts when it is finished.

    A stage that was asked to stop before its end returns `finished`, which is False.
    """
    run, stage = RunDirectory(Path(arguments["run_dir"])), arguments["stage"]
    facts = run.marker(stage)
    if facts is not None:
        return facts
    ram_bytes = int(arguments.get("ram_bytes") or total_memory())
    made = _STAGE_FUNCTIONS[stage](run, ram_bytes, progress, should_stop)
    if made is None:
        return {"finished": False}
    return run.finish(stage, made | {"peak_bytes": peak_resident_bytes()})


def _prepare(run: RunDirectory, ram_bytes: int, progress: Progress, should_stop: ShouldStop) -> dict[str, Any]:
    from forge.data.prepare import prepare

    def on_progress(done: int, total: int, message: str) -> None:
        progress(stage="prepare", step=done, steps=total, message=message)

    facts: dict[str, Any] = prepare(run.config, run.data, on_progress)
    # Where the lineage of a model begins (forge/checkpoint/provenance.py).
    return facts | {"files": {path.name: hash_file(path) for path in sorted(run.data.iterdir()) if path.is_file()}}


def _shared(run: RunDirectory, ram_bytes: int, progress: Progress, should_stop: ShouldStop) -> dict[str, Any] | None:
    from forge.train.shared import train_shared

    return train_shared(run, ram_bytes, progress, should_stop)


def _partition(run: RunDirectory, ram_bytes: int, progress: Progress, should_stop: ShouldStop) -> dict[str, Any]:
    from forge.data.stage import partition_corpus

    facts: dict[str, Any] = partition_corpus(run, progress)
    return facts


def _router(run: RunDirectory, ram_bytes: int, progress: Progress, should_stop: ShouldStop) -> dict[str, Any]:
    from forge.router.stage import fit_router

    return fit_router(run, progress)


def _publish(run: RunDirectory, ram_bytes: int, progress: Progress, should_stop: ShouldStop) -> dict[str, Any]:
    """Gather every blob that leaves this machine, with the loss a shard has to beat on each partition, and its topic."""
    from forge.checkpoint.safetensors_header import tensors_sha256
    from forge.data.tokenizer import load_tokenizer
    from forge.data.topics import describe_partitions
    from forge.evaluate.validation import load_shared, partition_loss
    from forge.model import names

    config, model = run.config, load_shared(run)
    shared, partitions, router = (run.marker(stage) for stage in ("shared", "partition", "router"))
    assert shared is not None and partitions is not None and router is not None
    files = []
    for file in partitions["partitions"]:
        loss = partition_loss(run, model, file["validation"]["sha256"], config.evaluation.tokens)
        files.append(file | {"shared_loss": loss})
        progress(stage="publish", step=len(files), steps=len(partitions["partitions"]), message="measuring shared loss")
    validation = [run.blobs.path(file["validation"]["sha256"]) for file in files]
    for file, topic in zip(files, describe_partitions(validation, load_tokenizer(run.data / "tokenizer.json")), strict=True):
        file["topic"] = topic
    ffn: dict[str, Any] = shared["shared_ffn"]
    content = tensors_sha256(run.blobs.path(ffn["sha256"]), names.ffn_tensors(config.model))
    return {"run_id": run.run_id, "config_fingerprint": config.fingerprint, "shared": shared["shared"],
            "shared_ffn": ffn | {"tensors_sha256": content}, "shared_with_context": router["shared_with_context"],
            "router": router["router"], "partitions": files, "evaluation_tokens": config.evaluation.tokens}  # fmt: skip


_STAGE_FUNCTIONS: dict[str, Callable[[RunDirectory, int, Progress, ShouldStop], dict[str, Any] | None]] = {
    "prepare": _prepare, "shared": _shared, "partition": _partition, "router": _router, "publish": _publish,
}  # fmt: skip


def run_expert(arguments: dict[str, Any], progress: Progress, should_stop: ShouldStop) -> dict[str, Any]:
    """Job `train-expert`: train the expert of an assignment in a work directory."""
    from forge.train.expert import train_expert

    return train_expert(arguments["assignment"], Path(arguments["work_dir"]), int(arguments["ram_bytes"]), progress,
                        should_stop, arguments.get("device") or "auto")  # fmt: skip


def run_validation(arguments: dict[str, Any], progress: Progress, should_stop: ShouldStop) -> dict[str, Any]:
    """Job `validate`: judge a shard; it must be sound and beat the shared components on its partition."""
    from forge.evaluate.validation import validate_shard

    return validate_shard(RunDirectory(Path(arguments["run_dir"])), int(arguments["partition"]),
                          Path(arguments["shard"]))  # fmt: skip


def run_evaluation(arguments: dict[str, Any], progress: Progress, should_stop: ShouldStop) -> dict[str, Any]:
    """Job `evaluate`: measure the assembled model, add a row to reports/evaluation.json and draw the plots."""
    from forge.evaluate.stage import evaluate_run

    return evaluate_run(RunDirectory(Path(arguments["run_dir"])), final=bool(arguments["final"]), progress=progress)


def run_contributions(arguments: dict[str, Any], progress: Progress, should_stop: ShouldStop) -> dict[str, Any]:
    """Job `contributions`: measure what each expert of the assembled model contributes, and nothing else."""
    from forge.evaluate.stage import contributions_of

    return contributions_of(RunDirectory(Path(arguments["run_dir"])))


def run_generation(arguments: dict[str, Any], progress: Progress, should_stop: ShouldStop) -> dict[str, Any]:
    """Job `generate`: continue a text with the assembled model; every piece of it is an event."""
    from forge.evaluate.generate import Sampling, go_on
    from forge.evaluate.text import read_tokenizer
    from forge.model.moe import MixtureLM

    directory = RunDirectory(Path(arguments["run_dir"])).model
    model, tokenizer = MixtureLM.load(directory), read_tokenizer(directory)
    pieces, left_out = go_on(model, tokenizer, arguments["prompt"], Sampling(seed=arguments["seed"]))
    tokens = 0
    for piece in pieces:
        tokens += piece.tokens
        progress(stage="generate", step=tokens, piece=piece._asdict())
    return {"tokens": tokens, "left_out": left_out}


def run_replay(arguments: dict[str, Any], progress: Progress, should_stop: ShouldStop) -> dict[str, Any]:
    """Job `replay`: repeat a part of a node's training and say how far the node is from what came out."""
    from forge.train.replay import Part, replay

    run, before = RunDirectory(Path(arguments["run_dir"])), arguments["before"]
    part = Part(first=arguments["first"], last=arguments["last"], before=None if before is None else Path(before),
                after=Path(arguments["after"]))  # fmt: skip
    ram_bytes = int(arguments.get("ram_bytes") or total_memory())
    return replay(local_assignment(run, int(arguments["partition"])), part, run.work / "replay", ram_bytes, progress, should_stop)


#: Name of a job -> what the child process runs.
JOBS: dict[str, Callable[[dict[str, Any], Progress, ShouldStop], dict[str, Any]]] = {
    "stage": run_stage, "train-expert": run_expert, "validate": run_validation, "replay": run_replay,
    "evaluate": run_evaluation,
    "contributions": run_contributions, "generate": run_generation,
}  # fmt: skip


# What the parent does -------------------------------------------------------------------------------------------------


def call(name: str, arguments: dict[str, Any], on_event: OnEvent, threads: int | None = None,
         ram_bytes: int | None = None) -> dict[str, Any]:  # fmt: skip
    """Run a job to its end within `ram_bytes`, handing its progress events on.

    Raises:
        ForgeError: of the class that the job raised.
    """
    job = Job(name, arguments, threads=threads, ram_bytes=ram_bytes)
    try:
        for event in job.events():
            on_event(event)
        return job.result()
    finally:
        job.kill()


def run_all(root: Path, config: RunConfig, *, ram_bytes: int, threads: int | None, device: str,
            on_event: OnEvent) -> dict[str, Any]:  # fmt: skip
    """The whole road on one machine, one expert in memory at a time; interrupted anywhere, it goes on.

    Returns:
        The last row of reports/evaluation.json.

    Raises:
        ForgeError: whatever stops a stage; what was finished stays finished.
    """
    run = prepare_run(root, config, STAGES, ram_bytes=ram_bytes, threads=threads, on_event=on_event)
    start(run)
    if not (run.reports / "evaluation.json").is_file():
        _evaluate(run, False, on_event, threads, ram_bytes)
    done = arrived(run.model)
    for partition in range(config.model.n_experts):
        if partition not in done:
            train_and_accept(run, partition, ram_bytes=ram_bytes, threads=threads, device=device, on_event=on_event)
            _evaluate(run, False, on_event, threads, ram_bytes)
    return _evaluate(run, True, on_event, threads, ram_bytes)


def _evaluate(run: RunDirectory, final: bool, on_event: OnEvent, threads: int | None, ram_bytes: int) -> dict[str, Any]:
    row = call("evaluate", {"run_dir": str(run.root), "final": final}, on_event, threads, ram_bytes)
    note_memory(run, "evaluate", row)
    return row


def prepare_run(root: Path, config: RunConfig, stages: tuple[str, ...], *, ram_bytes: int, threads: int | None,
                on_event: OnEvent) -> RunDirectory:  # fmt: skip
    """Open a run directory and take it through `stages`, skipping those that are finished."""
    run = RunDirectory.open(root, config)
    for stage in stages:
        if run.marker(stage) is None:
            on_event({"event": "stage", "stage": stage})
            facts = call("stage", {"run_dir": str(root), "stage": stage, "ram_bytes": ram_bytes}, on_event, threads,
                         ram_bytes)  # fmt: skip
            note_memory(run, stage, facts)
    return run


def train_and_accept(run: RunDirectory, partition: int, *, ram_bytes: int, threads: int | None, device: str,
                     on_event: OnEvent) -> None:  # fmt: skip
    """Train one expert here, validate its shard and put it into the assembled model.

    Raises:
        ShardError: the trained shard is not better than the shared components, so it is not used.
    """
    on_event({"event": "stage", "stage": f"expert {partition}"})
    work = run.work / f"partition-{partition:03d}"
    arguments = {"assignment": local_assignment(run, partition), "work_dir": str(work), "ram_bytes": ram_bytes,
                 "device": device}  # fmt: skip
    trained = call("train-expert", arguments, on_event, threads, ram_bytes)
    note_memory(run, f"expert {partition}", trained)
    shard = Path(trained["shard"])
    verdict = call("validate", {"run_dir": str(run.root), "partition": partition, "shard": str(shard)}, on_event, threads,
                   ram_bytes)  # fmt: skip
    note_memory(run, "validate", verdict)
    if not verdict["accepted"]:
        raise ShardError(f"The expert of partition {partition} was not accepted: {'; '.join(verdict['reasons'])}. Train "
                         "it on more tokens (train.expert.tokens), or lower its learning rate.")  # fmt: skip
    path = Path(trained["manifest"])
    manifest = read_json(path)
    sha256 = run.blobs.adopt(shard)
    credit = {"node_name": "this machine", "loss": verdict["loss"], "shared_loss": verdict["shared_loss"],
              "tokens": manifest["tokens_seen"]}  # fmt: skip
    keep(run, origin(run.blobs.path(sha256), run.config, partition, path.read_bytes(), sha256=sha256), credit)
    accept(run, partition, sha256, credit)


def local_assignment(run: RunDirectory, partition: int) -> dict[str, Any]:
    """The assignment that a node would get for this partition, with the run directory's own files."""
    published = run.marker("publish")
    if published is None:
        raise ForgeError(f"The run in {run.root} has nothing to train an expert on yet: run `forge prepare` first.")
    blobs = run.blobs
    return {"run_id": run.run_id, "config_fingerprint": published["config_fingerprint"],
            "config": run.config.model_dump(mode="json"), "partition": partition, "lease_id": "local",
            "shared": str(blobs.path(published["shared"]["sha256"])),
            "shared_ffn": str(blobs.path(published["shared_ffn"]["sha256"])),
            "train_tokens": str(blobs.path(published["partitions"][partition]["train"]["sha256"])),
            "shared_sha256": published["shared"]["sha256"]}  # fmt: skip


def note_memory(run: RunDirectory, process: str, facts: dict[str, Any]) -> None:
    """Keep the largest measured peak of a process beside its prediction, in reports/memory.json.

    Args:
        run: the run.
        process: the stage, as `forge.train.memory` names it; an expert has its number after it.
        facts: the job's result; `predicted_bytes` when the job made a plan of its own.
    """
    path = run.reports / "memory.json"
    rows = dict(read_json(path)) if path.is_file() else {}
    before = rows.get(process, {}).get("peak_bytes") or 0
    predicted = facts.get("predicted_bytes") or process_bytes(run.config, process.split()[0])
    rows[process] = {"peak_bytes": max(before, facts.get("peak_bytes") or 0), "predicted_bytes": predicted}
    write_json(path, rows)


def check_budget(config: RunConfig, ram_bytes: int, stages: Iterable[Stage] = MEMORY_STAGES) -> None:
    """Refuse a budget that this machine does not have or that cannot hold every stage, before anything is read or downloaded.

    Raises:
        MemoryBudgetError: names the `--ram` that would do.
    """
    check_ram(ram_bytes, total_memory())
    plan(config, hungriest(config, stages), ram_bytes)
