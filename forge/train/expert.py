"""The expert phase: the shared components are frozen, and the FFN of every layer learns one partition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from forge.checkpoint.shard import write_shard
from forge.config import RunConfig, parse_config
from forge.data.packing import SequenceSampler
from forge.data.tokens import TokenFile
from forge.files import hash_file, write_json
from forge.model import names
from forge.model.lm import DenseLM, load_dense
from forge.train.loop import LoopSettings, Progress, train
from forge.train.memory import Products, plan, report
from forge.train.precision import product_dtype, resolve_device
from forge.vocabulary import END_OF_TEXT_ID, SHARD_FORMAT_VERSION, kept_file


def train_expert(assignment: Mapping[str, Any], work_dir: Path, ram_bytes: int, progress: Progress,
                 should_stop: Callable[[], bool], device: str = "auto") -> dict[str, Any]:  # fmt: skip
    """Train the expert of an assignment and write its shard and manifest into `work_dir`; resumable at any instant.

    Args:
        assignment: run_id, config_fingerprint, config (resolved, as plain values), partition, lease_id, shared_sha256,
            and the paths shared, shared_ffn and train_tokens.
        work_dir: checkpoint, metrics, shard and manifest lie here.
        ram_bytes: memory that this process may use.
        progress: called with the keyword arguments of a progress event.
        should_stop: asked once a step; True stops at a checkpoint.
        device: auto, cpu, cuda or mps.

    Returns:
        finished, step, steps, loss, predicted_bytes; and when finished: shard, manifest (paths), sha256.

    Raises:
        MemoryBudgetError: one sequence at a time does not fit `ram_bytes`.
        TrainingError: the loss is not finite.
    """
    config = parse_config(assignment["config"])
    device = resolve_device(device)
    dtype = product_dtype(device)
    products: Products = "bfloat16" if dtype == torch.bfloat16 else "float32"
    chosen = plan(config, "expert", ram_bytes, products)
    partition = int(assignment["partition"])
    progress(stage=f"expert {partition}", plan=report(config, chosen, products))
    model = prepare_expert(config, Path(assignment["shared"]), Path(assignment["shared_ffn"]), partition, dtype).to(device)
    model.recompute = chosen.recompute
    model.compute_in(dtype)
    sampler = SequenceSampler(TokenFile(Path(assignment["train_tokens"])), config.model.max_seq_len,
                              expert_seed(config, partition), END_OF_TEXT_ID)  # fmt: skip
    result = train(model, sampler, LoopSettings(
        phase=config.train.expert, batch_size=config.batch_size("expert"), sequence_length=config.model.max_seq_len,
        micro_batch=chosen.micro_batch, directory=work_dir, checkpoint_seconds=config.train.checkpoint_seconds,
        keep=frozenset(config.audit_steps()), stage=f"expert {partition}", device=device, dtype=dtype),
        progress, should_stop)  # fmt: skip
    outcome = {"finished": result.finished, "step": result.step, "steps": result.steps, "loss": result.loss,
               "predicted_bytes": chosen.peak_bytes}  # fmt: skip
    if not result.finished:
        return outcome
    shard, manifest = work_dir / "shard.safetensors", work_dir / "manifest.json"
    metadata = {
        "run_id": assignment["run_id"], "config_fingerprint": assignment["config_fingerprint"],
        "shared_sha256": assignment["shared_sha256"], "partition": str(partition), "tokens_seen": str(result.tokens),
        "final_loss": f"{result.loss:.6f}", "format_version": SHARD_FORMAT_VERSION}  # fmt: skip
    dtype = getattr(torch, config.model.dtype)
    trained = {name: p.detach().to("cpu", dtype).contiguous() for name, p in model.named_parameters()}
    renamed = zip(names.ffn_tensors(config.model), names.expert_tensors(config.model, partition), strict=True)
    write_shard(shard, {theirs: trained[ours] for ours, theirs in renamed}, metadata)
    sha256 = hash_file(shard)
    kept = {step: work_dir / kept_file(step) for step in config.audit_steps()}
    checkpoints = {str(step): hash_file(path) for step, path in kept.items() if path.is_file()}
    write_json(manifest, metadata | {"sha256": sha256, "size": shard.stat().st_size, "partition": partition,
                                     "tokens_seen": result.tokens, "final_loss": result.loss,
                                     "checkpoints": checkpoints})  # fmt: skip
    return outcome | {"shard": str(shard), "manifest": str(manifest), "sha256": sha256}


def prepare_expert(config: RunConfig, shared: Path, shared_ffn: Path, partition: int,
                   products: torch.dtype = torch.float32) -> DenseLM:  # fmt: skip
    """The model an expert is trained in: shared components frozen, the FFNs a copy of the shared one (or random)."""
    model = load_dense(config.model, shared, shared_ffn, products)
    if config.train.expert.init == "random":
        fresh = DenseLM(config.model)
        fresh.initialise(torch.Generator().manual_seed(expert_seed(config, partition)))
        drawn = fresh.state_dict()
        model.load_state_dict({name: drawn[name] for name in names.ffn_tensors(config.model)}, strict=False)
    return model


def expert_seed(config: RunConfig, partition: int) -> int:
    """Seed of an expert's data order and random start: another for every partition, none equal to the run's own."""
    return (config.seed * 1_000_003 + partition + 1) % (1 << 63)
