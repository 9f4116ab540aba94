from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
import torch

from forge.checkpoint.assembly import accept, calibration, start
from forge.checkpoint.calibrate import calibrate
from forge.checkpoint.shard import write_shard
from forge.data.tokens import TokenWriter
from forge.evaluate.perplexity import document_losses
from forge.files import RunDirectory, hash_file
from forge.model import names
from forge.model.moe import MixtureLM
from forge.vocabulary import SHARED_FILE
from tests.checkpoint.conftest import make_shard, publish_run, random_tensors, tiny_config


def sharp_run(root: Path, dtype: str, sharpness: float) -> RunDirectory:
    """A run whose final norm is `sharpness` times too large for the text that `write_text` makes of it."""
    run = publish_run(root, tiny_config(dtype=dtype))
    tensors = random_tensors(names.shared_tensors(run.config.model), 0, dtype)
    tensors[names.FINAL_NORM] = (tensors[names.FINAL_NORM].float() * sharpness).to(tensors[names.FINAL_NORM].dtype)
    path = run.work / "shared.safetensors"
    write_shard(path, tensors, {})
    published = run.marker("publish")
    assert published is not None
    published["shared"]["sha256"] = run.blobs.adopt(path)
    run.finish("publish", published)
    start(run)
    return run


def write_text(path: Path, model: MixtureLM, sharpness: float, seed: int) -> Path:
    """Documents whose tokens are drawn from the model's own predictions at sharpness 1."""
    generator = torch.Generator().manual_seed(seed)
    with TokenWriter(path, model.config.vocab_size) as writer, torch.inference_mode():
        for _ in range(12):
            tokens_BT = torch.zeros(1, 1, dtype=torch.int64)
            for _ in range(40):
                z_V = model(tokens_BT)[0, -1] @ model.head_weight.float().T / sharpness
                drawn = torch.multinomial(z_V.softmax(0), 1, generator=generator)
                tokens_BT = torch.cat([tokens_BT, drawn[None]], 1)
            writer.append(np.asarray(tokens_BT[0, 1:]))
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_too_sharp_a_model_is_softened_once(tmp_path: Path, dtype: str) -> None:
    run = sharp_run(tmp_path / "run", dtype, 1.6)
    accept(run, 0, make_shard(run, 0), {})
    blob = (run.model / SHARED_FILE).resolve().read_bytes()
    model = MixtureLM.load(run.model)
    files = [write_text(tmp_path / f"{seed}.safetensors", model, 1.6, seed) for seed in range(2)]
    before = load_file(run.model / SHARED_FILE)
    report = calibrate(run.model, files, 0, 64, 10_000)
    assert report["kept"] and report["after"] < report["before"] and 0.5 <= report["scale"] < 0.9
    after = load_file(run.model / SHARED_FILE)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {names.FINAL_NORM}
    expected = before[names.FINAL_NORM].float() * report["scale"]
    torch.testing.assert_close(after[names.FINAL_NORM].float(), expected, atol=0, rtol=4e-3)

    def losses() -> float:
        from forge.data.packing import evaluation_windows
        from forge.data.tokens import TokenFile

        windows = [window for file in files for window in evaluation_windows(TokenFile(file), 64, 0, None)]
        nats, tokens = document_losses(MixtureLM.load(run.model), windows[1::2])
        return nats / tokens

    assert losses() == pytest.approx(report["after"], abs=1e-5)
    sha256 = hash_file(run.model / SHARED_FILE)
    assert calibrate(run.model, files, 0, 64, 10_000) == report
    start(run)  # leaves it in place, and the published blob as it was
    assert hash_file(run.model / SHARED_FILE) == sha256
    published = run.marker("publish")
    assert published is not None
    assert run.blobs.path(published["shared_with_context"]["sha256"]).read_bytes() == blob
    accept(run, 1, make_shard(run, 1), {})
    held = calibration(run.model)
    assert held is not None and held["sha256"] == sha256


def test_what_does_not_help_is_not_kept(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(run)
    model = MixtureLM.load(run.model)
    files = [write_text(tmp_path / "0.safetensors", model, 1.0, 0)]
    sha256 = hash_file(run.model / SHARED_FILE)

    def wrong(*_: Any) -> float:
        return 0.5

    monkeypatch.setattr("forge.checkpoint.calibrate._fit", wrong)
    report = calibrate(run.model, files, 0, 64, 10_000)
    assert not report["kept"] and report["after"] > report["before"]
    assert hash_file(run.model / SHARED_FILE) == sha256 and calibration(run.model) is None
    with TokenWriter(tmp_path / "empty.safetensors", 260):
        pass
    assert calibrate(run.model, [tmp_path / "empty.safetensors"], 0, 64, 10_000) == {
        "before": None, "after": None, "scale": 1.0, "kept": False}  # fmt: skip
