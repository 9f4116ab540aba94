"""Assembly: write where an expert comes from, put its file in place, rewrite the index, rewrite the manifest last. No tensor
enters memory.

The model directory is a complete checkpoint from the first call on. An expert that has not arrived is a placeholder:
the shared FFN's bytes under the expert's names, so that the model computes what the shared components compute. A shard
has the same tensor names as the placeholder it replaces, and every file is replaced in one rename; so whichever of the
steps was the last one to happen, what is there loads. Memory is one chunk, time the bytes of the shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import threading
from typing import Any

from forge.checkpoint import hf
from forge.checkpoint.provenance import kept_credit, write_lineage
from forge.checkpoint.safetensors_header import Header, read_header, write_renamed
from forge.checkpoint.shard import FORMAT
from forge.config import ModelConfig
from forge.errors import ForgeError, ShardError, StorageError, storage_errors
from forge.files import RunDirectory, hash_file, link_or_copy, read_json, remove_temporaries, write_json
from forge.model import names
from forge.vocabulary import MANIFEST_FILE, ROUTER_FILE, SHARD_FORMAT_VERSION, SHARED_FILE, expert_file

#: Files that `start` reads at a time: while one is hashed or synced, another is copied.
_AT_A_TIME = 2
#: The published files that the model is made of, the largest first.
_COMPONENTS = ("shared_ffn", "shared_with_context", "router")
#: The manifest is read, changed and written: one change at a time in this process. A run has one assembling process.
_changing = threading.Lock()


def start(run: RunDirectory) -> None:
    """Make the model directory complete: shared components, router, and every expert, as a placeholder if need be.

    Idempotent: what is in place and sound stays, an expert that arrived is never replaced by a placeholder, and an
    assembly that was killed between two steps is finished.

    Raises:
        StorageError: the publish stage has not finished, a published file does not have the sha256 that was published,
            an accepted expert is lost, or the directory cannot be written.
    """
    published = _published(run)
    model, config = run.model, run.config.model
    with _changing, storage_errors(model):
        model.mkdir(parents=True, exist_ok=True)
        remove_temporaries(model)
        held = _manifest(model)
        ffn = published["shared_ffn"]["sha256"]
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            list(pool.map(lambda part: _check_blob(run, part, published[part]["sha256"]), _COMPONENTS))
            rescaled = _calibration(model, held)
            if rescaled is None:
                _place(run, published["shared_with_context"]["sha256"], SHARED_FILE)
            _place(run, published["router"]["sha256"], ROUTER_FILE)
            experts = list(pool.map(lambda partition: _settle(run, partition, _row(held, partition), ffn),
                                    range(config.n_experts)))  # fmt: skip
        hf.write_configuration(model, config, run.data)
        _trace(run, published, experts)
        _write(run, published, experts, rescaled)


def accept(run: RunDirectory, partition: int, shard_sha256: str, credit: Mapping[str, Any]) -> None:
    """Write the lineage, put an accepted shard in its place, then rewrite the index, then the manifest. Idempotent.

    What `provenance.keep` was told of the shard goes into the lineage.

    Args:
        run: the run, whose assembly was started.
        partition: the partition that the shard is the expert of.
        shard_sha256: the shard, in `run.blobs`.
        credit: who made it, for the manifest (such as `node_id`, `node_name`, `tokens`, `loss`).

    Raises:
        ShardError: the blob's tensors are not this partition's expert's, so the model would not load with it.
        StorageError: the assembly was not started, the blob is missing, or the directory cannot be written.
    """
    published = _published(run)
    config = run.config.model
    blob = run.blobs.path(shard_sha256)
    if not 0 <= partition < config.n_experts:
        raise ShardError(f"There is no partition {partition}: the run has {config.n_experts}.")
    with _changing:
        held = _manifest(run.model)
        if not held:
            raise StorageError(f"{run.model} holds no assembled model: start the assembly before accepting a shard.")
        header = read_header(blob)
        if {name: entry.shape for name, entry in header.tensors.items()} != names.expert_tensors(config, partition):
            raise ShardError(f"The shard {shard_sha256[:12]} does not hold the tensors of expert {partition}.")
        experts = [_row(held, other) for other in range(config.n_experts)]
        experts[partition] = {"partition": partition, "sha256": shard_sha256, "credit": dict(credit)}
        _trace(run, published, experts)
        link_or_copy(blob, run.model / expert_file(partition))
        _write(run, published, experts, held.get("calibration"))


def withdraw(run: RunDirectory, partition: int) -> None:
    """Take an expert out again: its placeholder, then the index, then the manifest. Idempotent.

    A calibration goes with it: it was measured on a model that held this expert.

    Raises:
        StorageError: the assembly was not started, or the directory cannot be written.
    """
    published = _published(run)
    with _changing:
        held = _manifest(run.model)
        if not held:
            raise StorageError(f"{run.model} holds no assembled model: start the assembly first.")
        _write_placeholder(run, partition, published["shared_ffn"]["sha256"])
        _place(run, published["shared_with_context"]["sha256"], SHARED_FILE)
        experts = [_row(held if other != partition else {}, other) for other in range(run.config.model.n_experts)]
        _trace(run, published, experts)
        _write(run, published, experts, None)


def placed(model_dir: Path) -> dict[int, str]:
    """Partitions whose expert is in place, as the manifest says -> sha256. Reads no expert; see `arrived`.

    Raises:
        StorageError: the manifest cannot be read.
    """
    rows = _manifest(model_dir).get("experts", [])
    return {int(row["partition"]): str(row["sha256"]) for row in rows if row["sha256"] is not None}


def credited(model_dir: Path) -> dict[int, str]:
    """Partitions whose expert is in place -> name of the node that made it, as the manifest says.

    Raises:
        StorageError: the manifest cannot be read.
    """
    rows = _manifest(model_dir).get("experts", [])
    return {int(row["partition"]): str(row.get("credit", {}).get("node_name") or "unnamed")
            for row in rows if row["sha256"] is not None}  # fmt: skip


def arrived(model_dir: Path) -> dict[int, str]:
    """Partitions whose expert has arrived -> sha256 of the shard that is in place.

    The files decide: an expert in place counts although the process was killed before it wrote the manifest, and an
    entry of the manifest whose file is missing, damaged or a placeholder does not. Reads every expert's file once.

    Raises:
        StorageError: a file cannot be read.
    """
    found: dict[int, str] = {}
    for row in _manifest(model_dir).get("experts", []):
        partition = int(row["partition"])
        file = model_dir / expert_file(partition)
        if _sound(file) is not None and not is_placeholder(file):
            found[partition] = hash_file(file)
    return found


def calibration(model_dir: Path) -> dict[str, Any] | None:
    """What `record_calibration` recorded last, or None.

    Raises:
        StorageError: the manifest cannot be read.
    """
    held = _manifest(model_dir).get("calibration")
    return dict(held) if held else None


def record_calibration(model_dir: Path, facts: Mapping[str, Any]) -> None:
    """Write into the manifest that `shared.safetensors` was rewritten, so that `start` leaves it as it is.

    Args:
        model_dir: an assembled model.
        facts: at least `sha256`, of the rewritten file.

    Raises:
        StorageError: the directory holds no assembled model or cannot be written.
    """
    with _changing:
        write_json(model_dir / MANIFEST_FILE, {**read_json(model_dir / MANIFEST_FILE), "calibration": dict(facts)})


def is_placeholder(file: Path) -> bool:
    """Whether an expert's file is the shared FFN, waiting for the expert.

    Raises:
        ShardError: the file is not a sound safetensors file.
        StorageError: the file is missing.
    """
    return read_header(file).metadata.get("placeholder") == "true"


def _published(run: RunDirectory) -> dict[str, Any]:
    published = run.marker("publish")
    if published is None:
        raise StorageError(f"{run.root} has not published its shared components: finish the publish stage first.")
    return published


def _manifest(model: Path) -> dict[str, Any]:
    path = model / MANIFEST_FILE
    return dict(read_json(path)) if path.is_file() else {}


def _row(manifest: Mapping[str, Any], partition: int) -> dict[str, Any]:
    for row in manifest.get("experts", []):
        if row["partition"] == partition:
            return dict(row)
    return {"partition": partition, "sha256": None, "credit": {}}


def _check_blob(run: RunDirectory, part: str, sha256: str) -> None:
    """The shared components are frozen: their bytes, and so every tensor's, must be the published ones."""
    if not run.blobs.has(sha256):
        raise StorageError(f"The published {part} file {sha256[:12]} is missing from {run.blobs.directory}.")
    actual = hash_file(run.blobs.path(sha256))
    if actual != sha256:
        raise StorageError(f"The {part} file in {run.blobs.directory} is not the published one: its sha256 begins with "
                           f"{actual[:12]} and {sha256[:12]} was published.")  # fmt: skip


def _place(run: RunDirectory, sha256: str, name: str) -> None:
    target = run.model / name
    if not (target.is_file() and target.samefile(run.blobs.path(sha256))):
        link_or_copy(run.blobs.path(sha256), target)


def _calibration(model: Path, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The calibration that rewrote `shared.safetensors`, as long as the file is still the one it wrote."""
    held = manifest.get("calibration")
    if not held or not (model / SHARED_FILE).is_file():
        return None
    return dict(held) if hash_file(model / SHARED_FILE) == held["sha256"] else None


def _settle(run: RunDirectory, partition: int, row: dict[str, Any], ffn_sha256: str) -> dict[str, Any]:
    """Bring one expert's file and its row of the manifest into agreement, and return the row."""
    file = run.model / expert_file(partition)
    claimed = row["sha256"]
    header = _sound(file)
    if header is not None and header.metadata.get("placeholder") != "true":
        actual = hash_file(file)
        if actual == claimed:
            return row
        if run.blobs.has(actual):  # killed after the file was in place and before the manifest was
            return {"partition": partition, "sha256": actual, "credit": kept_credit(run, actual)}
    if claimed is not None and run.blobs.has(claimed):
        link_or_copy(run.blobs.path(claimed), file)
        return row
    if claimed is not None and file.exists():
        raise StorageError(f"{file} is not the accepted expert {claimed[:12]} any more and no copy of that is left: "
                           "delete the file to have the expert trained anew.")  # fmt: skip
    if header is None or header.metadata.get("source_sha256") != ffn_sha256:
        _write_placeholder(run, partition, ffn_sha256)
    return {"partition": partition, "sha256": None, "credit": {}}


def _sound(file: Path) -> Header | None:
    try:
        return read_header(file) if file.is_file() else None
    except ForgeError:
        return None


def _write_placeholder(run: RunDirectory, partition: int, ffn_sha256: str) -> None:
    config: ModelConfig = run.config.model
    rename = {names.ffn_name(layer, matrix): names.expert_name(layer, partition, matrix)
              for layer in range(config.n_layers) for matrix in names.MATRICES}  # fmt: skip
    metadata = {**FORMAT, "placeholder": "true", "partition": str(partition), "source_sha256": ffn_sha256}
    write_renamed(run.blobs.path(ffn_sha256), run.model / expert_file(partition), rename, metadata)


def _trace(run: RunDirectory, published: Mapping[str, Any], experts: list[dict[str, Any]]) -> None:
    write_lineage(run, published, {row["partition"]: row["sha256"] for row in experts if row["sha256"] is not None})


def _write(run: RunDirectory, published: Mapping[str, Any], experts: list[dict[str, Any]],
           rescaled: Mapping[str, Any] | None) -> None:  # fmt: skip
    in_place = [row["partition"] for row in experts if row["sha256"] is not None]
    hf.write_index(run.model, run.config.model, {"experts_arrived": in_place})
    manifest = {
        "format_version": SHARD_FORMAT_VERSION,
        "run_id": published["run_id"],
        "config_fingerprint": published["config_fingerprint"],
        "shared_sha256": published["shared"]["sha256"],
        "shared_ffn_sha256": published["shared_ffn"]["sha256"],
        "router_sha256": published["router"]["sha256"],
        "experts": experts,
    }
    if rescaled:
        manifest["calibration"] = dict(rescaled)
    write_json(run.model / MANIFEST_FILE, manifest)
