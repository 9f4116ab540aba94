"""What the expert phase does with the frozen components: it maps them, and no gradient comes near them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
import sys
from typing import Any

import pytest
import torch
from torch import nn

from forge.config import parse_config
from forge.data.packing import SequenceSampler
from forge.data.tokens import TokenFile
from forge.model import names
from forge.model.lm import DenseLM
from forge.train.expert import prepare_expert
from forge.train.loop import LoopSettings, train
from forge.train.loss import chunked_cross_entropy
from forge.vocabulary import END_OF_TEXT_ID
from tests.expert_work import write_files

CONFIG = parse_config({
    "model": {"vocab_size": 2048, "d_model": 64, "d_ff": 128, "n_layers": 3, "n_heads": 2, "n_experts": 2, "top_k": 1,
              "max_seq_len": 32},
    "train": {"batch_size": 2, "shared": {"tokens": 1000}, "expert": {"tokens": 3 * 2 * 32}},
})  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return write_files(tmp_path / "files", CONFIG)


def _model(files: dict[str, Path]) -> DenseLM:
    return prepare_expert(CONFIG, files["shared"], files["shared_ffn"], 0)


def _train(model: DenseLM, files: dict[str, Path], directory: Path) -> None:
    sampler = SequenceSampler(TokenFile(files["train_tokens"]), CONFIG.model.max_seq_len, 0, END_OF_TEXT_ID)
    train(model, sampler, LoopSettings(
        phase=CONFIG.train.expert, batch_size=2, sequence_length=32, micro_batch=1, directory=directory,
        checkpoint_seconds=1e6, stage="expert 0"), lambda **_: None, lambda: False)  # fmt: skip


def _frozen(model: DenseLM) -> Iterator[tuple[str, nn.Parameter]]:
    trained = names.ffn_tensors(CONFIG.model)
    return ((name, parameter) for name, parameter in model.named_parameters() if name not in trained)


def _mappings(path: Path) -> list[tuple[range, dict[str, int]]]:
    """Where this process has a file mapped: the addresses, and the numbers of the mapping in kB."""
    found: list[tuple[range, dict[str, int]]] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, *rest = line.split()
        if not head.endswith(":"):
            inside = line.endswith(str(path))
            if inside:
                start, end = (int(number, 16) for number in head.split("-"))
                found.append((range(start, end), {}))
        elif inside and rest and rest[0].isdigit():
            found[-1][1][head.rstrip(":")] = int(rest[0])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps tells what is mapped on Linux alone")
def test_frozen_tensors_are_their_file_before_and_after_training(files: dict[str, Path], tmp_path: Path) -> None:
    model = _model(files)
    for moment in ("loaded", "trained"):
        mapped = _mappings(files["shared"])
        for name, parameter in _frozen(model):
            last = parameter.data_ptr() + parameter.nbytes - 1
            assert any(parameter.data_ptr() in where and last in where for where, _ in mapped), f"{name} is a copy, {moment}"
        # A page that was written to would be a copy of the file's, and memory of this process.
        assert sum(facts["Anonymous"] for _, facts in mapped) == 0, moment
        if moment == "loaded":
            _train(model, files, tmp_path / "work")
    everything = mapped + _mappings(files["shared_ffn"])
    for name in names.ffn_tensors(CONFIG.model):
        address = model.get_parameter(name).data_ptr()
        assert not any(address in where for where, _ in everything), f"{name} is trained in its file"


def test_frozen_parameters_have_no_gradient_and_no_state(files: dict[str, Path], tmp_path: Path) -> None:
    model = _model(files)
    given: list[str] = []

    def note(name: str) -> Any:
        return lambda _: given.append(name)

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # A frozen one refuses the hook, since it can never have a gradient.
            parameter.register_post_accumulate_grad_hook(note(name))  # type: ignore[no-untyped-call]
    assert all(not parameter.requires_grad for _, parameter in _frozen(model))
    _train(model, files, tmp_path / "work")
    assert set(given) == set(names.ffn_tensors(CONFIG.model))
    assert all(parameter.grad is None for _, parameter in _frozen(model))


@pytest.mark.parametrize("recompute", [False, True])
def test_the_backward_pass_stops_at_the_first_expert(files: dict[str, Path], recompute: bool) -> None:
    model = _model(files)
    model.recompute = recompute
    needed: dict[str, list[bool]] = {}

    def note(name: str) -> Any:
        # With recomputation a layer runs again in the backward pass, which is when its graph is made.
        return lambda module, inputs, output: needed.setdefault(name, []).append(
            torch.is_grad_enabled() and output.grad_fn is not None)  # fmt: skip

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "layernorm", "self_attn", "mlp")):
            module.register_forward_hook(note(name))
    tokens = torch.randint(0, CONFIG.model.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    hidden = model(tokens[:, :-1])
    loss = chunked_cross_entropy(hidden.flatten(0, 1), model.head_weight, tokens[:, 1:].flatten())
    if not recompute:
        assert _leaves(loss) == {id(model.get_parameter(name)) for name in names.ffn_tensors(CONFIG.model)}
    torch.autograd.backward(loss)
    before = ["embed_tokens", *(f"layers.0.{part}" for part in ("input_layernorm", "self_attn", "post_attention_layernorm"))]
    for name, answers in needed.items():
        assert any(answers) != (name.removeprefix("model.") in before), name
    assert {name.removeprefix("model.") for name in needed} >= {*before, "layers.0.mlp", "layers.2.self_attn"}


def _leaves(loss: torch.Tensor) -> set[int]:
    """The tensors that a backward pass from `loss` would give a gradient to."""
    found, seen, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return found
