from __future__ import annotations

import hashlib
import os
from pathlib import Path
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from forge.checkpoint.assembly import accept, arrived, is_placeholder, start
from forge.checkpoint.provenance import keep, origin
from forge.errors import ShardError, StorageError
from forge.files import RunDirectory, read_json
from forge.model.lm import load_dense
from forge.vocabulary import INDEX_FILE, MANIFEST_FILE, SHARED_FILE, expert_file
from tests.checkpoint.conftest import make_shard, publish_run, tiny_config

TOKENS_BT = torch.arange(40).reshape(2, 20) * 5 % 257
CREDIT = {"node_name": "laptop", "tokens": 1000}


def logits(directory: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return Tensor.float(model(TOKENS_BT).logits)


def dense_logits(run: RunDirectory) -> Tensor:
    published = run.marker("publish")
    assert published is not None
    shared, ffn = (run.blobs.path(published[part]["sha256"]) for part in ("shared", "shared_ffn"))
    model = load_dense(run.config.model, shared, ffn)
    with torch.no_grad():
        return torch.matmul(model(TOKENS_BT), model.head_weight.float().T)


@pytest.mark.parametrize("model", [{}, {"dtype": "bfloat16"}, {"tie_embeddings": False}])
def test_placeholders_are_the_shared_model_and_a_shard_changes_it(tmp_path: Path, model: dict[str, Any]) -> None:
    run = publish_run(tmp_path / "run", tiny_config(**model))
    start(run)
    before = logits(run.model)
    assert arrived(run.model) == {}
    torch.testing.assert_close(before, dense_logits(run), atol=1e-4, rtol=0)
    sha256 = make_shard(run, 1)
    accept(run, 1, sha256, CREDIT)
    assert arrived(run.model) == {1: sha256}
    assert hashlib.sha256((run.model / expert_file(1)).read_bytes()).hexdigest() == sha256
    assert (logits(run.model) - before).abs().max() > 1e-2
    manifest = read_json(run.model / MANIFEST_FILE)
    assert manifest["experts"][1] == {"partition": 1, "sha256": sha256, "credit": CREDIT}
    assert manifest["experts"][0]["sha256"] is None and manifest["run_id"] == run.run_id
    index = read_json(run.model / INDEX_FILE)
    assert index["metadata"]["experts_arrived"] == [1]
    itemsize = 2 if model.get("dtype") else 4
    assert index["metadata"]["total_size"] == run.config.model.total_parameters * itemsize
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    assert tokenizer.decode(tokenizer("Grüße").input_ids) == "Grüße" and tokenizer.eos_token_id == 0


def test_start_and_accept_are_idempotent_and_never_downgrade(run: RunDirectory) -> None:
    start(run)
    sha256 = make_shard(run, 0)
    accept(run, 0, sha256, CREDIT)
    (run.model / "left.tmp").write_bytes(b"half")
    held = {path.name: path.read_bytes() for path in run.model.iterdir() if path.suffix != ".tmp"}
    start(run)
    accept(run, 0, sha256, CREDIT)
    start(run)
    assert {path.name: path.read_bytes() for path in run.model.iterdir()} == held
    better = make_shard(run, 0, seed=7)
    accept(run, 0, better, CREDIT)
    assert arrived(run.model) == {0: better}


def test_start_repairs_what_a_kill_or_a_hand_left(run: RunDirectory) -> None:
    start(run)
    first, second = make_shard(run, 0), make_shard(run, 1)
    accept(run, 0, first, CREDIT)
    keep(run, origin(run.blobs.path(second), run.config, 1, b"{}", sha256=second), CREDIT)
    (run.model / expert_file(0)).unlink()
    os.link(run.blobs.path(second), run.model / "moved")
    os.replace(run.model / "moved", run.model / expert_file(1))  # killed before the index and the manifest
    assert arrived(run.model) == {1: second}
    (run.model / expert_file(2)).write_bytes(b"damaged")
    start(run)
    assert arrived(run.model) == {0: first, 1: second}
    assert [row["credit"] for row in read_json(run.model / MANIFEST_FILE)["experts"]] == [CREDIT, CREDIT, {}]
    assert is_placeholder(run.model / expert_file(2))
    run.blobs.path(first).unlink()
    (run.model / expert_file(0)).unlink()
    (run.model / expert_file(0)).write_bytes(b"damaged")
    with pytest.raises(StorageError, match="no copy of that is left"):
        start(run)
    (run.model / expert_file(0)).unlink()
    start(run)
    assert arrived(run.model) == {1: second}


def test_only_published_shared_components_are_assembled(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="start the assembly"):
        accept(run, 0, make_shard(run, 0), CREDIT)
    published = run.marker("publish")
    assert published is not None
    blob = run.blobs.path(published["shared"]["sha256"])
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(StorageError, match="not the published one"):
        start(run)
    assert not (run.model / INDEX_FILE).exists()
    (run.root / "stages" / "publish.json").unlink()
    with pytest.raises(StorageError, match="finish the publish stage"):
        start(run)


def test_a_shard_of_another_partition_is_refused(run: RunDirectory) -> None:
    start(run)
    with pytest.raises(ShardError, match="does not hold the tensors of expert 2"):
        accept(run, 2, make_shard(run, 1), CREDIT)
    with pytest.raises(ShardError, match="no partition 3"):
        accept(run, 3, make_shard(run, 1), CREDIT)
    with pytest.raises(StorageError):
        accept(run, 0, "0" * 64, CREDIT)
    assert arrived(run.model) == {}


def test_loads_at_every_instant(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the directory after every rename, as a kill would leave it, and load each copy."""
    start(run)
    shards = [make_shard(run, partition) for partition in range(2)]
    moments: list[Path] = []
    replace = os.replace

    def photographed(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).parent == run.model:
            moments.append(tmp_path / f"moment-{len(moments)}")
            shutil.copytree(run.model, moments[-1])

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", photographed)
        for partition, sha256 in enumerate(shards):
            accept(run, partition, sha256, CREDIT)
        start(run)
    assert len(moments) >= 6
    for moment in moments:
        assert torch.isfinite(logits(moment)).all()
    assert (moments[-1] / SHARED_FILE).is_file()


MEASURE = """
import resource, sys
from pathlib import Path
from forge.checkpoint.assembly import accept, start
from forge.files import RunDirectory
run = RunDirectory(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start(run)
accept(run, 0, sys.argv[2], {})
assert "torch" not in sys.modules
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_one_chunk_whatever_the_size(tmp_path: Path) -> None:
    run = publish_run(tmp_path / "run", tiny_config(d_model=256, d_ff=12_288, n_layers=4))
    sha256 = make_shard(run, 0)
    assert run.blobs.path(sha256).stat().st_size > 90 << 20
    done = subprocess.run([sys.executable, "-c", MEASURE, run.root, sha256], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 12 << 10  # KiB; a shard is 96 MiB


def test_copies_where_the_file_system_has_no_hard_links(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    start(run)
    sha256 = make_shard(run, 0)
    accept(run, 0, sha256, CREDIT)
    start(run)
    assert arrived(run.model) == {0: sha256}
    assert torch.isfinite(logits(run.model)).all()
