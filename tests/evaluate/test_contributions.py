"""Contributions on a mixture of random weights; tests/test_pipeline.py has a trained one, and transformers beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
import torch

from forge.config import EvaluationConfig
from forge.data.packing import batches as group
from forge.data.tokens import TokenWriter
from forge.errors import StorageError
from forge.evaluate import contributions as module
from forge.evaluate.contributions import contributions, experts_of, replaced
from forge.evaluate.heldout import HeldOut
from forge.evaluate.perplexity import equal_weight_mean, measure
from forge.model import names
from forge.model.moe import MixtureLM
from tests.model.conftest import TINY, write_mixture

CONFIG = TINY.model_copy(update={"n_experts": 12, "top_k": 1})


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[MixtureLM, Path, HeldOut]:
    """A mixture, a shared FFN, and a partition of short documents, one of long ones and an empty one."""
    directory = tmp_path_factory.mktemp("model")
    model = MixtureLM.load(write_mixture(directory, CONFIG))
    random = torch.Generator().manual_seed(7)
    ffn = {name: torch.randn(shape, generator=random) * 0.3 for name, shape in names.ffn_tensors(CONFIG).items()}
    save_file(ffn, directory / "ffn.safetensors")
    files = []
    for number, length in enumerate((3, 40, 0)):
        files.append(directory / f"{number}.tokens")
        with TokenWriter(files[-1], CONFIG.vocab_size) as writer:
            for _ in range(12 if length else 0):
                writer.append(torch.randint(1, CONFIG.vocab_size, (length,), generator=random).tolist())
    return model, directory / "ffn.safetensors", HeldOut.of(files, CONFIG, EvaluationConfig(tokens=1000, samples=0))


def test_a_batch_that_never_asks_an_expert_is_not_computed_again_and_nothing_changes(
    parts: tuple[MixtureLM, Path, HeldOut], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path, held_out = parts
    monkeypatch.setattr(module, "BATCH_TOKENS", 8)
    passes = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal passes
        passes += 1
        return measure(*arguments, **options)

    monkeypatch.setattr(module, "measure", counted)
    everything = range(CONFIG.n_experts)
    rows = contributions(model, path, held_out, everything)
    batches = sum(len(list(group(held_out.windows(partition), 8))) for partition in range(3))
    assert 2 * batches < passes < (1 + CONFIG.n_experts) * batches
    windows = [list(held_out.windows(partition)) for partition in range(3)]
    whole = equal_weight_mean([measure(model, w) for w in windows])
    ffn = module._load(path, CONFIG)
    for expert, row in zip(everything, rows, strict=True):
        with replaced(model, expert, ffn):
            without = equal_weight_mean([measure(model, w) for w in windows])
        assert (row["expert"], row["loss_without"]) == (expert, pytest.approx(without, abs=1e-5))
        assert row["nats"] == pytest.approx(without - whole, abs=1e-5)
    assert min(row["nats"] for row in rows) < 0 < max(row["nats"] for row in rows)


def test_the_model_is_itself_again_also_after_an_error(parts: tuple[MixtureLM, Path, HeldOut]) -> None:
    model, path, held_out = parts
    before = [experts[3] for experts in experts_of(model)]
    with pytest.raises(RuntimeError), replaced(model, 3, module._load(path, CONFIG)):
        assert not {experts[3] for experts in experts_of(model)} & set(before)
        raise RuntimeError
    contributions(model, path, held_out, [3])
    assert [experts[3] for experts in experts_of(model)] == before


def test_a_shared_ffn_of_another_model_is_refused(parts: tuple[MixtureLM, Path, HeldOut], tmp_path: Path) -> None:
    model, _, held_out = parts
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(StorageError, match="lacks one of them"):
        contributions(model, tmp_path / "other.safetensors", held_out, [0])
