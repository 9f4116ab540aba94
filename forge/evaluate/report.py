"""The evaluation of an assembled model: one JSON row for `reports/evaluation.json`, and losses on a user's texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from forge.config import EvaluationConfig
from forge.data.packing import evaluation_windows
from forge.data.tokenizer import encode_documents, load_tokenizer, token_bytes
from forge.data.tokens import TokenFile
from forge.errors import ConfigError, DataError, StorageError
from forge.evaluate.generate import generate
from forge.evaluate.perplexity import Loss, equal_weight_mean, expert_matrix, measure, perplexity, pooled
from forge.evaluate.router_report import RouterReport
from forge.model.moe import MixtureLM, Routing
from forge.vocabulary import END_OF_TEXT_ID

#: Tokens of a held-out document that a generated sample continues.
PROMPT_TOKENS = 16
#: Held-out tokens a partition that the experts x partitions matrix uses at least. It uses `tokens / n_experts`, so that
#: all its rows together cost as much as the evaluation itself.
MATRIX_MIN_TOKENS = 2048

Progress = Callable[..., None]


def _silent(**_: Any) -> None:
    """Report nothing."""


def evaluate_model(
    model_dir: Path, test_files: Sequence[Path], tokenizer_path: Path, config: EvaluationConfig, *, final: bool,
    shared_losses: Sequence[float | None], experts: int | None = None, progress: Progress = _silent,
) -> dict[str, Any]:  # fmt: skip
    """Measure an assembled model on the held-out documents of every partition.

    Args:
        model_dir: the assembled model.
        test_files: token file of each partition's held-out documents, in the order of the partitions.
        tokenizer_path: `tokenizer.json`.
        config: how many tokens to measure on, how many samples to write.
        final: whether to add the experts x partitions matrix and the samples.
        shared_losses: nats a token of the shared components alone on the same documents of each partition, if known.
        experts: how many experts have arrived; none counts all of them.
        progress: called as `progress(stage=, step=, steps=, message=)` after each partition.

    Returns:
        `experts`; `partitions`, each with `partition`, `tokens`, `loss` (nats a token), `perplexity`, `bits_per_byte`
        and `shared_loss`; `mean_loss` and `mean_perplexity` (equal weight of the partitions; the perplexity is exp of
        the mean loss); `shared_mean_loss` and `shared_mean_perplexity`; `pooled_loss`, `pooled_perplexity` and
        `pooled_bits_per_byte` (equal weight of the tokens); `router` (see `RouterReport.result`); and with `final`
        `matrix` (experts x partitions, nats a token, on fewer tokens) and `samples`. What was not measured is null.

    Raises:
        StorageError: the model or a token file cannot be read.
        ConfigError: the model is not one that can be loaded.
        DataError: no partition has held-out documents.
    """
    model = MixtureLM.load(model_dir)
    tokenizer = load_tokenizer(tokenizer_path)
    files = [TokenFile(path) for path in test_files]
    seq_len = model.config.max_seq_len

    def windows(partition: int, tokens: int = config.tokens) -> Iterator[npt.NDArray[Any]]:
        yield from evaluation_windows(files[partition], seq_len, END_OF_TEXT_ID, tokens)

    losses, router = _measure_partitions(model, tokenizer, windows, len(files), progress)
    if not pooled(losses).tokens:
        raise DataError("No partition has held-out documents to evaluate on: raise data.test_fraction or add text.")
    row = {"experts": model.config.n_experts if experts is None else experts, "final": final,
           **summary(losses, shared_losses), "router": router, "matrix": None, "samples": []}  # fmt: skip
    if final:
        fewer = max(MATRIX_MIN_TOKENS, config.tokens // model.config.n_experts)
        progress(stage="evaluate", step=len(files), steps=len(files), message="every expert on every partition")
        row["matrix"] = expert_matrix(model, lambda partition: windows(partition, fewer), len(files))
        row["samples"] = samples(model, tokenizer, files, config)
    return row


def summary(losses: Sequence[Loss], shared_losses: Sequence[float | None]) -> dict[str, Any]:
    """The losses of all partitions as rows and means, in JSON values; `evaluate_model` says what they are."""
    rows = [
        {"partition": partition, "tokens": loss.tokens, "loss": finite(loss.nats_per_token),
         "perplexity": finite(loss.perplexity), "bits_per_byte": finite(loss.bits_per_byte), "shared_loss": shared}
        for partition, (loss, shared) in enumerate(zip(losses, shared_losses, strict=True))
    ]  # fmt: skip
    together, mean = pooled(losses), equal_weight_mean(losses)
    compared = [float(shared) for shared, loss in zip(shared_losses, losses, strict=True)
                if shared is not None and loss.tokens]  # fmt: skip
    complete = len(compared) == sum(loss.tokens > 0 for loss in losses)
    shared_mean = math.fsum(compared) / len(compared) if compared and complete else math.nan
    return {
        "partitions": rows,
        "mean_loss": finite(mean),
        "mean_perplexity": finite(perplexity(mean)),
        "shared_mean_loss": finite(shared_mean),
        "shared_mean_perplexity": finite(perplexity(shared_mean)),
        "pooled_loss": finite(together.nats_per_token),
        "pooled_perplexity": finite(together.perplexity),
        "pooled_bits_per_byte": finite(together.bits_per_byte),
    }


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
        text = generate(model, tokenizer, prompt, min(config.sample_tokens, room), seed=seed)
        written.append({"partition": partition, "prompt": prompt, "text": text, "seed": seed})
    return written


def evaluate_text(model_dir: Path, texts: Iterable[str]) -> dict[str, Any]:
    """Measure a model directory, which must hold its tokenizer, on documents of text.

    Args:
        model_dir: an assembled model.
        texts: documents; each begins after an end of text and is measured in windows of the model's context.

    Returns:
        `documents`, `tokens`, `bytes`, `loss` (nats a token), `perplexity` and `bits_per_byte`, over all tokens.

    Raises:
        StorageError: the model cannot be read, or has no tokenizer.
        ConfigError: the model is not one that can be loaded, or its tokenizer is another model's.
        DataError: there is no text, or the tokenizer is not a byte-level one with an end of text.
    """
    model = MixtureLM.load(model_dir)
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise StorageError(f"{model_dir} holds no tokenizer.json, so no text can be read by its model.")
    tokenizer = load_tokenizer(path)
    if tokenizer.get_vocab_size(with_added_tokens=True) > model.config.vocab_size:
        raise ConfigError(f"{path} has more tokens than the model beside it: it is another model's.")
    documents = 0

    def windows() -> Iterator[npt.NDArray[np.int64]]:
        nonlocal documents
        for text in texts:
            ids_T = np.concatenate(([END_OF_TEXT_ID], encode_documents(tokenizer, [text])[0]))
            documents += 1
            for start in range(0, len(ids_T) - 1, model.config.max_seq_len):
                yield ids_T[start : start + model.config.max_seq_len + 1]

    loss = measure(model, windows(), np.asarray(token_bytes(tokenizer)))
    if not loss.bytes:
        raise DataError("There is no text to evaluate the model on: every document is empty or blank; give another source.")
    return {"documents": documents, "tokens": loss.tokens, "bytes": loss.bytes, "loss": finite(loss.nats_per_token),
            "perplexity": finite(loss.perplexity), "bits_per_byte": finite(loss.bits_per_byte)}  # fmt: skip


def finite(value: float) -> float | None:
    """The value, or None for what JSON cannot say."""
    return value if math.isfinite(value) else None


def _measure_partitions(
    model: MixtureLM, tokenizer: Tokenizer, windows: Callable[[int], Iterable[npt.NDArray[Any]]], partitions: int,
    progress: Progress,
) -> tuple[list[Loss], dict[str, Any]]:  # fmt: skip
    """Loss of every partition and the report of the router, in one pass over the tokens."""
    report = RouterReport(model.config.n_layers, partitions, model.config.n_experts)
    sizes_V = np.asarray(token_bytes(tokenizer))
    losses = []
    for partition in range(partitions):

        def observe(routing: list[Routing], kept_N: Any, partition: int = partition) -> None:
            report.add(partition, routing, kept_N)

        losses.append(measure(model, windows(partition), sizes_V, observe=observe))
        progress(stage="evaluate", step=partition + 1, steps=partitions, loss=finite(losses[-1].nats_per_token))
    return losses, report.result()
