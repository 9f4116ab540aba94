"""The dense model: names, the identity of copies, gradients, causality, and what a bad file says."""

from __future__ import annotations

from collections.abc import Callable
import math
from pathlib import Path

import pytest
from safetensors.torch import save_file
import torch
from torch.nn import functional as F

from forge.errors import StorageError
from forge.model import names
from forge.model.attention import causal_attention
from forge.model.layers import Embedding, FeedForward, Linear, RMSNorm
from forge.model.lm import DenseLM, load_dense
from forge.model.moe import MixtureLM
from forge.train.loss import chunked_cross_entropy
from forge.vocabulary import SHARED_FILE, expert_file
from tests.model.conftest import TINY

TOKENS = torch.randint(1, TINY.vocab_size, (2, 48), generator=torch.Generator().manual_seed(1))


def fresh(seed: int = 0) -> DenseLM:
    model = DenseLM(TINY)
    model.initialise(torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_the_tensors_of_the_files(tied: bool) -> None:
    config = TINY.model_copy(update={"tie_embeddings": tied, "n_kv_heads": 2})
    with torch.device("meta"):
        model = DenseLM(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == {**names.shared_tensors(config), **names.ffn_tensors(config)}
    assert set(model.state_dict()) == set(shapes)
    assert sum(math.prod(shape) for shape in shapes.values()) == config.dense_parameters


def test_initial_weights_have_the_stated_scale_and_follow_the_seed() -> None:
    model, again = fresh(), fresh()
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], other) for name, other in again.named_parameters())
    assert weights["model.layers.0.mlp.w1.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    residual = 0.02 / math.sqrt(2 * TINY.n_layers)
    assert weights["model.layers.1.mlp.w2.weight"].std().item() == pytest.approx(residual, rel=0.1)
    channels = TINY.context_channels
    assert torch.all(weights["model.norm.weight"][:-channels] == 1)
    assert not weights["model.norm.weight"][-channels:].any()


def test_copies_of_one_ffn_are_the_dense_model(mixture: Callable[..., Path]) -> None:
    directory = mixture(same_ffn=True)
    dense = load_dense(TINY, directory / SHARED_FILE, directory / "ffn.safetensors")
    with torch.inference_mode():
        expected = dense(TOKENS) @ dense.head_weight.T
        model = MixtureLM.load(directory)
        for found in (model(TOKENS), model(TOKENS, gate="uniform"), model(TOKENS, only_expert=3)):
            losses = [F.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()) for logits in
                      (expected, found @ model.head_weight.T)]  # fmt: skip
            assert abs(losses[0] - losses[1]) < 1e-6


def test_a_shard_loads_in_the_place_of_the_shared_ffn(mixture: Callable[..., Path]) -> None:
    directory = mixture()
    dense = load_dense(TINY, directory / SHARED_FILE, directory / expert_file(2), expert=2)
    model = MixtureLM.load(directory)
    with torch.inference_mode():
        torch.testing.assert_close(dense(TOKENS), model(TOKENS, only_expert=2))
        assert not torch.allclose(dense(TOKENS), model(TOKENS, only_expert=1), atol=1e-2)


def test_only_the_ffn_of_a_loaded_model_learns_and_its_file_stays(mixture: Callable[..., Path]) -> None:
    directory = mixture(same_ffn=True)
    paths = directory / SHARED_FILE, directory / "ffn.safetensors"
    before = [path.read_bytes() for path in paths]
    model = load_dense(TINY, *paths)
    model(TOKENS).sum().backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == set(names.ffn_tensors(TINY))
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_frozen_matrices_lie_in_memory_once_in_the_type_of_the_products(tmp_path: Path, stored: torch.dtype, tied: bool) -> None:
    config = TINY.model_copy(update={"tie_embeddings": tied})
    whole = DenseLM(config)
    whole.initialise(torch.Generator().manual_seed(0))
    state = {name: tensor.to(stored) for name, tensor in whole.state_dict().items()}
    paths = tmp_path / "shared.safetensors", tmp_path / "ffn.safetensors"
    for path, shapes in zip(paths, (names.shared_tensors(config), names.ffn_tensors(config)), strict=True):
        save_file({name: state[name] for name in shapes}, path)

    def trained(products: torch.dtype) -> DenseLM:
        model = load_dense(config, *paths, products=products)
        model.compute_in(torch.bfloat16)
        torch.autograd.backward(chunked_cross_entropy(model(TOKENS), model.head_weight, TOKENS))
        return model

    narrow, wide = trained(torch.bfloat16), trained(torch.float32)
    for (name, kept), (_, widened) in zip(narrow.named_parameters(), wide.named_parameters(), strict=True):
        if kept.requires_grad:
            assert kept.grad is not None and widened.grad is not None
            assert kept.dtype == torch.float32 and torch.equal(kept.grad, widened.grad) and kept.grad.any()
        else:
            assert kept.dtype == (torch.float32 if kept.dim() == 1 else stored if name == names.EMBEDDING else torch.bfloat16)
            copied = name == names.EMBEDDING and tied and stored == torch.float32
            assert hasattr(kept, "working_copy") == copied, name


def _written_out(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A layer as autograd would differentiate it."""
    if isinstance(layer, FeedForward):
        return (F.silu(x @ layer.w1.weight.T) * (x @ layer.w3.weight.T)) @ layer.w2.weight.T
    if isinstance(layer, RMSNorm):
        return F.rms_norm(x, (x.shape[-1],), layer.weight, layer.eps)
    if isinstance(layer, Embedding):
        return F.embedding(x, layer.weight)
    assert isinstance(layer, Linear)
    return x @ layer.weight.T


@pytest.mark.parametrize("layer", [Linear(8, 6), RMSNorm(8, 1e-5), FeedForward(8, 16), Embedding(9, 5)],
                         ids=lambda layer: type(layer).__name__)  # fmt: skip
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_written_out_are_those_of_autograd(layer: torch.nn.Module, frozen: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.double().parameters():
        torch.nn.init.normal_(parameter, generator=generator).requires_grad_(not frozen)
    tokens = isinstance(layer, Embedding)
    if tokens and frozen:
        return
    results = []
    for function in (layer, lambda x: _written_out(layer, x)):
        x = torch.tensor([[1, 3, 1]]) if tokens else torch.randn(2, 3, 8, dtype=torch.float64, generator=generator.manual_seed(1))
        if not tokens:
            x.requires_grad_()
        layer.zero_grad()
        y = function(x)
        for _ in range(2):  # The second backward pass adds to the gradients of the first.
            (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y)).sum().backward(retain_graph=True)
        results.append([y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())])
    for ours, reference in zip(*results, strict=True):
        assert (ours is None) == (reference is None)
        if ours is not None:
            torch.testing.assert_close(ours, reference, check_dtype=False)


def test_attention_in_blocks_is_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 300, 16)  # Two whole blocks and a part of one.
    results = []
    for attend, dtype in ((causal_attention, torch.bfloat16), (causal_attention, torch.float32)):
        q, k, v = (torch.randn(shape, generator=generator.manual_seed(seed)).to(dtype).requires_grad_() for seed in range(3))
        y = attend(q, k, v)
        torch.autograd.backward((y.float() * torch.randn(shape, generator=generator.manual_seed(3))).sum())
        results.append([y, q.grad, k.grad, v.grad])
    for half, whole in zip(*results, strict=True):
        assert half is not None and whole is not None
        error = (half.float() - whole).norm() / whole.norm()
        assert error < 0.01


def test_recomputation_changes_memory_and_not_gradients() -> None:
    plain, saving = fresh(), fresh()
    saving.recompute = True
    gate_inputs: list[torch.Tensor] = []
    for model in (plain, saving):
        model(TOKENS, gate_inputs if model is saving else None).square().sum().backward()
    assert [g.shape for g in gate_inputs] == [(2, 48, TINY.d_model)] * TINY.n_layers
    for (name, one), two in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), name  # type: ignore[arg-type]


def test_a_token_depends_on_nothing_after_it() -> None:
    model = fresh()
    changed = TOKENS.clone()
    changed[:, 30:] = 5
    with torch.inference_mode():
        assert torch.equal(model(TOKENS)[:, :30], model(changed)[:, :30])


def test_bfloat16_products_stay_close() -> None:
    model = fresh()
    with torch.inference_mode():
        whole = model(TOKENS)
        model.compute_in(torch.bfloat16)
        half = model(TOKENS)
    assert half.dtype == torch.bfloat16
    assert (half.float() - whole).abs().max() < 0.1


def test_a_bad_file_is_one_sentence(mixture: Callable[..., Path], tmp_path: Path) -> None:
    directory = mixture(same_ffn=True)
    with pytest.raises(StorageError, match="missing, damaged"):
        load_dense(TINY, tmp_path / "nothing.safetensors", directory / "ffn.safetensors")
    with pytest.raises(StorageError, match="missing, damaged"):
        load_dense(TINY, directory / SHARED_FILE, directory / SHARED_FILE)
    wide = TINY.model_copy(update={"d_ff": 768})
    with pytest.raises(StorageError, match=r"w1.weight has shape \(128, 64\), expected \(512, 64\)"):
        load_dense(wide, directory / SHARED_FILE, directory / "ffn.safetensors")
    path = directory / SHARED_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StorageError, match="missing, damaged"):
        load_dense(TINY, path, directory / "ffn.safetensors")
