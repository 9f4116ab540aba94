"""How far two honest repetitions of a training are from each other, and how far what was not trained is from both.

    python -m benchmarks.audit --run-dir runs/attacks --output benchmarks/results/audit.md

The training of an expert is done once, as a node does it, keeping a checkpoint at the end of every part. Then every part is
repeated from the node's checkpoint as an audit repeats it (`forge.train.replay`), with other threads, other products and
another micro-batch, and against what a node could hand in instead. Distances are the largest over the matrices of an expert.
The run in --run-dir is made when it is not there; what was measured stays in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
import sys
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
import torch
from torch import Tensor

from benchmarks.common import Kept, heading, table
from forge.config import RunConfig, load_config, parse_config
from forge.files import RunDirectory
from forge.model import names
from forge.model.lm import read_tensors
from forge.pipeline import local_assignment, prepare_run
from forge.train import expert as expert_phase
from forge.train.memory import Products, candidates
from forge.train.replay import MOMENTUM_TOLERANCE, TOLERANCE, Part, compare, replay
from forge.vocabulary import STAGES, kept_file

#: Parts of the training: short ones as by default, and halves.
PARTS = (8, 2)
#: What a repetition is done with: threads, products, which of the memory plans.
HONEST: dict[str, tuple[int, Products, int]] = {
    "the same": (1, "float32", 0), "two threads": (2, "float32", 0), "micro-batch 1": (1, "float32", 1),
    "recomputed activations": (1, "float32", -1), "bfloat16": (1, "bfloat16", 0),
    "bfloat16, two threads, recomputed": (2, "bfloat16", -1)}  # fmt: skip
PRODUCTS: tuple[Products, ...] = ("float32", "bfloat16")


class Bench:
    """One expert, trained by a node that keeps checkpoints, and what an audit makes of its parts."""

    def __init__(self, run: RunDirectory, partition: int, parts: int) -> None:
        self.run, self.partition = run, partition
        tree = run.config.model_dump(mode="json")
        tree["fleet"] |= {"audit": 1.0, "audit_parts": parts}
        self.config: RunConfig = parse_config(tree)
        self.assignment = local_assignment(run, partition) | {"config": tree}
        self.directory = run.work / "audit" / f"p{partition}-{parts}"
        self.steps = [0, *self.config.audit_steps(), self.config.steps("expert")]
        self.plans = {products: [plan.peak_bytes for plan in candidates(self.config, "expert", products)]
                      for products in PRODUCTS}  # fmt: skip
        self.work = run.work / "audit" / "replay"
        self.shared = Path(self.assignment["shared_ffn"])

    def honest(self) -> Path:
        """The node's work directory, trained in float32 with one thread."""
        if not (self.directory / "shard.safetensors").is_file():
            _with(1, "float32")
            expert_phase.train_expert(self.assignment, self.directory, self.plans["float32"][0], lambda **event: None,
                                      lambda: False)  # fmt: skip
        return self.directory

    def part(self, number: int) -> Part:
        """What the node kept of one part."""
        first, last = self.steps[number : number + 2]
        after = "shard.safetensors" if number + 2 == len(self.steps) else kept_file(last)
        return Part(first=first, last=last, before=self.directory / kept_file(first) if first else None,
                    after=self.directory / after)  # fmt: skip

    def repeat(self, part: Part, threads: int, products: Products, plan: int) -> dict[str, float]:
        """The distances that an audit finds."""
        _with(threads, products)
        found = replay(self.assignment, part, self.work, self.plans[products][plan], lambda **event: None, lambda: False)
        return {key: found[key] for key in ("distance", "momentum")}

    def forged(self, number: int) -> Iterator[tuple[str, Part]]:
        """Ways to hand in what was not trained; the part's true beginning, unless the name says otherwise."""
        part, shard = self.part(number), self._weights(self.directory / "shard.safetensors")
        before = self._weights(part.before) if part.before is not None else self._weights(self.shared)
        true = self._weights(part.after)
        yield "the beginning again", self._made(part, before)
        yield "half of the steps", self._half(part)
        random = torch.Generator().manual_seed(number)
        noise = {name: torch.randn(value.shape, generator=random) for name, value in true.items()}
        yield "noise of the right length", self._made(part, {
            name: value + noise[name] * (true[name] - value).norm() / noise[name].norm() for name, value in before.items()})
        middle = {names.ffn_name(self.config.model.n_layers // 2, matrix) for matrix in names.MATRICES}
        yield "one layer with noise of 0.3 of its deviation", self._made(part, {
            name: value + 0.3 * value.std() * noise[name] if name in middle else value for name, value in true.items()})
        yield "one layer with noise of 0.03 of its deviation", self._made(part, {
            name: value + 0.03 * value.std() * noise[name] if name in middle else value for name, value in true.items()})
        start, end = self._weights(self.shared), self.steps[-1]
        line = [{name: start[name] + step / end * (shard[name] - start[name]) for name in start}
                for step in (part.first, part.last)]  # fmt: skip
        first = self.work.parent / "made-before.safetensors"
        _save(first, line[0], part.first, momentum=True)
        yield "points on the line to a finished expert", self._made(
            Part(first=part.first, last=part.last, before=first if part.first else None, after=part.after), line[1])  # fmt: skip

    def other_text(self, part: Part) -> Part:
        """The part trained on the tokens of another partition."""
        other = (self.partition + 1) % self.config.model.n_experts
        text = local_assignment(self.run, other)["train_tokens"]
        return self._trained(part, self.assignment | {"train_tokens": text}, part.last - part.first)

    def _half(self, part: Part) -> Part:
        return self._trained(part, self.assignment, (part.last - part.first) // 2)

    def _trained(self, part: Part, assignment: Mapping[str, Any], steps: int) -> Part:
        """What comes of some steps from the part's beginning, as its end."""
        _with(1, "float32")
        shorter = Part(first=part.first, last=part.first + steps, before=part.before, after=part.after)
        replay(assignment, shorter, self.work, self.plans["float32"][0], lambda **event: None, lambda: False)
        made = self.work.parent / "trained.safetensors"
        (self.work / "checkpoint.safetensors").replace(made)
        return Part(first=part.first, last=part.last, before=part.before, after=made)

    def _weights(self, path: Path) -> dict[str, Tensor]:
        ffn, model = names.ffn_tensors(self.config.model), self.config.model
        with safe_open(path, framework="pt") as file:
            known = set(file.keys())
        if f"model.{next(iter(ffn))}" in known:
            return {name: load_file(path)[f"model.{name}"] for name in ffn}
        if next(iter(ffn)) in known:
            return read_tensors(path, ffn)
        return dict(zip(ffn, read_tensors(path, names.expert_tensors(model, self.partition)).values(), strict=True))

    def _made(self, part: Part, weights: Mapping[str, Tensor]) -> Part:
        made = self.work.parent / "made.safetensors"
        _save(made, weights, part.last, momentum=False)
        return Part(first=part.first, last=part.last, before=part.before, after=made)


def _save(path: Path, weights: Mapping[str, Tensor], step: int, *, momentum: bool) -> None:
    tensors = {f"model.{name}": value.contiguous() for name, value in weights.items()}
    if momentum:
        tensors |= {f"optimizer.{name}.momentum_buffer": torch.zeros_like(value) for name, value in weights.items()}
    save_file(tensors, path, {"facts": f'{{"step": {step}}}'})


def _with(threads: int, products: str) -> None:
    torch.set_num_threads(threads)
    # What another machine would have found the fastest.
    vars(expert_phase)["product_dtype"] = lambda device: getattr(torch, products)


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Every part of one expert, repeated honestly and against forgeries."""
    bench.honest()
    kept, rows = Kept(bench.directory / "measured.jsonl"), []

    def note(kind: str, what: str, number: int, found: Callable[[], dict[str, float]]) -> None:
        length = bench.steps[number + 1] - bench.steps[number]
        rows.append(kept.once(lambda: {"kind": kind, "what": what, "parts": len(bench.steps) - 1, "part": number,
                                       "steps": length, **found()}))  # fmt: skip
        print(rows[-1], flush=True)

    for number in range(len(bench.steps) - 1):
        part = bench.part(number)
        for what, settings in HONEST.items():
            note("honest", what, number, lambda: bench.repeat(part, *settings))  # noqa: B023 - called at once
        # One honest repetition is enough for every forged end of the same part.
        bench.repeat(part, *HONEST["the same"])
        ours = bench.work.parent / "ours.safetensors"
        (bench.work / "checkpoint.safetensors").replace(ours)
        note("forged", "trained on another partition's text", number, lambda: _against(bench, bench.other_text(part), ours))  # noqa: B023
        for what, forged in bench.forged(number):
            if forged.before != part.before:
                note("forged", what, number, lambda: bench.repeat(forged, *HONEST["the same"]))  # noqa: B023
            else:
                note("forged", what, number, lambda: _against(bench, forged, ours))  # noqa: B023
    return rows


def _against(bench: Bench, part: Part, ours: Path) -> dict[str, float]:
    weights, momenta = compare(bench.config, bench.partition, part, ours, bench.shared)
    return {"distance": max(weights.values()), "momentum": max(momenta.values(), default=0.0)}


def main() -> int:
    """Train, repeat, forge, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/attacks"))
    parser.add_argument("--config", default="smoke")
    parser.add_argument("--partitions", type=int, default=1, help="how many experts are trained and audited")
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the config")
    options = parser.parse_args()
    run = prepare_run(options.run_dir, load_config(options.config, options.set), STAGES, ram_bytes=4 << 30, threads=1,
                      on_event=lambda event: None)  # fmt: skip
    rows = [row for partition in range(options.partitions) for parts in PARTS
            for row in measure(Bench(run, partition, parts))]  # fmt: skip
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["kind"] != "honest", row["parts"] < max(PARTS))):
        groups.setdefault((row["kind"], row["what"], row["parts"]), []).append(row)
    text = heading("Repeating a part of a training", "audit") + "\n"
    text += table(["", "repeated with, or handed in", "steps", "cases", "weights: least", "largest", "momenta: least", "most"], [
        [kind, what, "-".join(map(str, sorted({row["steps"] for row in found}))), str(len(found)),
         *(f"{pick(row[key] for row in found):.3g}" for key in ("distance", "momentum") for pick in (min, max))]
        for (kind, what, _), found in groups.items()])  # fmt: skip
    text += f"\nTolerated: {TOLERANCE:g} of the weights, {MOMENTUM_TOLERANCE:g} of the momenta.\n"
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
