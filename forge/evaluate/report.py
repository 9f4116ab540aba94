"""The evaluation of an assembled model: one JSON row for `reports/evaluation.json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from forge.config import EvaluationConfig
from forge.data.tokenizer import load_tokenizer
from forge.data.tokens import TokenFile
from forge.errors import DataError
from forge.evaluate.contributions import contributions
from forge.evaluate.explain import explain
from forge.evaluate.generate import Sampling, generate
from forge.evaluate.heldout import HeldOut, Measured
from forge.evaluate.perplexity import Loss, Observer, figures, finite, pooled
from forge.evaluate.rivals import compare
from forge.evaluate.router_report import RouterReport
from forge.model.moe import MixtureLM, Routing

#: Tokens of a held-out document that a generated sample continues.
PROMPT_TOKENS = 16

Progress = Callable[..., None]


def _silent(**_: Any) -> None:
    """Report nothing."""


def evaluate_model(
    model_dir: Path, test_files: Sequence[Path], tokenizer_path: Path, config: EvaluationConfig, *, final: bool,
    shared: Measured | None = None, arrived: Sequence[int] | None = None, shared_ffn: Path | None = None,
    progress: Progress = _silent,
) -> dict[str, Any]:  # fmt: skip
    """Measure an assembled model on the held-out documents of every partition.

    Args:
        model_dir: the assembled model.
        test_files: token file of each partition's held-out documents, in the order of the partitions.
        tokenizer_path: `tokenizer.json`.
        config: how many tokens to measure on, how many samples to write.
        final: whether to measure every expert alone, and to add samples.
        shared: losses of the shared components alone on the same windows, if known.
        arrived: the experts that have arrived; none for all of them.
        shared_ffn: safetensors file of the shared FFN; without it no contribution is measured.
        progress: called as `progress(stage=, step=, steps=, message=)` after each partition.

    Returns:
        `experts` (how many have arrived), `arrived` (which) and `final`; `partitions`, each with `partition`, `tokens`,
        `loss` (nats a token), `perplexity`, `bits_per_byte` and `shared_loss`; the means of `perplexity.figures` over
        these, those of the shared components with the prefix `shared_`; `router` (see `RouterReport.result`);
        `compared_tokens`, `rivals` and `matrix` (see `rivals.compare`); `contributions` (see `contributions.contributions`;
        before the end only if all of them cost no more than the evaluation); `explanation` (sentences); and with `final`
        `samples`. What was not measured is null.

    Raises:
        StorageError: the model or a token file cannot be read.
        ConfigError: the model is not one that can be loaded.
        DataError: no partition has held-out documents.
    """
    model = MixtureLM.load(model_dir)
    tokenizer = load_tokenizer(tokenizer_path)
    held_out = HeldOut.of(test_files, model.config, config)
    report = RouterReport(model.config.n_layers, held_out.partitions, model.config.n_experts)

    def observe(partition: int) -> Observer:
        def watch(routing: list[Routing], kept_N: Any) -> None:
            report.add(partition, routing, kept_N)

        return watch

    def after(partition: int, loss: Loss) -> None:
        progress(stage="evaluate", step=partition + 1, steps=held_out.partitions, loss=finite(loss.nats_per_token))

    ours = held_out.measure(model, tokenizer, observe=observe, after=after)
    if not pooled(ours.all).tokens:
        raise DataError("No partition has held-out documents to evaluate on: raise data.test_fraction or add text.")
    arrived = range(model.config.n_experts) if arrived is None else arrived
    row = {"experts": len(arrived), "arrived": list(arrived), "final": final, "router": report.result(), "samples": [],
           **summary(ours.all, None if shared is None else shared.all)}  # fmt: skip
    progress(stage="evaluate", step=held_out.partitions, steps=held_out.partitions, message="comparing with its rivals")
    row |= compare(model, tokenizer, held_out, ours.compared, None if shared is None else shared.compared, arrived,
                   every=final)  # fmt: skip
    row["contributions"] = None
    if shared_ffn is not None and (final or model.config.n_experts <= held_out.stride):
        progress(stage="evaluate", step=held_out.partitions, steps=held_out.partitions, message="taking one expert out at a time")
        row["contributions"] = contributions(model, shared_ffn, held_out, arrived)
    row["explanation"] = explain(row)
    if final:
        row["samples"] = samples(model, tokenizer, held_out.files, config)
    return row


def summary(losses: Sequence[Loss], shared: Sequence[Loss] | None) -> dict[str, Any]:
    """The losses of all partitions as rows and means, in JSON values; `evaluate_model` says what they are."""
    beside = [Loss()] * len(losses) if shared is None else shared
    rows = [
        {"partition": partition, "tokens": loss.tokens, "loss": finite(loss.nats_per_token),
         "perplexity": finite(loss.perplexity), "bits_per_byte": finite(loss.bits_per_byte),
         "shared_loss": finite(other.nats_per_token)}
        for partition, (loss, other) in enumerate(zip(losses, beside, strict=True))
    ]  # fmt: skip
    means, shared_means = figures(losses), figures(beside)
    del means["losses"], shared_means["losses"]
    return {"partitions": rows, **means, **{f"shared_{name}": value for name, value in shared_means.items()}}


def samples(
    model: MixtureLM, tokenizer: Tokenizer, files: Sequence[TokenFile], config: EvaluationConfig
) -> list[dict[str, Any]]:
    """Generated texts that continue the beginnings of held-out documents, one partition after another.

    Returns:
        `partition`, `prompt`, `text` (the continuation) and `seed` of each.
    """
    context = model.config.max_seq_len
    prompt_tokens = min(PROMPT_TOKENS, context // 2)
    filled = [(partition, file) for partition, file in enumerate(files) if len(file)]
    written = []
    for seed in range(config.samples if filled else 0):
        partition, file = filled[seed % len(filled)]
        document = file.document((seed // len(filled)) % len(file))
        prompt = tokenizer.decode([int(token) for token in document[:prompt_tokens]])
        room = context - max(1, len(tokenizer.encode(prompt).ids))
        text = generate(model, tokenizer, prompt, Sampling(min(config.sample_tokens, room), seed=seed))
        written.append({"partition": partition, "prompt": prompt, "text": text, "seed": seed})
    return written
