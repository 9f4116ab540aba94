"""Real training, repeated in part: what was trained is found again, what was not is far from it."""

from __future__ import annotations

from collections.abc import Callable
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
import torch

from forge.config import parse_config
from forge.errors import ShardError
from forge.files import hash_file
from forge.model import names
from forge.train.expert import train_expert
from forge.train.replay import TOLERANCE, Part, replay
from forge.vocabulary import CHECKPOINT_FILE, kept_file
from tests import expert_work

RAM = 4 << 30
STEPS = 8


def small(**fleet: Any) -> Any:
    return parse_config({
        "model": {"vocab_size": 512, "d_model": 64, "d_ff": 128, "n_layers": 2, "n_heads": 2, "n_experts": 2, "top_k": 1,
                  "max_seq_len": 64},
        "train": {"batch_size": 4, "checkpoint_seconds": 1e6, "shared": {"tokens": 1000},
                  "expert": {"tokens": STEPS * 4 * 64, "learning_rate": 0.004}},
        "fleet": fleet})  # fmt: skip


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The assignment and the work directory of a node that trained it under audit."""
    root = tmp_path_factory.mktemp("node")
    assignment = expert_work.assignment(root / "files", small(audit=1.0, audit_parts=4))
    train_expert(assignment, root / "work", RAM, lambda **_: None, lambda: False)
    return assignment, root / "work"


def part(work: Path, first: int, **changed: Any) -> Part:
    last = first + 2
    after = work / ("shard.safetensors" if last == STEPS else kept_file(last))
    return Part(**{"first": first, "last": last, "before": work / kept_file(first) if first else None, "after": after} | changed)


def repeat(node: tuple[dict[str, Any], Path], what: Part, tmp_path: Path) -> dict[str, Any]:
    return replay(node[0], what, tmp_path / "replay", RAM, lambda **_: None, lambda: False)


def test_every_part_of_an_honest_training_is_found_again(node: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    manifest = json.loads((node[1] / "manifest.json").read_text())
    assert manifest["checkpoints"] == {str(step): hash_file(node[1] / kept_file(step)) for step in (2, 4, 6)}
    for first in range(0, STEPS, 2):
        found = repeat(node, part(node[1], first), tmp_path)
        assert found["finished"] and found["within"] and found["distance"] == 0.0 == found["momentum"], (first, found)


def _forged(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[[Path, Path], None]:
    def write(source: Path, target: Path) -> None:
        save_file({name: change(name, value) for name, value in load_file(source).items()}, target, {"facts": '{"step": 4}'})

    return write


FORGERIES: dict[str, Callable[[str, torch.Tensor], torch.Tensor]] = {
    "noise of a tenth in one matrix": lambda name, value: (
        value + 0.1 * value.std() * torch.ones_like(value) if name == f"model.{names.ffn_name(0, 'w1')}" else value),
    "weights made up": lambda name, value: torch.full_like(value, 0.01) if name.startswith("model.") else value,
    "a momentum made up": lambda name, value: value if name.startswith("model.") or not value.ndim else -value,
}  # fmt: skip


@pytest.mark.parametrize("what", ["the beginning again", "half of the steps", *FORGERIES])
def test_what_was_not_trained_is_far_away(node: tuple[dict[str, Any], Path], tmp_path: Path, what: str) -> None:
    made = tmp_path / "made.safetensors"
    if what == "the beginning again":
        made = node[1] / kept_file(2)
    elif what == "half of the steps":
        count = iter(range(2))
        (tmp_path / "half").mkdir()
        (tmp_path / "half" / CHECKPOINT_FILE).write_bytes((node[1] / kept_file(2)).read_bytes())
        train_expert(node[0], tmp_path / "half", RAM, lambda **_: None, lambda: next(count) >= 1)
        made = tmp_path / "half" / CHECKPOINT_FILE
    else:
        _forged(FORGERIES[what])(node[1] / kept_file(4), made)
    found = repeat(node, part(node[1], 2, after=made), tmp_path)
    assert not found["within"] and max(found["distance"], found["momentum"]) > TOLERANCE, found


def test_a_lie_about_the_beginning_is_found_at_the_end(node: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    save_file(load_file(node[1] / kept_file(4)), tmp_path / "made.safetensors", {"facts": '{"step": 2}'})
    assert not repeat(node, part(node[1], 2, before=tmp_path / "made.safetensors"), tmp_path)["within"]


def test_what_lacks_a_matrix_is_no_end(node: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    tensors = load_file(node[1] / kept_file(4))
    del tensors[next(name for name in tensors if name.startswith("model."))]
    save_file(tensors, tmp_path / "made.safetensors", {"facts": '{"step": 4}'})
    with pytest.raises(ShardError, match="lacks the tensor"):
        repeat(node, part(node[1], 2, after=tmp_path / "made.safetensors"), tmp_path)


def test_a_training_that_was_stopped_keeps_the_same_checkpoints(node: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    for stop_after in (3, 1, STEPS):
        left = iter(range(STEPS + 1))
        train_expert(node[0], tmp_path / "work", RAM, lambda **_: None, lambda: next(left) >= stop_after)  # noqa: B023
    for step in (2, 4, 6):
        assert hash_file(tmp_path / "work" / kept_file(step)) == hash_file(node[1] / kept_file(step))


def test_without_an_audit_nothing_is_kept(tmp_path: Path) -> None:
    assignment = expert_work.assignment(tmp_path / "files", small())
    train_expert(assignment, tmp_path / "work", RAM, lambda **_: None, lambda: False)
    assert not list((tmp_path / "work").glob("kept-*"))
    assert json.loads((tmp_path / "work" / "manifest.json").read_text())["checkpoints"] == {}
