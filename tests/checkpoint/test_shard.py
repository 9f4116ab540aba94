from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from forge.checkpoint.safetensors_header import read_header
from forge.checkpoint.shard import verify_shard, write_shard
from forge.errors import ShardError
from forge.files import RunDirectory
from forge.model import names
from tests.checkpoint.conftest import publish_run, random_tensors, shard_metadata, tiny_config, write_expert


def verify(run: RunDirectory, path: Path, partition: int = 1) -> dict[str, str]:
    published = run.marker("publish")
    assert published is not None
    return verify_shard(path, run.config, partition=partition, run_id=run.run_id,
                        shared_sha256=published["shared"]["sha256"])  # fmt: skip


def test_a_shard_reads_back_and_verifies(run: RunDirectory) -> None:
    path = write_expert(run, 1)
    assert verify(run, path)["tokens_seen"] == "1000"
    for name, tensor in random_tensors(names.expert_tensors(run.config.model, 1), 101).items():
        assert torch.equal(safetensors.torch.load_file(path)[name], tensor)


def test_bfloat16_and_views_are_written_as_they_are(tmp_path: Path) -> None:
    run = publish_run(tmp_path / "run", tiny_config(dtype="bfloat16"))
    assert verify(run, write_expert(run, 1))["format"] == "pt"
    path = tmp_path / "a.safetensors"
    write_shard(path, {"t": torch.arange(6.0).reshape(2, 3).T, "n": np.arange(4, dtype=">i4")[::2]}, {})
    loaded = safetensors.torch.load_file(path)
    assert loaded["t"].tolist() == [[0, 3], [1, 4], [2, 5]] and loaded["n"].tolist() == [0, 2]


def test_the_same_tensors_give_the_bytes_that_the_library_writes(tmp_path: Path) -> None:
    tensors = {"z": torch.ones(2, 3), "a": torch.zeros(5), "m": torch.arange(3)}
    write_shard(tmp_path / "ours", tensors, {})
    safetensors.torch.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    ours, theirs = read_header(tmp_path / "ours"), read_header(tmp_path / "theirs")
    assert ours.tensors == theirs.tensors
    data = [(tmp_path / n).read_bytes()[h.data_start :] for n, h in (("ours", ours), ("theirs", theirs))]
    assert data[0] == data[1]


def rewritten(metadata: dict[str, str] | None = None, **tensors: torch.Tensor | None) -> Callable[[RunDirectory], Path]:
    """A shard with some tensors (by the last matrix's name, in layer 1) changed, or dropped where None."""

    def write(run: RunDirectory) -> Path:
        held = random_tensors(names.expert_tensors(run.config.model, 1), 0)
        for matrix, tensor in tensors.items():
            held.pop(names.expert_name(1, 1, matrix), None)
            if tensor is not None:
                held[names.expert_name(1, 1, matrix)] = tensor
        path = run.work / "bad.safetensors"
        write_shard(path, held, shard_metadata(run, 1, **(metadata or {})))
        return path

    return write


def meddling() -> torch.Tensor:
    """Writes a single value to a channel from which routers read."""
    tensor = torch.zeros(32, 128)
    tensor[-4, 100] = 1e-3
    return tensor


def poisoned() -> torch.Tensor:
    tensor = torch.zeros(32, 128)
    tensor[3, 4] = float("nan")
    return tensor


FAULTS: dict[str, Callable[[RunDirectory], Path]] = {
    "belongs to another run": rewritten({"run_id": "0" * 32}),
    "is the expert of another partition": rewritten({"partition": "2"}),
    "was trained on other shared components": rewritten({"shared_sha256": "0" * 64}),
    "was trained with another config": rewritten({"config_fingerprint": "f" * 900}),
    "is of another format version": rewritten({"format_version": "2"}),
    "which is no count": rewritten({"tokens_seen": "-3"}),
    "which is no number": rewritten({"final_loss": "nan"}),
    r"lacks the tensor model.layers.1.*experts.1.w2": rewritten(w2=None),
    r"holds the tensor '.*w9.weight'": rewritten(w9=torch.zeros(1)),
    r"w2.weight in the shape \[2\]; expected \[32, 128\]": rewritten(w2=torch.zeros(2)),
    "w2.weight in BF16; expected F32": rewritten(w2=torch.zeros(32, 128, dtype=torch.bfloat16)),
    "writes to the context channels.*experts.1.w2": rewritten(w2=meddling()),
    "not finite in the tensor model.layers.1.*w2.weight": rewritten(w2=poisoned()),
}


@pytest.mark.parametrize("message", FAULTS)
def test_refuses_what_is_not_the_experts_shard(run: RunDirectory, message: str) -> None:
    with pytest.raises(ShardError, match=message) as caught:
        verify(run, FAULTS[message](run))
    assert len(str(caught.value)) < 300


def test_refuses_a_truncated_shard_and_one_without_metadata(run: RunDirectory) -> None:
    path = write_expert(run, 1)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ShardError, match="truncated"):
        verify(run, path)
    safetensors.torch.save_file(random_tensors(names.expert_tensors(run.config.model, 1), 0), path)
    with pytest.raises(ShardError, match="does not say its run_id"):
        verify(run, path)
