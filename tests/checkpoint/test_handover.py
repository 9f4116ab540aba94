from __future__ import annotations

from collections.abc import Callable
import json
from pathlib import Path
import pickle
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from forge.checkpoint.handover import check_checkpoint, largest_checkpoint
from forge.checkpoint.safetensors_header import read_header
from forge.config import RunConfig, parse_config
from forge.errors import ForgeError, ShardError
from forge.files import hash_file
from forge.train.expert import train_expert
from tests.expert_work import CONFIG, assignment

#: Three steps of a moment each.
SMALL = parse_config(CONFIG.model_dump() | {
    "model": CONFIG.model.model_dump() | {"d_ff": 64, "n_layers": 1, "max_seq_len": 64},
    "train": CONFIG.train.model_dump() | {"expert": CONFIG.train.expert.model_dump() | {"tokens": 3 * 4 * 64}}})  # fmt: skip


def with_optimizer(name: str) -> RunConfig:
    train = SMALL.train.model_dump()
    return parse_config(SMALL.model_dump() | {"train": train | {"expert": train["expert"] | {"optimizer": name}}})


def run(work: Path, where: Path, config: RunConfig, stop_after: int) -> dict[str, object]:
    steps = iter(range(stop_after))
    return train_expert(assignment(where, config), work, 1 << 30, lambda **event: None, lambda: next(steps, None) is None, "cpu")


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_next_node_ends_with_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    config = with_optimizer(optimizer)
    alone = run(tmp_path / "alone", tmp_path / "files", config, 99)
    assert not run(tmp_path / "first", tmp_path / "files", config, 2)["finished"]
    checkpoint = tmp_path / "first" / "checkpoint.safetensors"
    assert check_checkpoint(checkpoint, config) == 2
    assert checkpoint.stat().st_size <= largest_checkpoint(config)
    (tmp_path / "second").mkdir()
    shutil.copy(checkpoint, tmp_path / "second")
    continued = run(tmp_path / "second", tmp_path / "files", config, 99)
    assert continued["finished"] and config.steps("expert") == 3
    theirs, ours = load_file(str(continued["shard"])), load_file(str(alone["shard"]))
    assert all(np.array_equal(theirs[name], ours[name]) for name in ours)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    run(root / "work", root / "files", SMALL, 1)
    return root / "work" / "checkpoint.safetensors"


def _poison(tensors: dict[str, np.ndarray]) -> None:
    next(iter(tensors.values())).flat[0] = np.inf


def _shorten(tensors: dict[str, np.ndarray]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name][:-1].copy()


HOSTILE: dict[str, Callable[[dict[str, np.ndarray]], object]] = {
    "not finite": _poison,
    "does not hold the tensors": lambda tensors: tensors.pop(next(iter(tensors))),
    "the tensors of an expert": _shorten,
    "of this run in training": lambda tensors: tensors.update(more=np.zeros(3, np.float32)),
}


@pytest.mark.parametrize("words", HOSTILE)
def test_other_tensors_are_refused(sound: Path, tmp_path: Path, words: str) -> None:
    tensors = load_file(sound)
    HOSTILE[words](tensors)
    save_file(tensors, tmp_path / "bad", read_header(sound).metadata)
    with pytest.raises(ShardError, match=words):
        check_checkpoint(tmp_path / "bad", SMALL)


@pytest.mark.parametrize("facts", [None, "{", "[]", "7", '{"step": 0}', '{"step": 3}', '{"step": true}', '{"step": 1e9}',
                                   '{"step": "1"}', "[" * 100_000])  # fmt: skip
def test_other_steps_are_refused(sound: Path, tmp_path: Path, facts: str | None) -> None:
    save_file(load_file(sound), tmp_path / "bad", None if facts is None else {"facts": facts})
    with pytest.raises(ShardError, match="step"):
        check_checkpoint(tmp_path / "bad", SMALL)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
            return Path.write_text, (tmp_path / "sprung", "")  # type: ignore[return-value]

    (tmp_path / "bad").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ForgeError):
        check_checkpoint(tmp_path / "bad", SMALL)
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_of_another_config_is_refused(sound: Path) -> None:
    with pytest.raises(ShardError, match="does not hold the tensors"):
        check_checkpoint(sound, CONFIG)
    assert json.loads(read_header(sound).metadata["facts"])["step"] == 1 and hash_file(sound)
