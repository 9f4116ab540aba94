"""The memory plan: predict the peak of every process from the config alone, and choose what makes training fit `--ram`.

The choices are the micro-batch and the recomputation of activations. Gradients are accumulated over micro-batches, one
sequence's part after the other, so the batch that an optimiser step sees, and with it the result, stays what the config
says. Nothing here imports torch: a node refuses before it downloads.

Constants are measured (`benchmarks/memory.py` holds the predictions against real processes); everything that depends on the
model is counted. N positions of a forward pass, D model width, F FFN width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
import math
from pathlib import Path
import re
from typing import Literal

from forge.config import ModelConfig, PhaseConfig, RunConfig
from forge.errors import ConfigError, MemoryBudgetError
from forge.system import cpu_products

Products = Literal["float32", "bfloat16"]
Stage = Literal["prepare", "shared", "partition", "router", "publish", "expert", "validate", "evaluate", "generate",
                "assemble"]  # fmt: skip
#: Every process of a run that holds text or tensors, in the order in which they run.
STAGES: tuple[Stage, ...] = ("prepare", "shared", "partition", "router", "publish", "expert", "validate", "evaluate",
                             "generate", "assemble")  # fmt: skip
TRAINING: tuple[Stage, ...] = ("shared", "expert")

MB = 1 << 20
_FLOAT, _DOUBLE = 4, 8
#: Interpreter, imports and what their first use allocates, in MB resident; torch 2.13 for CPUs, one or two threads.
RUNTIME_MB: dict[str, int] = {
    "prepare": 58, "shared": 284, "partition": 263, "router": 300, "publish": 258, "expert": 284, "validate": 254,
    "evaluate": 304, "generate": 256, "assemble": 47}  # fmt: skip
#: What PyTorch built for CUDA holds beside that, on a CPU too: its libraries' pages and tables. Where a process unloads them,
#: as `forge generate` does at its end and a job does not, it reads in more of them.
_CUDA_MB = dict.fromkeys(RUNTIME_MB, 392) | {"prepare": 0, "assemble": 0, "generate": 556}
#: What the allocator rounds up and keeps of blocks below its threshold (forge/jobs.py), as a share of all that is allocated;
#: and the holes in the heap of a training process, as a share of what each micro-batch takes and frees.
_ALLOCATOR_SHARE, _HOLES_SHARE = 0.02, 0.55
#: The light processes, which hold no tensors: the whole of a coordinator and of a node's agent, in MB resident.
LIGHT_MB = {"coordinator": 122, "node": 82}
#: scikit-learn, imported when a corpus is clustered, and pandas, which it imports where that is installed.
_SKLEARN_BYTES = (154 if find_spec("pandas") else 88) * MB
#: Positions whose logits exist at a time: at a vocabulary of 16,384 a chunk takes 8 MB in bfloat16, less than what the backward
#: pass of the first layer holds later, and 16 MB in float32, a few more than that.
CHUNK_POSITIONS = 256
#: Queries whose attention is computed at a time in bfloat16: fewer waste less on keys that come later, more keep products large.
ATTENTION_BLOCK = 128
#: The knee on a CPU, at the default size: twice as many sequences gain 2 % in bfloat16 and nothing in float32, for a quarter more
#: memory (docs/log.md).
LARGEST_MICRO_BATCH = 2
#: Tokens of a forward pass: of an evaluation, and of the partition and router stages.
EVALUATION_TOKENS, STATISTICS_TOKENS = 512, 2048
#: Bytes of a document of text, on average, where only the size of the corpus is known (WikiText-103: 19 KB, Python's
#: standard library: 15 KB).
_DOCUMENT_BYTES = 16 << 10
#: Documents that k-means and the tf-idf projection are fitted on, at most: bounds memory, and the centroids of a few
#: partitions do not get better with more.
SAMPLE_DOCUMENTS = 16_384
#: Held-out tokens a partition for the router's temperatures: one number a layer needs few.
TEMPERATURE_TOKENS = 20_000
#: Logits a layer that they are fitted on, at most: every held-out token has one for each expert.
_TEMPERATURE_LOGITS = 1 << 22


@dataclass(frozen=True)
class Plan:
    """How a stage will run and what it will hold.

    All sizes in bytes; `parts` adds up to `peak_bytes`.
    """

    stage: str
    parts: dict[str, int]
    micro_batch: int = 1
    """Sequences of one forward and backward pass."""
    recompute: bool = False
    """Whether the backward pass computes activations again instead of keeping them."""

    @property
    def peak_bytes(self) -> int:
        """Predicted peak resident memory of the process that runs the stage."""
        return sum(self.parts.values())


def predict(config: RunConfig, stage: Stage, micro_batch: int = 1, recompute: bool = False,
            products: Products | None = None) -> Plan:  # fmt: skip
    """Predict the peak of `stage`; the last three arguments matter to training only.

    `products` is the type of its matrix products, by default that of this machine's CPU.
    """
    training = stage in TRAINING
    product = 2 if (products or cpu_products()) == "bfloat16" else _FLOAT
    parts = (_training(config, stage == "shared", micro_batch, recompute, product) if training
             else _OTHERS[stage](config))  # fmt: skip
    allocator = _ALLOCATOR_SHARE * sum(parts.values())
    if training:
        allocator += _HOLES_SHARE * (parts["activations"] + parts["loss"])
    runtime = RUNTIME_MB[stage] + (_CUDA_MB[stage] if built_for_cuda() else 0)
    parts = {"runtime": runtime * MB} | parts | {"allocator": round(allocator)}
    return Plan(stage, parts, micro_batch, recompute) if training else Plan(stage, parts)


@cache
def built_for_cuda() -> bool:
    """Whether the PyTorch that is installed brings CUDA's code along; looks for the file, and does not import it."""
    torch = find_spec("torch")
    return torch is not None and torch.origin is not None and any(Path(torch.origin).with_name("lib").glob("*torch_cuda.*"))


def process_bytes(config: RunConfig, process: str) -> int:
    """The predicted peak of any process of a run, of the light ones too; training is taken with one sequence at a time."""
    return LIGHT_MB[process] * MB if process in LIGHT_MB else predict(config, process).peak_bytes  # type: ignore[arg-type]


def plan(config: RunConfig, stage: Stage, ram_bytes: int, products: Products | None = None) -> Plan:
    """The fastest plan of `stage` that fits `ram_bytes`.

    Raises:
        MemoryBudgetError: not even the smallest fits; the sentence names the `--ram` that would do.
    """
    for candidate in candidates(config, stage, products):
        if candidate.peak_bytes <= ram_bytes:
            return candidate
    needed = candidate.peak_bytes
    raise MemoryBudgetError(
        f"{_STAGE_NAMES.get(stage, f'The {stage} stage')} of the run {config.name!r} needs {format_size(needed)} and --ram "
        f"allows {format_size(ram_bytes)}: use --ram {math.ceil(needed / (64 * MB)) * 64}M or more.")  # fmt: skip


def check_ram(ram_bytes: int, memory_bytes: int) -> None:
    """Refuse a --ram that a machine with so much memory does not have.

    Raises:
        MemoryBudgetError: `ram_bytes` is more.
    """
    if ram_bytes > memory_bytes:
        raise MemoryBudgetError(f"--ram asks for {format_size(ram_bytes)} and this machine has {format_size(memory_bytes)}: give "
                                f"at most --ram {max(1, memory_bytes >> 20)}M.")  # fmt: skip


def hungriest(config: RunConfig, stages: Iterable[Stage]) -> Stage:
    """The stage whose smallest plan is the largest: what fits it fits them all."""
    return max(stages, key=lambda stage: min(candidate.peak_bytes for candidate in candidates(config, stage)))


def candidates(config: RunConfig, stage: Stage, products: Products | None = None) -> Iterator[Plan]:
    """Every plan of a stage, the fastest first and the smallest last."""
    if stage not in TRAINING:
        yield predict(config, stage)
        return
    batch_size = config.batch_size(stage)
    for micro_batch in (m for m in range(min(LARGEST_MICRO_BATCH, batch_size), 0, -1) if batch_size % m == 0):
        yield predict(config, stage, micro_batch, products=products)
    yield predict(config, stage, 1, recompute=True, products=products)


def report(config: RunConfig, plan: Plan, products: Products) -> dict[str, int | bool]:
    """What a training process tells its parent of its plan: `peak_bytes`, and whether there is a `smaller` one."""
    options = candidates(config, plan.stage, products)  # type: ignore[arg-type]
    return {"peak_bytes": plan.peak_bytes, "smaller": any(option.peak_bytes < plan.peak_bytes for option in options)}


def parse_size(text: str) -> int:
    """Bytes from `8G`, `512M`, `1.5GiB` or a plain number; units are powers of 1024.

    Raises:
        ConfigError: the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")) if match is not None else 0
    if not size:
        raise ConfigError(f"{text!r} is not a size: write for example 8G or 512M.")
    return size


def format_size(size: float) -> str:
    """A size for people: `380M`, `7.5G`."""
    return f"{size / MB:.0f}M" if size < 1024 * MB else f"{size / 1024 / MB:.1f}G"


_STAGE_NAMES = {"shared": "Training the shared components", "expert": "Training an expert", "evaluate": "Evaluation"}


# Training -------------------------------------------------------------------------------------------------------------


def _training(config: RunConfig, shared: bool, micro_batch: int, recompute: bool, product: int) -> dict[str, int]:
    """The parts of a training process whose matrix products take numbers of `product` bytes."""
    model = config.model
    phase = config.phase("shared" if shared else "expert")
    hidden = model.expert_parameters + (model.attention_parameters if shared else 0)
    rest = model.embedding_parameters + model.norm_parameters if shared else 0
    positions = micro_batch * model.max_seq_len
    stream = model.d_model * _FLOAT
    layer = _kept_bytes(model, product, frozen=not shared)
    kept = model.n_layers * layer
    if recompute:
        kept = model.n_layers * stream + layer
    elif not shared:  # Nothing before the first expert learns, so neither norms nor attention before it keep anything.
        kept -= layer - (model.d_model + 2 * model.ffn_width) * product
    kept += stream + 2 * model.d_model * product  # The final norm's input and output, and the loss's gradient of it.
    # Beside the activations come either the logits or what the first layer of the backward pass computes, with the part of
    # a weight's gradient that is widened before it is added.
    logits = min(CHUNK_POSITIONS, model.max_seq_len) * model.vocab_size * product
    backward = positions * (3 * model.ffn_width * product + 2 * stream)
    backward += _largest_matrix(model) * (_FLOAT + product) if product != _FLOAT else 0
    # Gradients of the lookups of the whole batch (`forge.model.layers.lookups_held`).
    held = config.batch_size("shared") * model.max_seq_len * stream if shared else 0
    weights, copies = _weights(model, shared, product)
    return {
        "weights": weights,
        "copies": copies,
        "gradients": (hidden + rest) * _FLOAT + held,
        "optimizer": _slots(phase, hidden, rest) * _FLOAT,
        "activations": kept * positions,
        "loss": max(logits, backward),
    }


def _weights(model: ModelConfig, shared: bool, product: int) -> tuple[int, int]:
    """Bytes of the weights as they are kept, and of their copies in a narrower type for the products (`load_dense`)."""
    table = model.vocab_size * model.d_model
    learned = model.dense_parameters if shared else model.expert_parameters + model.norm_parameters
    weights, narrowed = learned * _FLOAT, learned - model.norm_parameters
    if shared:
        narrowed -= 0 if model.tie_embeddings else table
    else:
        lookups = 2 if product == 2 and model.dtype == "bfloat16" else _FLOAT
        weights += model.attention_parameters * product + table * lookups
        if not model.tie_embeddings:
            weights += table * product
        elif lookups != product:
            narrowed += table
    return weights, narrowed * product if product != _FLOAT else 0


def _kept_bytes(model: ModelConfig, product: int, frozen: bool) -> int:
    """Bytes a position that the backward pass of a layer needs; a frozen matrix has no gradient and so needs no input.

    Of attention these are queries, keys and values and, in float32, the fused kernel's output; in bfloat16 the
    probabilities of a block of queries (`forge.model.attention`).
    """
    heads, norms = model.n_heads * model.head_dim, 2 * model.d_model * _FLOAT
    numbers = model.d_model + 2 * model.ffn_width + 3 * heads
    numbers += heads if product == _FLOAT else model.n_heads * (model.max_seq_len + min(ATTENTION_BLOCK, model.max_seq_len)) // 2
    if not frozen:
        numbers += model.d_model + heads
    return norms + numbers * product


def _slots(phase: PhaseConfig, hidden: int, rest: int) -> int:
    return hidden * (1 if phase.optimizer == "muon" else 2) + rest * 2


def _largest_matrix(model: ModelConfig) -> int:
    return model.d_model * max(model.ffn_width, model.d_model)


# Everything else ------------------------------------------------------------------------------------------------------


def _prepare(config: RunConfig) -> dict[str, int]:
    corpus = config.data.max_bytes or config.tokenizer.train_bytes
    learned = 0 if config.tokenizer.path is not None else min(config.tokenizer.train_bytes, corpus)
    # The trainer holds the distinct words, whose number grows slowly with the text (measured); the encoder some 150 bytes
    # a token of a batch of 1 MB, and 600 bytes an entry of the vocabulary.
    return {"tokenizer": round(24 * MB * (learned / 1e6) ** (1 / 3)),
            "data": round(40 * MB * min(1.0, corpus / 1e6)) + config.model.vocab_size * 600
            + _documents(config) * 28}  # fmt: skip


def _partition(config: RunConfig) -> dict[str, int]:
    if config.partition.method not in ("clustered", "curriculum"):
        return {"data": _documents(config) * 64, "libraries": _SKLEARN_BYTES * (config.partition.method == "tfidf")}
    reading = _dense_weights(config.model) | _forward(config.model, STATISTICS_TOKENS)
    if config.partition.method == "curriculum":
        return reading
    # k-means runs after the model is gone: on a sample in float64, copied twice, beside the mapped features of all documents.
    documents, width = _documents(config), config.model.d_model
    clustering = 3 * min(documents, SAMPLE_DOCUMENTS) * width * _DOUBLE + documents * width * _FLOAT
    return reading if sum(reading.values()) > clustering + _SKLEARN_BYTES else {
        "libraries": _SKLEARN_BYTES, "data": clustering}  # fmt: skip


def temperature_sample(model: ModelConfig) -> tuple[int, float]:
    """What the router's temperatures are fitted on: held-out tokens read of each partition, and the share of them kept."""
    tokens = max(model.max_seq_len, min(TEMPERATURE_TOKENS, _TEMPERATURE_LOGITS // model.n_experts**2))
    return tokens, min(1.0, _TEMPERATURE_LOGITS / (model.n_experts**2 * tokens))


def _router(config: RunConfig) -> dict[str, int]:
    model = config.model
    square = model.d_model**2 * _DOUBLE
    # Every forward pass collects the gate inputs of all layers; in the last ones the logits of held-out tokens pile up. What
    # is published comes after them, in a copy if it has another type.
    positions = max(STATISTICS_TOKENS, model.max_seq_len)
    collected = positions * model.n_layers * model.d_model * _FLOAT
    tokens, share = temperature_sample(model)
    logits = round(tokens * share * model.n_experts**2) * model.n_layers * _DOUBLE
    published = 0 if model.dtype == "float32" else (model.dense_parameters - model.expert_parameters) * 2
    reading = max(collected + _layer_bytes(model, positions) + logits, published)
    # Naive Bayes has the counts and three arrays like them; the other methods second moments, of which one is inverted.
    statistics = (4 * model.n_experts * model.vocab_size * _DOUBLE if config.router.method == "bayes" else
                  model.n_layers * square * 2 + 3 * square)  # fmt: skip
    return _dense_weights(model) | {"statistics": statistics, "activations": reading}


def _publish(config: RunConfig) -> dict[str, int]:
    model = config.model
    return _dense_weights(model) | _forward(model, EVALUATION_TOKENS)


def _validate(config: RunConfig) -> dict[str, int]:
    """The shard in the shared components, as when they are published; when these are gone, in its place in the mixture."""
    return max(_publish(config), _mixture(config), key=lambda parts: sum(parts.values()))


def _evaluate(config: RunConfig) -> dict[str, int]:
    """The assembled model, and the shared FFN that takes the place of one of its experts."""
    mixture = _mixture(config)
    mixture["weights"] += config.model.expert_parameters * (_FLOAT if config.model.dtype == "float32" else 2)
    return mixture


def _mixture(config: RunConfig) -> dict[str, int]:
    return _mixture_weights(config.model) | _forward(config.model, EVALUATION_TOKENS)


def _generate(config: RunConfig) -> dict[str, int]:
    model = config.model
    cache = 2 * model.n_layers * model.max_seq_len * model.kv_heads * model.head_dim * _FLOAT
    return _mixture_weights(model) | {"cache": cache, "logits": 6 * model.vocab_size * _FLOAT}


def _assemble(config: RunConfig) -> dict[str, int]:
    return {"data": 1 * MB}  # A chunk of a file.


_OTHERS = {"prepare": _prepare, "partition": _partition, "router": _router, "publish": _publish, "validate": _validate,
           "evaluate": _evaluate, "generate": _generate, "assemble": _assemble}  # fmt: skip


def _dense_weights(model: ModelConfig) -> dict[str, int]:
    """The shared components, mapped, and an FFN, copied; other types than float32 are widened."""
    return {"weights": model.dense_parameters * _FLOAT}


def _mixture_weights(model: ModelConfig) -> dict[str, int]:
    """The assembled model, mapped; in bfloat16 all but the experts is widened, and of these one matrix at a time."""
    if model.dtype == "float32":
        return {"weights": model.total_parameters * _FLOAT}
    experts = model.n_experts * model.expert_parameters
    widened = (model.total_parameters - experts) * _FLOAT
    return {"weights": experts * 2 + widened + _largest_matrix(model) * _FLOAT}


def _forward(model: ModelConfig, positions: int) -> dict[str, int]:
    positions = max(positions, model.max_seq_len)
    logits = min(CHUNK_POSITIONS, positions) * model.vocab_size * _FLOAT
    return {"activations": max(_layer_bytes(model, positions), logits + positions * model.d_model * _FLOAT)}


def _layer_bytes(model: ModelConfig, positions: int) -> int:
    """What a layer holds at its widest in a forward pass without gradients."""
    return positions * _FLOAT * (3 * model.ffn_width + 4 * model.d_model)


def _documents(config: RunConfig) -> int:
    """Documents of the corpus: from its size where that is limited, else the most that a stage looks at at a time."""
    return SAMPLE_DOCUMENTS if config.data.max_bytes is None else config.data.max_bytes // _DOCUMENT_BYTES
