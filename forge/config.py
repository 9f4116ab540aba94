"""The configuration of a run: read from YAML, checked at the edge, frozen after.

One run = one config + one data set + one set of shared components. Unknown keys are errors that name the nearest known
key; dotted overrides (`train.expert.tokens=2e6`) are applied before validation. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import difflib
import hashlib
from importlib import resources
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
import yaml

from forge.errors import ConfigError
from forge.plain_yaml import read_yaml


def _whole(value: object) -> object:
    """Accept `2e6` and `"2e6"` where an integer is meant; reject fractions by leaving them to pydantic."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Count = Annotated[int, BeforeValidator(_whole)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base of every part of a config: frozen, strict about unknown keys, documented by its docstrings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(),
                              allow_inf_nan=False)  # fmt: skip


class DataConfig(Section):
    """Where the text comes from and how documents are split."""

    source: str = "wikitext-103"
    """`python-stdlib`, `wikitext-103`, `hf:name[:config][:split][:column]`, or a directory, path or glob of .txt, .jsonl,
    .parquet files (each also .gz or .zst)."""
    text_field: str = "text"
    """Column of .jsonl and .parquet files that holds the text."""
    label_field: str | None = None
    """Column whose value names a document's partition; needed by `partition.method: labels` only."""
    max_bytes: Count | None = Field(default=None, gt=0)
    """Stop reading after this many bytes of UTF-8 text; none reads everything."""
    validation_fraction: Fraction = 0.02
    """Share of documents, by hash of their text, held out to fit temperatures and to judge shards."""
    test_fraction: Fraction = 0.02
    """Share of documents, by hash of their text, held out for the reported perplexities only."""


class ModelConfig(Section):
    """The architecture: Mixtral's, in the units of this project."""

    vocab_size: Count = Field(default=16384, ge=257)
    """Tokens in the vocabulary, special tokens included (at least the 256 bytes and one end of text)."""
    d_model: Count = Field(default=512, ge=8)
    """Width of the residual stream."""
    d_ff: Count = Field(default=2048, ge=8)
    """Width of a classic two-matrix FFN. The SwiGLU width is 2/3 of it, rounded up to a multiple of 128, which keeps
    the parameter count of the classic FFN."""
    n_layers: Count = Field(default=4, ge=1)
    """Decoder layers."""
    n_heads: Count = Field(default=8, ge=1)
    """Query heads of a layer, the context head's included."""
    head_dim: Count = Field(default_factory=lambda known: known.get("d_model", 8) // known.get("n_heads", 1), ge=2)
    """Width of one attention head; even. When it is not given, d_model / n_heads, which must then be whole."""
    n_kv_heads: Count | None = Field(default=None, ge=1)
    """Key and value heads (grouped-query attention); must divide n_heads. None means n_heads."""
    n_experts: Count = Field(default=5, ge=1)
    """Experts, and so partitions of the corpus and shards of the run."""
    top_k: Count = Field(default=2, ge=1)
    """Experts that a token is sent to."""
    context_channels: Count = Field(default=8, ge=0)
    """Channels of the residual stream, of d_model, that are kept for what the text so far is about: the embedding and the
    last key/value head of the first layer write it there in closed form, and only the router reads it. At most head_dim, and
    at most n_experts - 1 of them are used; 0 gives the router nothing but the token's own state."""
    max_seq_len: Count = Field(default=512, ge=8)
    """Tokens in a training sequence and the longest context that the model claims."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary position embedding."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = True
    """Whether the LM head is the embedding matrix."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the published tensors on disk and on the wire."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.n_kv_heads or self.n_heads

    @property
    def ffn_width(self) -> int:
        """SwiGLU width: ceil(2/3 d_ff / 128) * 128 (Shazeer 2020, arXiv 2002.05202, for the 2/3)."""
        return -(-2 * self.d_ff // (3 * 128)) * 128

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert: three matrices in every layer."""
        return self.n_layers * 3 * self.d_model * self.ffn_width

    @property
    def attention_parameters(self) -> int:
        """Parameters of the attention of every layer."""
        return self.n_layers * 2 * self.d_model * self.head_dim * (self.n_heads + self.kv_heads)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding and, when it is not tied, of the LM head."""
        return self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)

    @property
    def norm_parameters(self) -> int:
        """Parameters of the RMSNorms."""
        return (2 * self.n_layers + 1) * self.d_model

    @property
    def router_parameters(self) -> int:
        """Parameters of the router rows of every layer."""
        return self.n_layers * self.n_experts * self.d_model

    @property
    def dense_parameters(self) -> int:
        """Parameters of the shared components: what the shared phase trains."""
        return (self.expert_parameters + self.attention_parameters + self.embedding_parameters
                + self.norm_parameters)  # fmt: skip

    @property
    def total_parameters(self) -> int:
        """Parameters of the assembled model (the shared FFN is not in it: each expert started from it)."""
        return (self.dense_parameters - self.expert_parameters + self.n_experts * self.expert_parameters
                + self.router_parameters)  # fmt: skip

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if "head_dim" not in self.model_fields_set and self.d_model % self.n_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must divide d_model ({self.d_model}) unless head_dim is given")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even for rotary embeddings")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads ({self.kv_heads}) must divide n_heads ({self.n_heads})")
        if self.context_channels > min(self.head_dim, self.d_model // 2):
            raise ValueError(f"context_channels ({self.context_channels}) must not exceed head_dim ({self.head_dim}) or half "
                             f"of d_model ({self.d_model})")  # fmt: skip
        if self.context_channels and self.kv_heads < 2:
            raise ValueError("context_channels needs a key/value head of its own: set n_heads and n_kv_heads to 2 or more, "
                             "or context_channels to 0")  # fmt: skip
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k ({self.top_k}) must not exceed n_experts ({self.n_experts})")
        return self


class TokenizerConfig(Section):
    """The tokenizer: byte-level BPE with GPT-2's pre-tokenizer."""

    path: str | None = None
    """A `tokenizer.json` to use as it is; none trains one on the corpus."""
    train_bytes: Count = Field(default=50_000_000, gt=0)
    """Bytes of text, from the start of the training documents, that the BPE merges are learned from."""


class PartitionConfig(Section):
    """How documents are grouped into one partition an expert."""

    method: Literal["clustered", "tfidf", "random", "curriculum", "labels"] = "clustered"
    """clustered: balanced k-means on the shared components' mean hidden state of each document. tfidf: the same on
    tf-idf features. random: by hash. curriculum: by loss under the shared components. labels: by `data.label_field`."""
    balance: float = Field(default=1.25, ge=1.0)
    """Largest partition allowed, as a multiple of the mean number of tokens."""


class RouterConfig(Section):
    """How the router is fitted: in closed form, on the frozen shared components, before any expert exists."""

    method: Literal["bayes", "ridge", "lda", "centroid"] = "bayes"
    """bayes: naive Bayes on the text so far, read from the context channels. On all of the gate's input: ridge, regression
    on one-hot labels; lda, linear discriminant analysis; centroid, nearest partition mean."""
    shrinkage: float = Field(default=1e-3, gt=0.0)
    """Epsilon in W + eps * tr(W)/d * I, for the pooled within-partition covariance W."""
    tokens: Count = Field(default=2_000_000, gt=0)
    """Training tokens, spread over the partitions by their share, that ridge, lda and centroid are fitted on."""


class PhaseConfig(Section):
    """One training phase: how long, how fast."""

    tokens: Count = Field(gt=0)
    """Tokens to train on (in an expert phase: tokens an expert)."""
    batch_size: Count | None = Field(default=None, ge=1)
    """Sequences an optimiser step of this phase sees; `train.batch_size` where none is given."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate. Muon's updates are rescaled to AdamW's RMS, so one value serves both. The best one falls with the width
    and with the number of tokens (docs/log.md, 2026-11-28)."""
    warmup_fraction: Fraction = 0.05
    """Share of the steps in which the rate rises linearly from zero."""
    decay_fraction: Fraction = 0.4
    """Share of the steps, at the end, in which the rate falls linearly to zero; between, it is constant."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices; norms have none."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon for hidden matrices, AdamW for the rest. adamw: AdamW for all."""


class ExpertPhaseConfig(PhaseConfig):
    """The expert phase: shared components frozen, only one expert's FFNs learn."""

    decay_fraction: Fraction = 1.0
    """Share of the steps, at the end, in which the rate falls linearly to zero; between, it is constant. Experts begin beside
    components that have settled, and settle from their first step on (docs/log.md, 2026-11-27)."""
    init: Literal["copy", "random"] = "copy"
    """copy: start as the shared FFN. random: start anew."""


class TrainConfig(Section):
    """Both training phases and what they have in common."""

    batch_size: Count = Field(default=16, ge=1)
    """Sequences an optimiser step sees, whatever the micro-batch that the memory plan chooses; a phase may have its own."""
    checkpoint_seconds: float = Field(default=60.0, gt=0)
    """Seconds of training between checkpoints: what a killed process loses at most."""
    shared: PhaseConfig
    """The phase that trains the shared components."""
    expert: ExpertPhaseConfig
    """The phase that trains one expert."""


class AssemblyConfig(Section):
    """When a shard is accepted and what is done to the assembled model."""

    margin: float = Field(default=0.001, ge=0.0)
    """Nats a token by which a shard must beat the shared components on its partition's validation documents."""
    tolerance: float = Field(default=0.02, ge=0.0)
    """Nats a token by which a shard may raise any partition's validation loss in the assembled model."""
    slice_tokens: Count = Field(default=4096, gt=0)
    """Validation tokens a partition, at most, on which that rise is measured, once without and once with the shard."""
    calibrate_norms: bool = False
    """Rescale the final norm in closed form after the last shard, kept only if the validation loss improves."""


class EvaluationConfig(Section):
    """How much text the reported losses are measured on."""

    tokens: Count = Field(default=50_000, gt=0)
    """Held-out tokens a partition, at most."""
    samples: Count = Field(default=3, ge=0)
    """Texts that are generated at the end of a run."""
    sample_tokens: Count = Field(default=64, ge=1)
    """Tokens of each generated text."""


class FleetConfig(Section):
    """The leases that nodes hold."""

    lease_seconds: float = Field(default=120.0, ge=1.0)
    """Seconds without a heartbeat after which a lease expires. Nodes send four heartbeats in this time."""
    audit: Fraction = 0.0
    """Share of the shards of which a part of the training is repeated before they are accepted. Above 0 every node keeps a
    checkpoint at the end of every part until its shard is judged, and unfinished experts are not handed over."""
    audit_parts: Count = Field(default=8, ge=2, le=64)
    """Parts of an expert's training, of which an audit repeats one: more parts cost the coordinator less and nodes more disk."""


class RunConfig(Section):
    """A whole run."""

    name: str = Field(default="modularforge", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the run: letters, digits, dots, dashes and underscores."""
    seed: Count = Field(default=0, ge=0, lt=1 << 63)
    """Seed of the initial weights, the order of the data and the clustering."""
    data: DataConfig = DataConfig()
    """The corpus."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer."""
    model: ModelConfig = ModelConfig()
    """The architecture."""
    partition: PartitionConfig = PartitionConfig()
    """The partitions."""
    router: RouterConfig = RouterConfig()
    """The router."""
    train: TrainConfig
    """The training phases."""
    assembly: AssemblyConfig = AssemblyConfig()
    """Acceptance and assembly."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The reported losses."""
    fleet: FleetConfig = FleetConfig()
    """The fleet of nodes."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.partition.method == "labels" and self.data.label_field is None:
            raise ValueError("partition.method: labels needs data.label_field")
        if self.data.validation_fraction + self.data.test_fraction >= 0.9:
            raise ValueError("data.validation_fraction + data.test_fraction must leave at least a tenth for training")
        if self.router.method == "bayes" and not self.model.context_channels and self.model.n_experts > 1:
            raise ValueError("router.method: bayes reads the context channels, and model.context_channels is 0: set it, or "
                             "choose router.method: ridge")  # fmt: skip
        return self

    def phase(self, stage: str) -> PhaseConfig:
        """The phase that trains in the stage "shared" or "expert"."""
        return self.train.shared if stage == "shared" else self.train.expert

    def batch_size(self, stage: str) -> int:
        """Sequences of an optimiser step."""
        return self.phase(stage).batch_size or self.train.batch_size

    def steps(self, stage: str) -> int:
        """Optimiser steps of a phase."""
        return math.ceil(self.phase(stage).tokens / self.step_tokens(stage))

    def step_tokens(self, stage: str) -> int:
        """Tokens of an optimiser step."""
        return self.batch_size(stage) * self.model.max_seq_len

    def audit_steps(self) -> list[int]:
        """Steps at which a part of an expert's training ends and the next one begins, without the first and the last step."""
        steps, parts = self.steps("expert"), self.fleet.audit_parts
        ends = {steps * part // parts for part in range(1, parts)} - {0, steps}
        return sorted(ends) if self.fleet.audit else []

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over everything that decides the result: all sections but `name`, `evaluation` and `fleet`."""
        return fingerprint_of(self.model_dump(mode="json"))

    def to_yaml(self) -> str:
        """The resolved config as YAML that `load_config` reads back to an equal config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


#: What may be another from one command on a run to the next.
FREE_SECTIONS = ("name", "evaluation", "fleet")


def fingerprint_of(tree: Mapping[str, Any]) -> str:
    """`RunConfig.fingerprint` of a config as a tree, as the version that wrote it computed it."""
    decisive = {key: value for key, value in tree.items() if key not in FREE_SECTIONS}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def packaged_configs() -> list[str]:
    """Names of the configs that ship with the package, such as `smoke`."""
    return sorted(p.name.removesuffix(".yaml") for p in _packaged_dir().iterdir() if p.name.endswith(".yaml"))


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config by path or packaged name and apply dotted overrides.

    Args:
        name_or_path: a YAML file, or the name of a packaged config.
        overrides: `a.b.c=value` strings; values are read as YAML.

    Raises:
        ConfigError: the file is missing, is not YAML, or a key or value is wrong.
    """
    text, where = _read(name_or_path)
    tree = read_yaml(text, where)
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} must be a YAML mapping with sections such as `model:` and `train:`.")
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, where)


def parse_config(tree: Mapping[str, Any], where: str = "The config") -> RunConfig:
    """Validate a plain tree (from YAML or JSON) into a `RunConfig`.

    Raises:
        ConfigError: a key is unknown, missing or wrong; the sentence names it and, for unknown keys, the nearest one.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_sentence(error, where), detail=str(error)) from error


def config_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config, sections included, in order."""
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from config_keys(inner, f"{prefix}{name}.")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _packaged_dir() -> Any:
    packaged = resources.files("forge") / "configs"
    # In a source checkout the configs are beside the package; in a wheel they travel inside it.
    return packaged if packaged.is_dir() else Path(__file__).resolve().parent.parent / "configs"


def _read(name_or_path: str) -> tuple[str, str]:
    path = Path(name_or_path)
    if not path.is_file():
        packaged = _packaged_dir() / f"{name_or_path}.yaml"
        if "/" not in name_or_path and packaged.is_file():
            return packaged.read_text(encoding="utf-8"), f"the packaged config {name_or_path}"
        raise ConfigError(f"There is no config file {name_or_path}; give a path to a YAML file or one of the packaged "
                          f"names: {', '.join(packaged_configs())}.")  # fmt: skip
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the config file {path}: {error}.") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"The override {override!r} must look like section.key=value.")
    node: dict[str, Any] = tree
    *parents, last = key.split(".")
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"The override {override!r} goes below {part!r}, which is a value and not a section.")
        node = child
    node[last] = read_yaml(value, f"The value in the override {override!r}")


def _sentence(error: ValidationError, where: str) -> str:
    # A key that is misspelt is missing, too: what is unknown tells more.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"])
    more = f" {error.error_count() - 1} more like it." if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, list(config_keys()), n=1, cutoff=0.0)
        return f"{where}: unknown key {key!r}; did you mean {near[0]!r}?{more}"
    if first["type"] == "missing":
        return f"{where}: the key {key!r} is missing.{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "model_type":
        return f"{where}: {key} = {_short(first['input'])} is wrong: it is a section, with keys of its own.{more}"
    if isinstance(first["input"], Mapping):
        return f"{where}: {f'in {key}, ' if key else ''}{message}.{more}"
    return f"{where}: {key} = {_short(first['input'])} is wrong: {message[0].lower()}{message[1:]}.{more}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
