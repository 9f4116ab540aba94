"""Training throughput and peak memory, against the Hugging Face Trainer and a plain PyTorch loop on the same machine.

    python -m benchmarks.speed --rounds 5

Every row is a process of its own that trains the shapes of configs/default.yaml on random tokens, with the same tokens an
optimiser step. Ours runs as a node or `forge run` would run it, with the plan that `--ram` leads to. The rivals train a
MistralForCausalLM of the same sizes (Llama's layers; its config takes any number of heads), under bfloat16 autocast where this
machine multiplies it faster; in the expert phase everything but the MLPs is frozen. Rows take turns; medians over the steps
of all rounds, ratios round by round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import json
import os
from pathlib import Path
from statistics import median
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch

from benchmarks.common import machine
from forge import pipeline
from forge.config import RunConfig, load_config
from forge.data.tokens import TokenWriter
from forge.files import RunDirectory
from forge.system import default_threads, peak_resident_bytes
from forge.train.memory import MB, Stage, parse_size, plan
from forge.train.speed import flops_per_token, multiplication_rate
from forge.vocabulary import END_OF_TEXT_ID

PHASES: tuple[Stage, ...] = ("expert", "shared")
#: Steps of a process before those that are timed.
_WARM_UP = 1
_DOCUMENTS, _DOCUMENT_TOKENS = 400, 1_000


def main() -> int:
    """Time every row and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="default")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the config")
    parser.add_argument("--phases", nargs="*", choices=PHASES, default=PHASES)
    parser.add_argument("--ram", default="8G", help="what ours may hold")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--output", type=Path, help="Markdown file to write the tables to")
    parser.add_argument("--child", nargs=3, metavar=("RIVAL", "PHASE", "MICRO_BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    config = load_config(options.config, [*options.set, *lengths(options.config, options.set, options.steps)])
    if options.child is not None:
        rival, phase, micro_batch = options.child
        print(json.dumps(RIVALS[rival](config, phase, int(micro_batch))))
        return 0
    lines = [_heading(options.threads)]
    with tempfile.TemporaryDirectory(prefix="forge-speed-") as directory:
        random_corpus(RunDirectory.open(Path(directory) / "corpus", config))
        for phase in options.phases:
            lines += _compare(config, phase, options, Path(directory))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


def lengths(name: str, overrides: list[str], steps: int) -> list[str]:
    """Overrides that give both phases `steps` timed steps."""
    config = load_config(name, overrides)
    return [f"train.{stage}.tokens={(steps + _WARM_UP) * config.step_tokens(stage)}" for stage in ("shared", "expert")]


def _heading(threads: int) -> str:
    torch.set_num_threads(threads)
    rates = ", ".join(f"{str(dtype).removeprefix('torch.')} {multiplication_rate(dtype) / 1e9:.0f} GFLOP/s"
                      for dtype in (torch.float32, torch.bfloat16))  # fmt: skip
    heading = (f"# Training speed\n\nPrinted by `python -m benchmarks.speed` on {time.strftime('%Y-%m-%d')}: "
               f"{machine()}; {threads} threads in use, torch {torch.__version__}; products of a training "
               f"step's size: {rates}.\n")
    print(heading, flush=True)
    return heading


def random_corpus(run: RunDirectory) -> None:
    """The files that the prepare stage would leave, of random tokens."""
    vocabulary, generator = run.config.model.vocab_size, np.random.default_rng(0)
    run.data.mkdir(parents=True, exist_ok=True)
    with TokenWriter(run.data / "corpus.safetensors", vocabulary) as writer:
        for _ in range(_DOCUMENTS):
            writer.append(generator.integers(END_OF_TEXT_ID + 1, vocabulary, _DOCUMENT_TOKENS))
    np.save(run.data / "split.npy", np.zeros(_DOCUMENTS, np.uint8))


# Rows -----------------------------------------------------------------------------------------------------------------


def _compare(config: RunConfig, phase: Stage, options: argparse.Namespace, directory: Path) -> list[str]:
    batch, corpus = config.batch_size(phase), directory / "corpus"

    def ours() -> dict[str, Any]:
        return measure_ours(config, phase, options, corpus, directory / f"{phase}-{time.monotonic_ns()}")

    def rival(name: str, micro_batch: int) -> Callable[[], dict[str, Any]]:
        return lambda: measure_rival(name, phase, micro_batch, options)

    sizes = [size for size in (1, 2, 4, 8) if batch % size == 0 and size < batch]
    tried = {size: median(measure_rival("trainer", phase, size, options)["tokens_per_second"]) for size in sizes}
    best = max(tried, key=lambda size: tried[size])
    print(f"{phase}: the Trainer by micro-batch: " + ", ".join(f"{m}: {v:,.0f}" for m, v in tried.items()), flush=True)
    rows = {"ours": ours, f"Trainer, batch {batch}": rival("trainer", batch),
            f"Trainer, micro-batch {best}": rival("trainer", best),
            f"PyTorch loop, micro-batch {best}": rival("loop", best)}  # fmt: skip
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    products = []
    for _ in range(options.rounds):
        products.append(multiplication_rate())
        for name, measure in rows.items():
            taken[name].append(measure())
    lines = [f"\n## The {phase} phase, {batch} x {config.model.max_seq_len} tokens a step\n",
             "| row | tokens a second | ours is faster by (lowest to highest round) | peak memory | of ours |",
             "|---|---|---|---|---|"]
    our_rates = [median(result["tokens_per_second"]) for result in taken["ours"]]
    our_peak = max(result["peak_bytes"] for result in taken["ours"])
    for name, results in taken.items():
        rates = [median(result["tokens_per_second"]) for result in results]
        ratios = sorted(mine / theirs for mine, theirs in zip(our_rates, rates, strict=True))
        peak = max(result["peak_bytes"] for result in results)
        faster = "" if name == "ours" else f"{median(ratios):.2f} x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        lines.append(f"| {name} | {median(rates):,.0f} | {faster} | {peak / MB:,.0f} MB | {peak / our_peak:.1f} x |")
    flops = flops_per_token(config, plan(config, phase, parse_size(options.ram)))
    share = median(rate * flops / bare for rate, bare in zip(our_rates, products, strict=True))
    lines.append(f"\nThe products of a step (weights, attention and optimiser, {flops / 1e6:.0f} MFLOP a token) are done at "
                 f"{share:.0%} of the rate of a bare one, measured before each round.")
    print("\n".join(lines), flush=True)
    return lines


def measure_ours(config: RunConfig, phase: str, options: argparse.Namespace, corpus: Path, root: Path) -> dict[str, Any]:
    """One training process of ours; the expert phase trains on what a first shared phase left."""
    prepared = RunDirectory.open(corpus, config)
    ram = parse_size(options.ram)

    def job(name: str, **arguments: Any) -> dict[str, Any]:
        return pipeline.call(name, {"ram_bytes": ram, **arguments}, lambda event: None, options.threads)

    if phase == "shared":
        run = RunDirectory.open(root, config)
        if run.data.is_dir():
            run.data.rmdir()
        run.data.symlink_to(prepared.data)
        facts, metrics = job("stage", run_dir=str(root), stage="shared"), run.work / "shared" / "metrics.jsonl"
    else:
        shared = job("stage", run_dir=str(corpus), stage="shared")  # Done once; later rounds find it.
        assignment = {
            "run_id": prepared.run_id, "config_fingerprint": "", "config": config.model_dump(mode="json"), "partition": 0,
            "lease_id": "local", "shared_sha256": shared["shared"]["sha256"],
            "shared": str(prepared.blobs.path(shared["shared"]["sha256"])),
            "shared_ffn": str(prepared.blobs.path(shared["shared_ffn"]["sha256"])),
            "train_tokens": str(prepared.data / "corpus.safetensors")}  # fmt: skip
        facts, metrics = job("train-expert", assignment=assignment, work_dir=str(root), device="cpu"), root / "metrics.jsonl"
    tokens = config.step_tokens(phase)
    ends = [0.0, *(line["tokens"] / line["tokens_per_second"] for line in map(json.loads, metrics.read_text().splitlines()))]
    rates = [tokens / (after - before) for before, after in zip(ends, ends[1:], strict=False)]
    return {"tokens_per_second": rates[_WARM_UP:], "peak_bytes": facts["peak_bytes"]}


def measure_rival(rival: str, phase: str, micro_batch: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.speed", "--config", options.config, "--set", *options.set, "--steps",
               str(options.steps), "--child", rival, phase, str(micro_batch)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"The row {rival} ended with exit status {done.returncode}:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


# Rivals, in a process of their own ------------------------------------------------------------------------------------


def _rival_model(config: RunConfig, phase: str) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    shape = config.model
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.d_model, intermediate_size=shape.ffn_width,
        num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=shape.max_seq_len, sliding_window=None,
        tie_word_embeddings=shape.tie_embeddings))  # fmt: skip
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(phase == "shared" or ".mlp." in name)
    return model


def _tokens(config: RunConfig) -> Any:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, config.model.vocab_size, (64, config.model.max_seq_len), generator=generator)


def _trainer(config: RunConfig, phase: str, micro_batch: int) -> dict[str, Any]:
    """The Hugging Face Trainer, as its documentation shows it."""
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from forge.train.precision import product_dtype

    tokens, ends = _tokens(config), [time.perf_counter()]

    class Sequences(Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return 1 << 16

        def __getitem__(self, index: int) -> dict[str, Any]:
            row = tokens[index % len(tokens)]
            return {"input_ids": row, "labels": row}

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            ends.append(time.perf_counter())

    accumulated = config.batch_size(phase) // micro_batch
    step = config.step_tokens(phase)
    with tempfile.TemporaryDirectory() as directory:
        Trainer(_rival_model(config, phase), TrainingArguments(
            output_dir=directory, per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulated,
            max_steps=config.steps(phase), bf16=product_dtype("cpu") == torch.bfloat16, use_cpu=True, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False),
            train_dataset=Sequences(), callbacks=[Clock()]).train()  # fmt: skip
    return _rates(ends, step)


def _loop(config: RunConfig, phase: str, micro_batch: int) -> dict[str, Any]:
    """What one writes by hand: autocast, accumulated micro-batches, clipping, AdamW."""
    from forge.train.precision import product_dtype

    dtype, tokens, model = product_dtype("cpu"), _tokens(config), _rival_model(config, phase)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=3e-4, fused=True)
    accumulated, ends = config.batch_size(phase) // micro_batch, [time.perf_counter()]
    step = config.step_tokens(phase)
    for _ in range(config.steps(phase)):
        for index in range(accumulated):
            batch = tokens[(index * micro_batch) % len(tokens) :][:micro_batch]
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss / accumulated
            loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    return _rates(ends, step)


def _rates(ends: list[float], tokens: int) -> dict[str, Any]:
    rates = [tokens / (after - before) for before, after in zip(ends, ends[1:], strict=False)]
    return {"tokens_per_second": rates[_WARM_UP:], "peak_bytes": peak_resident_bytes()}


RIVALS: dict[str, Callable[[RunConfig, str, int], dict[str, Any]]] = {"trainer": _trainer, "loop": _loop}


if __name__ == "__main__":
    sys.exit(main())
