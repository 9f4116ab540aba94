"""Where every byte of an assembled model comes from: data set, shared components, shards and who signed them.

`RUN_DIR/provenance/SHA256.json` keeps what is known of one shard. `model/provenance.json` is the whole lineage, so that a
model directory can be verified wherever it was copied to (`forge/checkpoint/verify.py`). It is written before the file and
the index that it speaks of: an expert in the model always has its line here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from forge.checkpoint.hf import TOKENIZER_FILES
from forge.checkpoint.safetensors_header import tensors_sha256
from forge.config import RunConfig
from forge.errors import StorageError
from forge.files import RunDirectory, hash_file, read_json, write_json
from forge.model import names
from forge.signature import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, node_id_of
from forge.vocabulary import PROVENANCE_FILE, expert_file

FORMAT_VERSION: Final = "1"
#: The components of a model that are published before any expert exists.
COMPONENTS: Final = ("shared", "shared_with_context", "shared_ffn", "router")
#: The blobs of a partition's documents.
SPLITS: Final = ("train", "validation", "test")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Part(BaseModel):
    """Base of what is read back: strict about what is there, deaf to what a later version added."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


P = TypeVar("P", bound=Part)


class Origin(Part):
    """What is known of one shard."""

    partition: int
    sha256: Sha256
    tensors_sha256: Sha256
    """Of the tensors' bytes alone, in the order of the architecture: a shard with another header has the same."""
    manifest: str | None = None
    """What its maker says about it: the very text that was signed."""
    signature: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * SIGNATURE_BYTES}}}$")] | None = None
    """Ed25519, hex; None on a run of one machine, where nobody has to prove anything to anybody."""
    public_key: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * PUBLIC_KEY_BYTES}}}$")] | None = None
    """Whose signature it is, hex."""

    @property
    def node_id(self) -> str | None:
        """The node that signed it."""
        return None if self.public_key is None else node_id_of(bytes.fromhex(self.public_key))


class Data(Part):
    """What the run learned from."""

    source: str
    files: dict[str, Sha256]
    """Files of the run's data directory, by name: the corpus as tokens, its split, the tokenizer."""
    partitions: list[dict[str, Sha256]]
    """The token files of every partition, by split."""


class Lineage(Part):
    """`model/provenance.json`."""

    format_version: str
    run_id: str
    config_fingerprint: Sha256
    config: dict[str, Any]
    data: Data
    tokenizer: dict[str, Sha256]
    """The model's tokenizer files."""
    components: dict[str, Sha256]
    """The published files that the experts and the router were made from, `COMPONENTS`."""
    shared_ffn_tensors: Sha256
    """Of the shared FFN's tensors alone: what every placeholder holds."""
    shards: list[Origin]


def origin(path: Path, config: RunConfig, partition: int, manifest: bytes, *, signature: bytes | None = None,
           public_key: bytes | None = None, sha256: str | None = None) -> Origin:  # fmt: skip
    """What is known of a shard whose manifest was checked.

    Raises:
        ShardError: the file is not a sound shard of the partition.
        StorageError: it cannot be read.
    """
    return Origin(
        partition=partition, sha256=sha256 or hash_file(path), manifest=manifest.decode(),
        tensors_sha256=tensors_sha256(path, names.expert_tensors(config.model, partition)),
        signature=None if signature is None else signature.hex(),
        public_key=None if public_key is None else public_key.hex())  # fmt: skip


def keep(run: RunDirectory, shard: Origin, credit: Mapping[str, Any]) -> None:
    """Remember a shard in the run directory, and who is credited with it; before it is put into the model.

    Raises:
        StorageError: the directory cannot be written.
    """
    write_json(_kept(run, shard.sha256), shard.model_dump(mode="json") | {"credit": dict(credit)})


def kept_credit(run: RunDirectory, sha256: str) -> dict[str, Any]:
    """Who `keep` was told is credited with a shard; empty when it was told nothing.

    Raises:
        StorageError: the record cannot be read.
    """
    path = _kept(run, sha256)
    return dict(read_json(path).get("credit", {})) if path.is_file() else {}


def kept(run: RunDirectory, partition: int, sha256: str) -> Origin:
    """What is known of a shard in the run's blobs, or in its place in the model; at least what it holds.

    Raises:
        StorageError: the record or the shard cannot be read.
    """
    path = _kept(run, sha256)
    if path.is_file():
        return _parse(Origin, read_json(path), path)
    file = run.blobs.path(sha256) if run.blobs.has(sha256) else run.model / expert_file(partition)
    digest = tensors_sha256(file, names.expert_tensors(run.config.model, partition))
    return Origin(partition=partition, sha256=sha256, tensors_sha256=digest)


def write_lineage(run: RunDirectory, published: Mapping[str, Any], shards: Mapping[int, str]) -> None:
    """Write `model/provenance.json`.

    Args:
        run: the run.
        published: the facts of its publish stage.
        shards: partition -> sha256 of every expert that is, or is about to be, in the model.

    Raises:
        StorageError: a file is missing, or the model directory cannot be written.
    """
    config = run.config
    lineage = Lineage(
        format_version=FORMAT_VERSION, run_id=published["run_id"], config_fingerprint=published["config_fingerprint"],
        config=config.model_dump(mode="json"),
        data=Data(source=config.data.source, files=(run.marker("prepare") or {}).get("files", {}),
                  partitions=_partitions(published.get("partitions", ()))),
        tokenizer={name: hash_file(run.data / name) for name in TOKENIZER_FILES if (run.data / name).is_file()},
        components={part: published[part]["sha256"] for part in COMPONENTS},
        shared_ffn_tensors=published["shared_ffn"].get("tensors_sha256") or _ffn_digest(run, published["shared_ffn"]["sha256"]),
        shards=[kept(run, partition, sha256) for partition, sha256 in sorted(shards.items())])  # fmt: skip
    write_json(run.model / PROVENANCE_FILE, lineage.model_dump(mode="json"))


def read_lineage(model_dir: Path) -> Lineage:
    """Read `provenance.json` of a model directory.

    Raises:
        StorageError: it is missing, or not what this version writes.
    """
    path = model_dir / PROVENANCE_FILE
    if not path.is_file():
        raise StorageError(f"{model_dir} has no {PROVENANCE_FILE}, so nothing says where its weights come from: give the "
                           "model directory of a run, or bring it up to date with `forge assemble RUN_DIR`.")  # fmt: skip
    return _parse(Lineage, read_json(path), path)


@lru_cache(maxsize=1)
def _ffn_digest(run: RunDirectory, sha256: str) -> str:
    """Of a blob that a version published which did not note it; once a process, as every accepted shard asks."""
    return tensors_sha256(run.blobs.path(sha256), names.ffn_tensors(run.config.model))


def _kept(run: RunDirectory, sha256: str) -> Path:
    run.blobs.path(sha256)  # Refuses what is no sha256, and so no file name of ours.
    return run.root / "provenance" / f"{sha256}.json"


def _partitions(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [{split: row[split]["sha256"] for split in SPLITS if row.get(split)} for row in rows]


def _parse(kind: type[P], tree: Any, path: Path) -> P:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise StorageError(f"{path} is damaged, or of another version: {where} is not what it should be "
                           f"({first['msg'].lower()}).", detail=str(error)) from error  # fmt: skip
