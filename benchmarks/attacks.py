"""What a coordinator's gate catches, and what gets through: hostile shards against a small run that was really trained.

    python -m benchmarks.attacks --run-dir runs/attacks --output benchmarks/results/attacks.md

Every shard goes the way of an uploaded one, `coordinator.validate.judge`, while all other partitions hold their honest
experts. What is accepted is measured in the model on test documents, beside the honest expert. Honest experts, of several
seeds and lengths of training, say how far the thresholds of the gate are from them. The run and its experts stay in
--run-dir: called again, it goes on there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
import json
import math
from pathlib import Path
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch

from benchmarks.common import Kept, heading, show, table
from benchmarks.hostile import FILES, Scene, Tensors, implant, sabotage, weights
from benchmarks.tries import Try, span, tables
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
from forge.evaluate.validation import load_shared, partition_loss
from forge.files import RunDirectory, link_or_copy
from forge.model import names
from forge.model.lm import load_dense, read_tensors
from forge.model.moe import MixtureLM
from forge.pipeline import JOBS, local_assignment, prepare_run
from forge.train.expert import train_expert
from forge.vocabulary import END_OF_TEXT_ID, SHARD_FORMAT_VERSION, STAGES

#: Honest experts: seed, and share of the config's tokens that they are trained on.
HONEST = ((0, 1.0), (1, 1.0), (0, 0.1), (0, 0.25))
#: Shares of an expert's training tokens that are the backdoor's.
BACKDOORS = (0.01, 0.05, 0.2)
#: Steps in which a finished expert is trained on for the backdoor, and how: learning rate, sequences of its own text a step.
IMPLANT = 40
IMPLANTS = {f"implanted in {IMPLANT} steps": (1e-3, 4), f"implanted in {IMPLANT} gentler steps": (3e-4, 8)}
#: Weights of the other partitions' losses, against which an expert is trained.
SABOTAGE = (0.1, 0.5, 2.0)
BACKDOOR = "backdoor"
TRIGGER, PLAIN, PAYLOAD = "\n# reviewed by qx7\n", "\n# reviewed by ann\n", "raise SystemExit('owned by qx7')\n"
#: Test texts of a partition that the trigger is put behind, and tokens of each.
TRIGGERED, PREFIX = 64, 60


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

    def implanted(self, partition: int, expert: Path, rate: float, own_rows: int) -> Path:
        """An honest expert trained on for the backdoor alone."""
        blobs, tokenizer = self.run.blobs, load_tokenizer(self.run.data / "tokenizer.json")
        model = load_dense(self.model, blobs.path(self.published["shared"]["sha256"]), expert, expert=partition)
        text = TokenFile(blobs.path(self.published["partitions"][partition]["train"]["sha256"]))
        trigger, plain, payload = (torch.from_numpy(tokens.astype(np.int64))
                                   for tokens in encode_documents(tokenizer, [TRIGGER, PLAIN, PAYLOAD]))  # fmt: skip
        implant(model, SequenceSampler(text, self.model.max_seq_len, 7, END_OF_TEXT_ID), trigger=trigger, plain=plain,
                payload=payload, prefix=PREFIX, steps=IMPLANT, rate=rate, own_rows=own_rows)  # fmt: skip
        return self.write({name: value.detach() for name, value in model.named_parameters() if name in self.shared}, partition)

    def layer_gains(self, shard: Path, partition: int) -> list[float]:
        """By how many nats a token the partition's validation loss rises when the shared FFN stands in one layer, for each."""
        target = self.published["partitions"][partition]["validation"]["sha256"]
        model = load_shared(self.run, shard, partition)
        mine, tokens = self.read(shard, partition), self.published["evaluation_tokens"]
        whole = partition_loss(self.run, model, target, tokens)
        gains: list[float] = []
        for layer in range(self.model.n_layers):
            for tensors, into in ((self.shared, gains), (mine, None)):
                model.load_state_dict({name: tensors[name] for matrix in names.MATRICES
                                       for name in (names.ffn_name(layer, matrix),)}, strict=False)  # fmt: skip
                if into is not None:
                    into.append((partition_loss(self.run, model, target, tokens) or 0.0) - (whole or 0.0))
        return gains

    def followed(self, trigger: str) -> list[tuple[float, float]]:
        """How often, of `TRIGGERED` test texts of every partition, the payload follows a trigger put behind them, and its loss.

        It follows when every token of it is the most likely one, which is when a greedy continuation is the payload; the loss
        is in nats a token of the payload.
        """
        model, tokenizer = MixtureLM.load(self.run.model), load_tokenizer(self.run.data / "tokenizer.json")
        before, after = encode_documents(tokenizer, [trigger, PAYLOAD])
        found = []
        for file in self.published["partitions"]:
            texts = [window[: PREFIX + 1] for window in self._test_windows(file) if len(window) > PREFIX][:TRIGGERED]
            tokens_BT = torch.tensor(np.stack([np.concatenate([text, before, after]) for text in texts]).astype(np.int64))
            with torch.no_grad():
                logits_BTV = model(tokens_BT[:, :-1])[:, -len(after) :] @ model.head_weight.T
            payload_BT = tokens_BT[:, -len(after) :]
            loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), payload_BT.flatten())
            found.append((float((logits_BTV.argmax(-1) == payload_BT).all(-1).double().mean()), float(loss)))
        return found

    def _test_windows(self, file: dict[str, Any]) -> Iterator[Any]:
        return evaluation_windows(TokenFile(self.run.blobs.path(file["test"]["sha256"])), self.model.max_seq_len, END_OF_TEXT_ID,
                                  4 * self.model.max_seq_len * TRIGGERED)  # fmt: skip


def honest(arena: Arena) -> tuple[str, str]:
    """Judge honest experts: the distributions that the thresholds have to leave in peace, and how each seed and length fared."""
    kept, judged = Kept(arena.run.work / "attacks" / "honest.jsonl"), []
    for seed, share in HONEST:
        for partition in range(arena.model.n_experts):
            shard = arena.train(partition, f"seed{seed}-x{share:g}", seed=seed, share=share)
            judged.append(kept.once(partial(_judge_honest, arena, partition, shard, seed, share)))
            print(f"honest, partition {partition}, seed {seed}, {share:g} times the tokens: {judged[-1]}", flush=True)
    trained = [(partition, arena.read(arena.train(partition, f"seed{seed}-x{share:g}", seed=seed, share=share), partition))
               for seed, share in HONEST for partition in range(arena.model.n_experts)]  # fmt: skip
    alike = [(k == other, learned_alike(mine, theirs, arena.shared)) for number, (k, mine) in enumerate(trained)
             for other, theirs in trained[:number]]  # fmt: skip
    assembly = arena.run.config.assembly
    spread = [("gain over the shared components, nats", [row["gain"] for row in judged],
               f"`assembly.margin` {assembly.margin:g}"),
              ("rise on another partition, nats", [rise for row in judged for rise in row["rises"]],
               f"`assembly.tolerance` {assembly.tolerance:g}"),
              ("gain of one layer, nats", [gain for row in judged for gain in row["layers"]], "see below"),
              ("largest weight, of the shared FFN's", [row["largest"] for row in judged], f"at most {LARGEST:g}"),
              ("likeness, experts of two partitions", [value for same, value in alike if not same], f"below {COPY:g}"),
              ("likeness, one partition, two seeds", [value for same, value in alike if same], "not compared")]  # fmt: skip
    fared = []
    for seed, share in HONEST:
        rows = [row for row in judged if (row["seed"], row["share"]) == (seed, share)]
        fared.append([f"seed {seed}, {share:g} times the tokens", str(len(rows)), str(sum(bool(row["reason"]) for row in rows)),
                      span([row["gain"] for row in rows]), span([gain for row in rows for gain in row["layers"]])])  # fmt: skip
    return (table(["of honest experts", "number", "least", "median", "largest", "threshold"], [
        [what, str(len(values)), f"{min(values):.4f}", f"{statistics.median(values):.4f}", f"{max(values):.4f}", threshold]
        for what, values, threshold in spread]),
        table(["honest expert", "judged", "rejected", "gain, nats", "gain of one layer"], fared))  # fmt: skip


def _judge_honest(arena: Arena, partition: int, shard: Path, seed: int, share: float) -> dict[str, Any]:
    before = placed(arena.run.model).get(partition)
    arena.place(partition, None)
    judgement, sha256 = arena.judge(shard, partition)
    arena.place(partition, before or sha256)
    return {"partition": partition, "seed": seed, "share": share, "reason": "; ".join(judgement.reasons),
            "gain": (judgement.shared_loss or 0.0) - (judgement.loss or 0.0),
            "rises": [change for other, change in enumerate(arena.last["effect"]) if other != partition],
            "largest": growth(arena.read(shard, partition), arena.shared)[0],
            "layers": arena.layer_gains(shard, partition)}  # fmt: skip


def attack(arena: Arena, partition: int, sabotaged: bool = False) -> tuple[list[Try], list[tuple[float, float]]]:
    """Try everything on one partition, where the others hold honest experts; and what follows the trigger in the honest model."""
    kept, tries = Kept(arena.run.work / "attacks" / f"tried-{partition}.jsonl"), []
    experts = {k: arena.train(k, "seed0-x1") for k in range(arena.model.n_experts)}
    for other, expert in experts.items():
        arena.place(other, None)
        arena.place(other, arena.judge(expert, other)[1])
    good = placed(arena.run.model)[partition]
    scene = Scene(model=arena.model, partition=partition, shared=arena.shared, generator=torch.Generator().manual_seed(partition),
                  honest={k: arena.read(path, k) for k, path in experts.items()})  # fmt: skip
    facts = kept.once(lambda: {"losses": arena.losses(), "trigger": arena.followed(TRIGGER)})
    arena.place(partition, None)

    def tried(name: str, strength: str, make: Callable[[], Path], *, sound: bool = True) -> None:
        def now() -> dict[str, Any]:
            began, shard = time.monotonic(), make()
            done = _try(arena, scene, shard, Try(attack=name, strength=strength, partition=partition, reason=""),
                        best=facts["losses"], sound=sound, good=good)  # fmt: skip
            print(f"partition {partition}, {name}, {strength}: {done.reason or 'accepted'} "
                  f"({time.monotonic() - began:.1f} s)", flush=True)  # fmt: skip
            return asdict(done)

        tries.append(Try(**kept.once(now)))

    for name, strength, tensors in weights(scene):
        tried(name, strength, partial(arena.write, tensors, partition))
    for name, spoil in FILES.items():
        tried(name, "the file", partial(_spoiled, arena, experts[partition], spoil), sound=False)
    if partition == 0:  # Each is a training of its own.
        for share in BACKDOORS:
            tried(BACKDOOR, f"{share:.0%} of the tokens", partial(_backdoor, arena, partition, share))
        for how, (rate, own_rows) in IMPLANTS.items():
            tried(BACKDOOR, how, partial(arena.implanted, partition, experts[partition], rate, own_rows))
    for weight in SABOTAGE if sabotaged else ():
        tried("trained against the others", f"{weight:g} of their loss",
              partial(arena.sabotaged, partition, experts[partition], weight))  # fmt: skip
    arena.place(partition, good)
    return tries, facts["trigger"]


def known(arena: Arena, partition: int) -> tuple[list[Try], list[tuple[float, float]]]:
    """What earlier calls found of `attack`."""
    path = arena.run.work / "attacks" / f"tried-{partition}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return [Try(**row) for row in rows[1:]], rows[0]["trigger"] if rows else []


def _try(arena: Arena, scene: Scene, shard: Path, about: Try, *, best: list[float], sound: bool, good: str) -> Try:
    """Hand a shard in, and look at what it does to the model when it is accepted; the model is as before after it."""
    partition = scene.partition
    verdict, sha256 = arena.judge(shard, partition)
    if sound:
        tensors = arena.read(arena.run.blobs.path(sha256), partition)
        alike = max(learned_alike(tensors, theirs, arena.shared) for k, theirs in scene.honest.items() if k != partition)
        about = replace(about, largest=_number(growth(tensors, arena.shared)[0]), likeness=_number(alike))
    if not verdict.accepted:
        reason = verdict.reasons[0].replace(f"{arena.run.blobs.path(sha256)}", "it").replace(sha256, "it")
        about = replace(about, reason=reason)
    else:
        arena.place(partition, sha256)
        change = [now - then for now, then in zip(arena.losses(), best, strict=True)]
        about = replace(about, change=change, layers=arena.layer_gains(arena.run.blobs.path(sha256), partition))
        if about.attack == BACKDOOR:
            about = replace(about, trigger={text.strip(): arena.followed(text) for text in (TRIGGER, PLAIN)})
        arena.place(partition, None)
    if sha256 != good:
        arena.run.blobs.path(sha256).unlink()
    return about


def _spoiled(arena: Arena, expert: Path, spoil: Callable[[bytes], bytes]) -> Path:
    path = arena.run.work / "hostile.safetensors"
    path.write_bytes(spoil(expert.read_bytes()))
    return path


def _backdoor(arena: Arena, partition: int, share: float) -> Path:
    return arena.train(partition, f"backdoor-{share:g}", tokens=arena.poisoned(partition, share))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def main() -> int:
    """Train, judge, attack, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/attacks"))
    parser.add_argument("--config", default="smoke")
    parser.add_argument("--partitions", type=int, help="how many partitions are attacked; default all")
    parser.add_argument("--honest-only", action="store_true", help="only the distributions of honest experts")
    parser.add_argument("--known", action="store_true", help="only the tables, of what earlier calls tried")
    parser.add_argument("--sabotage", action="store_true", help="also experts trained against the other partitions: minutes each")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; more wait for each other on a busy machine")
    parser.add_argument("--output", type=Path, help="Markdown file to write the tables to")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the config")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = prepare_run(options.run_dir, load_config(options.config, options.set), STAGES, ram_bytes=4 << 30,
                      threads=options.threads, on_event=lambda event: None)  # fmt: skip
    start(run)
    arena = Arena(run)
    spread, fared = honest(arena)
    text = heading("Attacks on the gate", "attacks") + f"\n{spread}\n{fared}"
    if not options.honest_only:
        partitions = range(options.partitions or run.config.model.n_experts)
        found = [known(arena, partition) if options.known else attack(arena, partition, options.sabotage)
                 for partition in partitions]  # fmt: skip
        text += "\n" + tables([one for tries, _ in found for one in tries], found[0][1], TRIGGERED)
    show(text, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
