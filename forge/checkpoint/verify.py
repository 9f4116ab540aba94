"""Is an assembled model what its provenance says, from the data set to the last expert? What `forge verify` does.

Every file is hashed, every signature checked, and what one link says of the next is compared. Nothing is changed, and no
tensor is loaded. What a copied model directory does not hold (the token files, the published shared components) cannot be
hashed there; the run directory has it all.

The provenance itself is not signed as a whole. Whoever can rewrite a whole directory can rewrite it with other nodes' keys,
so compare the run id and the node ids with what the people of the run say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from forge.checkpoint import hf
from forge.checkpoint.assembly import calibration, is_placeholder, placed
from forge.checkpoint.manifest import check_manifest, parse_manifest, tokens_seen
from forge.checkpoint.provenance import COMPONENTS, FORMAT_VERSION, Lineage, Origin, read_lineage
from forge.checkpoint.safetensors_header import tensors_sha256
from forge.checkpoint.shard import verify_shard
from forge.config import RunConfig, fingerprint_of, parse_config
from forge.errors import ConfigError, ForgeError, ProvenanceError, ShardError, StorageError
from forge.files import RunDirectory, hash_file, read_json
from forge.model import names
from forge.signature import verify_signature
from forge.vocabulary import (
    INDEX_FILE,
    MANIFEST_FILE,
    PROVENANCE_FILE,
    ROUTER_FILE,
    SHARD_FORMAT_VERSION,
    SHARED_FILE,
    expert_file,
)

#: How a link of the chain was checked.
HASHED: Final = "hash"
SIGNED: Final = "hash, signature"
ABSENT: Final = "not in a model directory"
WRONG: Final = "WRONG"


@dataclass(frozen=True, kw_only=True)
class Link:
    """One row of the lineage."""

    what: str
    sha256: str
    made_from: str
    by: str
    checked: str


@dataclass
class Findings:
    """The lineage of a model, and a sentence for everything in it that is not as it should be."""

    run_id: str
    config_fingerprint: str
    links: list[Link] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The findings as JSON values."""
        return {**asdict(self), "verified": not self.problems}


def verify(target: Path) -> Findings:
    """Verify a run directory, or a model directory wherever it lies.

    Raises:
        StorageError: it is neither, or its provenance cannot be read.
    """
    run = RunDirectory(target) if (target / "run.yaml").is_file() else None
    model_dir = target if run is None else run.model
    if not model_dir.is_dir():
        raise StorageError(f"{model_dir} is not there: give a model directory, or a run directory that holds a model.")
    return _Verification(model_dir, run).findings()


class _Verification:
    def __init__(self, model_dir: Path, run: RunDirectory | None) -> None:
        self._dir, self._run = model_dir, run
        self._lineage: Lineage = read_lineage(model_dir)
        self._found = Findings(self._lineage.run_id, self._lineage.config_fingerprint)
        if self._lineage.format_version != FORMAT_VERSION:
            raise StorageError(f"{model_dir / PROVENANCE_FILE} is of format version {self._lineage.format_version!r}, and this "
                               f"version of ModularForge reads {FORMAT_VERSION!r}: install the one that wrote it.")  # fmt: skip
        try:
            self._config: RunConfig = parse_config(self._lineage.config, f"the config in {model_dir / PROVENANCE_FILE}")
        except ConfigError as error:
            raise ProvenanceError(str(error), detail=error.detail) from error

    def findings(self) -> Findings:
        lineage = self._lineage
        self._check(self._config_is_the_fingerprints)
        self._data()
        for part in COMPONENTS:
            self._component(part)
        for name, sha256 in lineage.tokenizer.items():
            checked = self._hash(self._dir / name, sha256)
            self._add(name, sha256, "data", "coordinator", checked)
        self._check(self._shared_and_router_in_place)
        arrived = dict(self._experts())
        self._check(lambda: self._index(arrived))
        self._check(self._manifest_is_the_provenances)
        self._check(self._strays)
        return self._found

    # --- what the run began with ------------------------------------------------------------------------------------

    def _config_is_the_fingerprints(self) -> Iterator[str]:
        if fingerprint_of(self._lineage.config) != self._lineage.config_fingerprint:
            yield f"The config in {PROVENANCE_FILE} is not the one of the config fingerprint beside it."
        if self._lineage.data.source != self._config.data.source:
            yield f"{PROVENANCE_FILE} speaks of another data source than the run's config does."
        if read_json(self._dir / hf.CONFIG_FILE) != hf.mixtral_config(self._config.model):
            yield f"{hf.CONFIG_FILE} does not describe the model of the run's config."
        if read_json(self._dir / hf.GENERATION_FILE) != hf.generation_config():
            yield f"{hf.GENERATION_FILE} is not the one that an assembly writes."
        if self._run is not None:
            published = self._run.marker("publish") or {}
            for key, said in (("run_id", self._lineage.run_id), ("config_fingerprint", self._lineage.config_fingerprint)):
                if published.get(key) != said:
                    yield f"{PROVENANCE_FILE} speaks of another {key.replace('_', ' ')} than the run directory does."

    def _data(self) -> None:
        data = self._lineage.data
        for name, sha256 in data.files.items():
            checked = ABSENT if self._run is None else self._hash(self._run.data / name, sha256)
            self._add(f"data: {name}", sha256, data.source, "coordinator", checked)
        for number, files in enumerate(data.partitions):
            for split, sha256 in files.items():
                self._add(f"partition {number}: {split}", sha256, "data, shared", "coordinator", self._blob(sha256))

    def _component(self, part: str) -> None:
        made_from = {"shared": "data", "shared_ffn": "data", "shared_with_context": "shared, partitions",
                     "router": "shared, partitions"}[part]  # fmt: skip
        sha256 = self._lineage.components.get(part)
        if sha256 is None:
            self._found.problems.append(f"{PROVENANCE_FILE} does not say what {part} is.")
            return
        checked = self._blob(sha256)
        if self._run is not None and (self._run.marker("publish") or {}).get(part, {}).get("sha256") != sha256:
            self._found.problems.append(f"{part} is not the file that the run published, by {PROVENANCE_FILE}.")
            checked = WRONG
        self._add(part, sha256, made_from, "coordinator", checked)

    def _shared_and_router_in_place(self) -> list[str]:
        rescaled = calibration(self._dir)
        expected = {SHARED_FILE: rescaled["sha256"] if rescaled else self._lineage.components.get("shared_with_context"),
                    ROUTER_FILE: self._lineage.components.get("router")}  # fmt: skip
        for name, sha256 in expected.items():
            checked = self._hash(self._dir / name, str(sha256))
            made_from = "router" if name == ROUTER_FILE else "shared_with_context"
            self._add(name, str(sha256), made_from + (", calibration" if rescaled and name == SHARED_FILE else ""),
                      "coordinator", checked)  # fmt: skip
        return []  # What is wrong was said on the way.

    # --- experts ----------------------------------------------------------------------------------------------------

    def _experts(self) -> Iterator[tuple[int, str]]:
        """Check every expert's file; yields those that arrived."""
        origins = {shard.partition: shard for shard in self._lineage.shards}
        for partition in range(self._config.model.n_experts):
            path = self._dir / expert_file(partition)
            try:
                if is_placeholder(path):
                    self._placeholder(partition, path)
                    continue
                actual = hash_file(path)
                yield partition, actual
                self._expert(partition, path, actual, origins.get(partition))
            except ForgeError as error:
                self._found.problems.append(str(error))

    def _placeholder(self, partition: int, path: Path) -> None:
        content = tensors_sha256(path, names.expert_tensors(self._config.model, partition))
        right = content == self._lineage.shared_ffn_tensors
        if not right:
            self._found.problems.append(f"{path.name} says that it is a placeholder, and does not hold the shared FFN.")
        self._add(path.name, hash_file(path), "shared_ffn", "coordinator", HASHED if right else WRONG)

    def _expert(self, partition: int, path: Path, actual: str, origin: Origin | None) -> None:
        before = len(self._found.problems)
        self._check(lambda: self._expert_problems(partition, path, actual, origin))
        signed = origin is not None and origin.signature is not None
        maker = "unknown" if origin is None or origin.manifest is None else "this machine"
        if origin is not None and origin.node_id is not None:
            maker = f"node {origin.node_id}"
        checked = WRONG if len(self._found.problems) > before else SIGNED if signed else HASHED
        self._add(path.name, actual, f"shared, partition {partition}", maker, checked)

    def _expert_problems(self, partition: int, path: Path, actual: str, origin: Origin | None) -> Iterator[str]:
        lineage, shared = self._lineage, self._lineage.components.get("shared", "")
        verify_shard(path, self._config, partition=partition, run_id=lineage.run_id, shared_sha256=shared)
        if origin is None or origin.sha256 != actual:
            yield (f"{path.name} is not the expert that {PROVENANCE_FILE} speaks of: its sha256 begins with {actual[:12]}, "
                   f"expected {origin.sha256[:12] if origin else 'none'}.")  # fmt: skip
            return
        if origin.tensors_sha256 != tensors_sha256(path, names.expert_tensors(self._config.model, partition)):
            yield f"{path.name} holds other tensors than {PROVENANCE_FILE} says."
        if origin.manifest is None:
            yield f"Nothing in {PROVENANCE_FILE} says who made {path.name}: its manifest is missing."
            return
        manifest = origin.manifest.encode()
        try:
            check_manifest(manifest, {
                "run_id": lineage.run_id, "partition": partition, "sha256": actual, "shared_sha256": shared,
                "config_fingerprint": lineage.config_fingerprint})  # fmt: skip
        except ShardError as error:
            yield f"{PROVENANCE_FILE} on {path.name}: {error}"
            return
        if (origin.signature is None) != (origin.public_key is None):
            yield f"{PROVENANCE_FILE} holds half of a signature of {path.name}: the key or the signature is missing."
        elif origin.signature is not None and origin.public_key is not None and not verify_signature(
                bytes.fromhex(origin.public_key), manifest, bytes.fromhex(origin.signature)):  # fmt: skip
            yield f"The manifest of {path.name} is not signed by the node {origin.node_id}: one of the two was changed."

    # --- the index and what else lies there -------------------------------------------------------------------------

    def _index(self, arrived: dict[int, str]) -> Iterator[str]:
        index = read_json(self._dir / INDEX_FILE)
        self._add(INDEX_FILE, hash_file(self._dir / INDEX_FILE), "all files above", "coordinator", HASHED)
        if not isinstance(index, dict) or index.get("weight_map") != hf.weight_map(self._config.model):
            yield f"{INDEX_FILE} does not lead every tensor of the model to its file."
        elif (index.get("metadata") or {}).get("experts_arrived") != sorted(arrived):
            yield (f"{INDEX_FILE} names other experts as arrived than the files are: {sorted(arrived)}; if an assembly was "
                   "interrupted, `forge assemble RUN_DIR` finishes it.")  # fmt: skip
        elif index["metadata"].get("total_size") != hf.total_size(self._dir, self._config.model):
            yield f"{INDEX_FILE} names another size than the model's tensors have."
        said = {link.what for link in self._found.links if link.checked == WRONG}  # One sentence for each fault.
        if {item for item in placed(self._dir).items() ^ arrived.items() if expert_file(item[0]) not in said}:
            yield (f"{MANIFEST_FILE} names other experts than the files are; if an assembly was interrupted, `forge assemble "
                   "RUN_DIR` finishes it.")  # fmt: skip

    def _manifest_is_the_provenances(self) -> Iterator[str]:
        """What the manifest repeats of the provenance; the names and losses in its credits are nobody's signed word."""
        lineage, manifest = self._lineage, read_json(self._dir / MANIFEST_FILE)
        repeated = {"format_version": SHARD_FORMAT_VERSION, "run_id": lineage.run_id,
                    "config_fingerprint": lineage.config_fingerprint}  # fmt: skip
        repeated |= {f"{part}_sha256": lineage.components.get(part, "") for part in ("shared", "shared_ffn", "router")}
        for key, value in repeated.items():
            if manifest[key] != value:
                yield f"{MANIFEST_FILE} and {PROVENANCE_FILE} do not say the same {key}: one of the two was changed."
        origins = {shard.partition: shard for shard in lineage.shards}
        for row in manifest["experts"]:
            credit, origin = row.get("credit") or {}, origins.get(row["partition"])
            if origin is None or origin.manifest is None:
                continue
            signed = {"node_id": origin.node_id, "tokens": tokens_seen(parse_manifest(origin.manifest.encode()))}
            for key in signed.keys() & credit.keys():
                if credit[key] != signed[key]:
                    yield (f"{MANIFEST_FILE} credits expert {row['partition']} with another {key.replace('_', ' ')} than its "
                           f"manifest in {PROVENANCE_FILE} does.")  # fmt: skip

    def _strays(self) -> Iterator[str]:
        """Weights that the index does not name are weights all the same for some programs that load the directory."""
        known = set(hf.weight_map(self._config.model).values())
        for path in sorted(self._dir.iterdir()):
            if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".py") and path.name not in known:
                yield (f"{path.name} does not belong to the model: a program that loads the directory may take it for weights or "
                       "code.")  # fmt: skip

    # --- small things -----------------------------------------------------------------------------------------------

    def _check(self, problems: Callable[[], Iterable[str]]) -> None:
        """Gather what a check says, its error included: a file that cannot be read is a finding, not the end."""
        try:
            self._found.problems.extend(problems())
        except (ShardError, StorageError) as error:
            self._found.problems.append(str(error))
        except (KeyError, TypeError, ValueError, AttributeError):
            self._found.problems.append(f"{MANIFEST_FILE} or {INDEX_FILE} in {self._dir} is damaged: it is JSON, and not what "
                                        "an assembly writes.")  # fmt: skip

    def _blob(self, sha256: str) -> str:
        return ABSENT if self._run is None else self._hash(self._run.blobs.path(sha256), sha256)

    def _hash(self, path: Path, sha256: str) -> str:
        if not path.is_file():
            self._found.problems.append(f"{path} is missing.")
            return WRONG
        actual = hash_file(path)
        if actual == sha256:
            return HASHED
        self._found.problems.append(f"{path} was changed: its sha256 begins with {actual[:12]}, and {sha256[:12]} is in "
                                    f"{PROVENANCE_FILE}.")  # fmt: skip
        return WRONG

    def _add(self, what: str, sha256: str, made_from: str, by: str, checked: str) -> None:
        self._found.links.append(Link(what=what, sha256=sha256, made_from=made_from, by=by, checked=checked))


def lines(found: Findings) -> list[str]:
    """The lineage as a table for people."""
    rows = [("what", "sha256", "made from", "by", "checked"),
            *((link.what, link.sha256[:12], link.made_from, link.by, link.checked) for link in found.links)]  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows]
    experts = [link for link in found.links if link.what.startswith("expert-") and link.made_from != "shared_ffn"]
    unsigned = sum(link.by == "this machine" for link in experts)
    said = [f"run {found.run_id}, config {found.config_fingerprint[:12]}", *table, ""]
    if unsigned:
        said.append(f"{unsigned} of {len(experts)} experts were trained by the run's own machine: nobody signed them.")
    said.append("verified: every file is what the provenance says" if not found.problems else
                f"NOT verified: {len(found.problems)} of what was checked is wrong")  # fmt: skip
    return said
