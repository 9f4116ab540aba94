"""How far two honest repetitions of a training are from each other, and how far what was not trained is from both.

    python -m benchmarks.audit --run-dir runs/attacks --output benchmarks/results/audit.md

The training of an expert is done once, as a node does it, keeping a checkpoint at the end of every part. Then every part is
repeated from the node's checkpoint as an audit repeats it (`forge.train.replay`), with other threads, other products and
another micro-batch, and against what a node could hand in instead. Distances are the largest over the matrices of an expert.
The run in --run-dir is made when it is not there; what was measured stays in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
import sys
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
import torch
from torch import Tensor

from benchmarks.common import Kept, heading, show, table
from forge.config import RunConfig, load_config, parse_config
from forge.files import RunDirectory
from forge.model import names
from forge.model.lm import read_tensors
from forge.pipeline import local_assignment, prepare_run
from forge.train import expert as expert_phase
from forge.train.memory import Products, candidates
from forge.train.replay import TOLERANCE, Part, compare, replay
from forge.vocabulary import STAGES, kept_file

LINE = "points on the line to a finished expert"
#: Parts of the training, and how many of them a long repetition takes at once.
PARTS, LONG = 8, 4
#: What a repetition is done with: threads, products, which of the memory plans.
HONEST: dict[str, tuple[int, Products, int]] = {
    "the same": (1, "float32", 0), "two threads": (2, "float32", 0), "micro-batch 1": (1, "float32", 1),
    "recomputed activations": (1, "float32", -1), "bfloat16": (1, "bfloat16", 0),
    "bfloat16, two threads, recomputed": (2, "bfloat16", -1)}  # fmt: skip
PRODUCTS: tuple[Products, ...] = ("float32", "bfloat16")


class Bench:
    """One expert, trained by a node that keeps checkpoints, and what an audit makes of its parts."""

    def __init__(self, run: RunDirectory, partition: int) -> None:
        self.run, self.partition = run, partition
        tree = run.config.model_dump(mode="json")
        tree["fleet"] |= {"audit": 1.0, "audit_parts": PARTS}
        self.config: RunConfig = parse_config(tree)
        self.assignment = local_assignment(run, partition) | {"config": tree}
        self.directory = run.work / "audit" / f"p{partition}-{PARTS}"
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

    def part(self, number: int, parts: int = 1) -> Part:
        """What the node kept of one part, or of some in a row."""
        first, last = self.steps[number], self.steps[number + parts]
        after = "shard.safetensors" if last == self.steps[-1] else kept_file(last)
        return Part(first=first, last=last, before=self.directory / kept_file(first) if first else None,
                    after=self.directory / after)  # fmt: skip

    def repeat(self, part: Part, threads: int, products: Products, plan: int) -> dict[str, float]:
        """The distances that an audit finds."""
        _with(threads, products)
        found = replay(self.assignment, part, self.work, self.plans[products][plan], lambda **event: None, lambda: False)
        return {key: found[key] for key in ("distance", "momentum")}

    def forged(self, number: int) -> dict[str, Callable[[], Part]]:
        """Ends of a part that were not trained, from its true beginning."""
        part, random = self.part(number), torch.Generator().manual_seed(number)
        before, true = self._weights(part.before or self.shared), self._weights(part.after)
        noise = {name: torch.randn(value.shape, generator=random) for name, value in true.items()}
        middle = {names.ffn_name(self.config.model.n_layers // 2, matrix) for matrix in names.MATRICES}
        random_end = {name: value + noise[name] * (true[name] - value).norm() / noise[name].norm()
                      for name, value in before.items()}  # fmt: skip

        def noisy(strength: float) -> dict[str, Tensor]:
            return {name: value + strength * value.std() * noise[name] if name in middle else value
                    for name, value in true.items()}  # fmt: skip

        return {"the beginning again": partial(self._made, part, before),
                "half of the steps": partial(self.trained, part, (part.last - part.first) // 2),
                "noise of the right length": partial(self._made, part, random_end),
                "one layer with noise of 0.3 of its deviation": partial(self._made, part, noisy(0.3)),
                "one layer with noise of 0.03 of its deviation": partial(self._made, part, noisy(0.03))}  # fmt: skip

    def on_the_line(self, number: int) -> Part:
        """Both ends of a part on the line from the shared FFN to the finished expert, with no momentum."""
        part, start = self.part(number), self._weights(self.shared)
        shard, first = self._weights(self.directory / "shard.safetensors"), self.work.parent / "made-before.safetensors"
        line = [{name: torch.lerp(start[name], shard[name], step / self.steps[-1]) for name in start}
                for step in (part.first, part.last)]  # fmt: skip
        _save(first, line[0], part.first, momentum=True)
        return self._made(Part(first=part.first, last=part.last, before=first if part.first else None, after=part.after), line[1])

    def trained(self, part: Part, steps: int, text: int | None = None) -> Part:
        """What comes of some steps from the part's beginning, as its end; on another partition's tokens if one is given."""
        tokens = self.assignment["train_tokens"] if text is None else local_assignment(self.run, text)["train_tokens"]
        _with(1, "float32")
        shorter = Part(first=part.first, last=part.first + steps, before=part.before, after=part.after)
        replay(self.assignment | {"train_tokens": tokens}, shorter, self.work, self.plans["float32"][0], lambda **event: None,
               lambda: False)  # fmt: skip
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


def measure(bench: Bench, parts: int) -> list[dict[str, Any]]:
    """The first parts of one expert's training, repeated honestly and against forgeries."""
    bench.honest()
    kept, rows = Kept(bench.directory / "measured.jsonl"), []
    ours = bench.work.parent / "ours.safetensors"
    repeated: list[Part] = []

    def against(part: Part, make: Callable[[], Part]) -> dict[str, float]:
        """A forged end against an honest repetition of the part, of which one is enough."""
        if repeated != [part]:
            repeated[:] = [part]
            bench.repeat(part, *HONEST["the same"])
            (bench.work / "checkpoint.safetensors").replace(ours)
        weights, momenta = compare(bench.config, bench.partition, make(), ours, bench.shared)
        return {"distance": max(weights.values()), "momentum": max(momenta.values(), default=0.0)}

    def note(kind: str, what: str, part: Part, found: Callable[[], dict[str, float]]) -> None:
        about = {"kind": kind, "what": what, "first": part.first, "steps": part.last - part.first}
        rows.append(kept.once(lambda: about | found()))
        print(rows[-1], flush=True)

    for number in range(parts):
        part = bench.part(number)
        for what, settings in HONEST.items():
            note("honest", what, part, partial(bench.repeat, part, *settings))
        other = (bench.partition + 1) % bench.config.model.n_experts
        note("forged", "trained on another partition's text", part,
             partial(against, part, partial(bench.trained, part, part.last - part.first, other)))  # fmt: skip
        for what, make in bench.forged(number).items():
            note("forged", what, part, partial(against, part, make))
        note("forged", LINE, part, lambda: bench.repeat(bench.on_the_line(number), *HONEST["the same"]))  # noqa: B023
    for number in range(parts):
        part = bench.part(number)
        fewer = partial(bench.trained, part, part.last - part.first - 1)
        note("forged", "all steps but one", part, partial(against, part, fewer))
    for number in range(0, PARTS, LONG):
        note("honest", "bfloat16", long := bench.part(number, LONG), partial(bench.repeat, long, *HONEST["bfloat16"]))
    return rows


def main() -> int:
    """Train, repeat, forge, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/attacks"))
    parser.add_argument("--config", default="smoke")
    parser.add_argument("--partitions", type=int, default=1, help="how many experts are trained and audited")
    parser.add_argument("--parts", type=int, default=PARTS, help=f"how many of the {PARTS} parts are repeated")
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the config")
    options = parser.parse_args()
    run = prepare_run(options.run_dir, load_config(options.config, options.set), STAGES, ram_bytes=4 << 30, threads=1,
                      on_event=lambda event: None)  # fmt: skip
    rows = [row for partition in range(options.partitions) for row in measure(Bench(run, partition), options.parts)]
    groups: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["kind"] != "honest"):
        groups.setdefault((row["kind"], row["what"], row["steps"] > rows[0]["steps"] * LONG / 2), []).append(row)
    text = heading("Repeating a part of a training", "audit") + "\n"
    text += table(["", "repeated with, or handed in", "steps", "cases", "weights: least", "largest", "momenta: least", "most"], [
        [kind, what, "-".join(map(str, sorted({row["steps"] for row in found}))), str(len(found)),
         *(f"{pick(row[key] for row in found):.3g}" for key in ("distance", "momentum") for pick in (min, max))]
        for (kind, what, _), found in groups.items()])  # fmt: skip
    text += f"\nTolerated: {TOLERANCE:g}. Momenta are compared where a training made both ends; else 0 stands there.\n"
    show(text, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
