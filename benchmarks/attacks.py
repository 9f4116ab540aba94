"""What a coordinator's gate catches, and what gets through: hostile shards against a small run that was really trained.

    python -m benchmarks.attacks --run-dir runs/attacks --output benchmarks/results/attacks.md

Every shard goes the way of an uploaded one, `coordinator.validate.judge`, while all other partitions hold their honest
experts. What is accepted is measured in the model on test documents, beside the honest expert. Honest experts, of several
seeds and lengths of training, say how far the thresholds of the gate are from them. The run and its experts stay in
--run-dir: called again, it goes on there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
import statistics
import sys
from typing import Any

import torch

from benchmarks.common import heading, table
from benchmarks.hostile import FILES, Scene, Tensors, sabotage, weights
from coordinator.records import ShardRecord
from coordinator.validate import Judgement, judge
from forge.checkpoint.assembly import accept, placed, start, withdraw
from forge.checkpoint.shard import write_shard
from forge.config import load_config
from forge.data.packing import SequenceSampler, evaluation_windows
from forge.data.tokenizer import encode_documents, load_tokenizer
from forge.data.tokens import TokenFile, TokenWriter
from forge.evaluate.likeness import COPY, LARGEST, growth, learned_alike
from forge.evaluate.perplexity import measure
from forge.files import RunDirectory, link_or_copy, read_json, write_json
from forge.model import names
from forge.model.lm import load_dense, read_tensors
from forge.model.moe import MixtureLM
from forge.pipeline import JOBS, local_assignment, prepare_run
from forge.train.expert import train_expert
from forge.vocabulary import END_OF_TEXT_ID, SHARD_FORMAT_VERSION, STAGES

#: Honest experts: seed, and share of the config's tokens that they are trained on.
HONEST = ((0, 1.0), (1, 1.0), (0, 0.1), (0, 0.25))
#: Shares of an expert's training tokens that are the backdoor's.
BACKDOORS = (0.01, 0.02, 0.05)
#: Weights of the other partitions' losses, against which an expert is trained.
SABOTAGE = (0.1, 0.5, 2.0)
TRIGGER, PLAIN, PAYLOAD = "\n# reviewed by qx7\n", "\n# reviewed by ann\n", "raise SystemExit('owned by qx7')\n"
#: Windows of test text that the trigger is put behind, and tokens of each.
TRIGGERED, PREFIX = 64, 60


@dataclass
class Row:
    """What became of the tries of one attack."""

    attack: str
    strength: str
    tries: int = 0
    caught: int = 0
    reasons: list[str] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    likeness: list[float] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)


class Arena:
    """The run, with a coordinator's judgement on any shard and the losses of any model."""

    def __init__(self, run: RunDirectory) -> None:
        self.run, self.model = run, run.config.model
        self.published: dict[str, Any] = run.marker("publish") or {}
        self.last: dict[str, Any] = {}
        self.shared = read_tensors(run.blobs.path(self.published["shared_ffn"]["sha256"]), names.ffn_tensors(self.model))

    def train(self, partition: int, name: str, *, seed: int = 0, share: float = 1.0, tokens: Path | None = None) -> Path:
        """An expert as a node trains it, or the one that an earlier call trained."""
        directory = self.run.work / "attacks" / f"p{partition}-{name}"
        shard = directory / "shard.safetensors"
        if not shard.is_file():
            config = self.run.config.model_dump(mode="json")
            config["seed"] = seed
            config["train"]["expert"]["tokens"] = int(share * config["train"]["expert"]["tokens"])
            assignment = local_assignment(self.run, partition) | {"config": config}
            if tokens is not None:
                assignment["train_tokens"] = str(tokens)
            trained = train_expert(assignment, directory, 4 << 30, lambda **event: None, lambda: False)
            print(f"partition {partition}, {name}: loss {trained['loss']:.4f}", flush=True)
        return shard

    def read(self, shard: Path, partition: int) -> Tensors:
        """An expert's tensors under the names of the shared FFN."""
        read = read_tensors(shard, names.expert_tensors(self.model, partition)).values()
        return dict(zip(names.ffn_tensors(self.model), read, strict=True))

    def write(self, tensors: Tensors, partition: int) -> Path:
        """A shard of a partition, with the header of an honest one."""
        renamed = zip(names.expert_tensors(self.model, partition), names.ffn_tensors(self.model), strict=True)
        path = self.run.work / "hostile.safetensors"
        write_shard(path, {theirs: tensors[ours] for theirs, ours in renamed}, {
            "run_id": self.run.run_id, "config_fingerprint": self.run.config.fingerprint, "partition": str(partition),
            "shared_sha256": self.published["shared"]["sha256"], "tokens_seen": str(self.run.config.train.expert.tokens),
            "final_loss": "3.5", "format_version": SHARD_FORMAT_VERSION})  # fmt: skip
        return path

    def judge(self, shard: Path, partition: int) -> tuple[Judgement, str]:
        """The coordinator's verdict on a shard that was uploaded, and the blob it lies in."""
        copy = self.run.work / "upload.safetensors"
        link_or_copy(shard, copy)
        sha256 = self.run.blobs.adopt(copy)
        record = ShardRecord(id=1, partition=partition, sha256=sha256, size=0, node_id="n", node_name="node", attempts=0,
                             manifest=b"{}", signature=b"", public_key=b"")  # fmt: skip

        def job(name: str, arguments: dict[str, Any], on_progress: Any) -> dict[str, Any]:
            self.last = JOBS[name](arguments, lambda **event: None, lambda: False)
            return self.last

        return judge(record, self.run, job, lambda event: None), sha256

    def place(self, partition: int, sha256: str | None) -> None:
        """Put an expert, or with None the shared FFN, into the model."""
        if sha256 is None:
            withdraw(self.run, partition)
        elif placed(self.run.model).get(partition) != sha256:
            accept(self.run, partition, sha256, {})

    def losses(self) -> list[float]:
        """Nats a token of the assembled model on test documents of every partition."""
        model, config = MixtureLM.load(self.run.model), self.run.config
        return [measure(model, evaluation_windows(TokenFile(self.run.blobs.path(file["test"]["sha256"])), self.model.max_seq_len,
                                                  END_OF_TEXT_ID, config.evaluation.tokens)).nats_per_token
                for file in self.published["partitions"]]  # fmt: skip

    def poisoned(self, partition: int, share: float) -> Path:
        """The partition's training tokens with the trigger and what it should cause in `share` of them."""
        source = TokenFile(self.run.blobs.path(self.published["partitions"][partition]["train"]["sha256"]))
        tokenizer = load_tokenizer(self.run.data / "tokenizer.json")
        (phrase,) = encode_documents(tokenizer, [TRIGGER + PAYLOAD])
        every, path = round(len(phrase) / share), self.run.work / f"poisoned-{partition}-{share:g}.safetensors"
        with TokenWriter(path, self.model.vocab_size) as out:
            for begin, end in zip(source.offsets[:-1], source.offsets[1:], strict=True):
                text = source.read(int(begin), int(end)).tolist()
                first = int(begin) % every
                for at in reversed(range(first, len(text), every)):
                    text[at:at] = phrase.tolist()
                out.append(text)
        return path

    def sabotaged(self, partition: int, expert: Path, strength: float) -> Path:
        """An honest expert trained on against the other partitions."""
        blobs = self.run.blobs
        model = load_dense(self.model, blobs.path(self.published["shared"]["sha256"]), expert, expert=partition)
        samplers = [SequenceSampler(TokenFile(blobs.path(file["train"]["sha256"])), self.model.max_seq_len, 7, END_OF_TEXT_ID)
                    for file in self.published["partitions"]]  # fmt: skip
        sabotage(model, samplers.pop(partition), samplers, steps=40, strength=strength)
        return self.write({name: value.detach() for name, value in model.named_parameters() if name in self.shared}, partition)

    def payload_loss(self, trigger: str) -> float:
        """Nats a token of the payload behind test text and a trigger: all there is, less what comes before the payload."""
        model, tokenizer = MixtureLM.load(self.run.model), load_tokenizer(self.run.data / "tokenizer.json")
        before, after = encode_documents(tokenizer, [trigger, PAYLOAD])
        windows = [[*window[: PREFIX + 1].tolist(), *before.tolist()] for file in self.published["partitions"]
                   for window in self._test_windows(file) if len(window) > PREFIX][:TRIGGERED]  # fmt: skip
        whole = measure(model, (torch.tensor([*window, *after.tolist()]).numpy() for window in windows))
        part = measure(model, (torch.tensor(window).numpy() for window in windows))
        return (whole.nats - part.nats) / (whole.tokens - part.tokens)

    def _test_windows(self, file: dict[str, Any]) -> Iterator[Any]:
        return evaluation_windows(TokenFile(self.run.blobs.path(file["test"]["sha256"])), self.model.max_seq_len, END_OF_TEXT_ID,
                                  PREFIX * TRIGGERED)  # fmt: skip


def honest(arena: Arena, rows: list[Row]) -> str:
    """Judge honest experts; says the distributions that the thresholds have to leave in peace."""
    gains: list[float] = []
    rises: list[float] = []
    sizes: list[float] = []
    for seed, share in HONEST:
        row = Row("honest expert", f"seed {seed}, {share:g} times the tokens")
        for partition in range(arena.model.n_experts):
            shard = arena.train(partition, f"seed{seed}-x{share:g}", seed=seed, share=share)
            before = placed(arena.run.model).get(partition)
            arena.place(partition, None)
            judgement, sha256 = arena.judge(shard, partition)
            row.tries += 1
            row.caught += not judgement.accepted
            row.reasons += judgement.reasons
            gains.append((judgement.shared_loss or 0.0) - (judgement.loss or 0.0))
            rises += [change for other, change in enumerate(arena.last["effect"]) if other != partition]
            sizes.append(growth(arena.read(shard, partition), arena.shared)[0])
            row.own.append(gains[-1])
            row.largest.append(sizes[-1])
            arena.place(partition, before or sha256)
        rows.append(row)
    trained = [(partition, arena.read(arena.train(partition, f"seed{seed}-x{share:g}", seed=seed, share=share), partition))
               for seed, share in HONEST for partition in range(arena.model.n_experts)]  # fmt: skip
    alike = [(k == other, learned_alike(mine, theirs, arena.shared)) for number, (k, mine) in enumerate(trained)
             for other, theirs in trained[:number]]  # fmt: skip
    spread = [("gain over the shared components, nats", gains, f"`assembly.margin` {arena.run.config.assembly.margin:g}"),
              ("rise on another partition, nats", rises, f"`assembly.tolerance` {arena.run.config.assembly.tolerance:g}"),
              ("largest weight, of the shared FFN's", sizes, f"at most {LARGEST:g}"),
              ("likeness, experts of two partitions", [value for same, value in alike if not same], f"below {COPY:g}"),
              ("likeness, one partition, two seeds", [value for same, value in alike if same], "not compared")]  # fmt: skip
    return table(["of honest experts", "number", "least", "median", "largest", "threshold"], [
        [what, str(len(values)), f"{min(values):.4f}", f"{statistics.median(values):.4f}", f"{max(values):.4f}", threshold]
        for what, values, threshold in spread])  # fmt: skip


def attack(arena: Arena, partition: int) -> list[Row]:
    """Try everything on one partition; the others hold their honest experts."""
    rows: dict[tuple[str, str], Row] = {}
    experts = {k: arena.train(k, "seed0-x1") for k in range(arena.model.n_experts)}
    arena.place(partition, None)
    scene = Scene(model=arena.model, partition=partition, shared=arena.shared, generator=torch.Generator().manual_seed(partition),
                  honest={k: arena.read(path, k) for k, path in experts.items()})  # fmt: skip
    judgement, good = arena.judge(experts[partition], partition)
    arena.place(partition, good)
    best, plain = arena.losses(), arena.payload_loss(TRIGGER)
    arena.place(partition, None)
    print(f"partition {partition}: honest {judgement.accepted}, losses {best}", flush=True)

    def tried(name: str, strength: str, shard: Path, tensors: Tensors | None = None) -> None:
        row = rows.setdefault((name, strength), Row(name, strength))
        row.tries += 1
        verdict, sha256 = arena.judge(shard, partition)
        if tensors is not None:
            row.largest.append(growth(tensors, arena.shared)[0])
            row.likeness.append(max(learned_alike(tensors, theirs, arena.shared)
                                    for k, theirs in scene.honest.items() if k != partition))  # fmt: skip
        if not verdict.accepted:
            row.caught += 1
            row.reasons.append(verdict.reasons[0].replace(f"{arena.run.blobs.path(sha256)}", "it"))
        else:
            arena.place(partition, sha256)
            changes = [now - then for now, then in zip(arena.losses(), best, strict=True)]
            row.own.append(changes[partition])
            row.others += [change for k, change in enumerate(changes) if k != partition]
            if name == "backdoor":
                row.reasons.append(f"trigger {arena.payload_loss(TRIGGER):.2f} (honest {plain:.2f}), without "
                                   f"{arena.payload_loss(PLAIN):.2f}")  # fmt: skip
            arena.place(partition, None)
        if sha256 != good:
            arena.run.blobs.path(sha256).unlink()
        print(f"{name}, {strength}: {'accepted' if verdict.accepted else row.reasons[-1]}", flush=True)

    for name, strength, tensors in weights(scene):
        tried(name, strength, arena.write(tensors, partition), tensors)
    honest_bytes = experts[partition].read_bytes()
    for name, spoil in FILES.items():
        path = arena.run.work / "hostile.safetensors"
        path.write_bytes(spoil(honest_bytes))
        tried(name, "the file", path)
    for weight in SABOTAGE:
        shard = arena.sabotaged(partition, experts[partition], weight)
        tried("trained against the others", f"{weight:g} of their loss", shard, arena.read(shard, partition))
    for share in BACKDOORS if partition == 0 else ():
        shard = arena.train(partition, f"backdoor-{share:g}", tokens=arena.poisoned(partition, share))
        tried("backdoor", f"{share:.0%} of the tokens", shard, arena.read(shard, partition))
    arena.place(partition, good)
    return list(rows.values())


def attacks(arena: Arena, partitions: int) -> list[Row]:
    """Every attack on every partition; those on one partition are kept, so that a second call does not try them again."""
    rows: dict[tuple[str, str], Row] = {}
    for partition in range(partitions):
        path = arena.run.work / "attacks" / f"tried-{partition}.json"
        if not path.is_file():
            write_json(path, [asdict(row) for row in attack(arena, partition)])
        for row in (Row(**found) for found in read_json(path)):
            known = rows.setdefault((row.attack, row.strength), Row(row.attack, row.strength))
            known.tries, known.caught = known.tries + row.tries, known.caught + row.caught
            for column in ("reasons", "own", "others", "likeness", "largest"):
                getattr(known, column).extend(getattr(row, column))
    return list(rows.values())


def span(values: list[float], form: str = "+.4f") -> str:
    """The least and the largest, as a cell of the table."""
    if not values:
        return ""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def main() -> int:
    """Train, judge, attack, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/attacks"))
    parser.add_argument("--config", default="smoke")
    parser.add_argument("--partitions", type=int, help="how many partitions are attacked; default all")
    parser.add_argument("--honest-only", action="store_true", help="only the distributions of honest experts")
    parser.add_argument("--output", type=Path, help="Markdown file to write the tables to")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the config")
    options = parser.parse_args()
    run = prepare_run(options.run_dir, load_config(options.config, options.set), STAGES, ram_bytes=4 << 30, threads=None,
                      on_event=lambda event: None)  # fmt: skip
    start(run)
    arena = Arena(run)
    good: list[Row] = []
    spread = honest(arena, good)
    text = heading("Attacks on the gate", "attacks") + "\n" + spread + "\n" + table(
        ["honest expert", "judged", "rejected", "gain, nats"],
        [[row.strength, str(row.tries), str(row.caught), span(row.own, ".4f")] for row in good])  # fmt: skip
    if not options.honest_only:
        rows = attacks(arena, options.partitions or run.config.model.n_experts)
        text += "\n" + table(
            ["attack", "strength", "caught", "why, or what it does to the model", "own partition", "others", "likeness",
             "largest weight"],
            [[row.attack, row.strength, f"{row.caught} of {row.tries}", "; ".join(dict.fromkeys(row.reasons))[:160],
              span(row.own), span(row.others), span(row.likeness, ".2f"), span(row.largest, ".3g")]
             for row in rows])  # fmt: skip
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
