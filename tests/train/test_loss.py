from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from forge.train.loss import IGNORE_INDEX, chunked_cross_entropy
from forge.train.memory import CHUNK_POSITIONS


def _case(positions: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, 24, generator=generator, dtype=torch.float64)
    head = torch.randn(97, 24, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 97, (positions,), generator=generator)
    targets[::7] = IGNORE_INDEX
    return hidden, head, targets


@pytest.mark.parametrize("positions", [1, 9, CHUNK_POSITIONS, CHUNK_POSITIONS + 3])
def test_loss_and_both_gradients_equal_the_full_logits(positions: int) -> None:
    hidden, head, targets = (tensor.float() if tensor.is_floating_point() else tensor for tensor in _case(positions))
    targets[0] = 3
    gradients = []
    functions: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
        lambda h, w: 3 * F.cross_entropy(h @ w.T, targets),
        lambda h, w: chunked_cross_entropy(h, w, targets, weight=3.0)]  # fmt: skip
    for function in functions:
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        loss = function(h, w)
        torch.autograd.backward(loss)
        gradients.append((loss.detach(), h.grad, w.grad))
    for ours, reference in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, reference, atol=2e-5, rtol=1e-4)


def test_a_multiple_of_the_loss_of_a_learning_head_cannot_be_differentiated() -> None:
    hidden, head, targets = (tensor.float() if tensor.is_floating_point() else tensor for tensor in _case(9))
    with pytest.raises(RuntimeError, match="weight"):
        torch.autograd.backward(3 * chunked_cross_entropy(hidden, head.requires_grad_(), targets))


def test_an_impossible_target_costs_a_finite_loss() -> None:
    loss = chunked_cross_entropy(torch.full((1, 1), 1e4), torch.tensor([[1.0], [-1.0]]), torch.ones(1, dtype=torch.long))
    assert 80 < loss.item() < 90


def test_bfloat16_products_give_nearly_the_same_loss_and_gradients() -> None:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden, head, targets = (tensor.float() if tensor.is_floating_point() else tensor for tensor in _case(600))
        hidden = hidden.to(dtype).requires_grad_()
        loss = chunked_cross_entropy(hidden, head.requires_grad_(), targets)
        torch.autograd.backward(loss)
        results.append((loss.detach(), hidden.grad, head.grad))
    (whole, *wholes), (half, *halves) = results
    assert abs(whole - half) < 2e-3
    for ours, reference in zip(halves, wholes, strict=True):
        assert ours is not None and reference is not None
        assert (ours.float() - reference).norm() / reference.norm() < 0.02


def test_equals_the_librarys_fused_function() -> None:
    hidden, head, targets = (tensor.float() if tensor.is_floating_point() else tensor for tensor in _case(600))
    expected = F.linear_cross_entropy(hidden, head, targets, ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(chunked_cross_entropy(hidden, head, targets), expected, atol=1e-5, rtol=1e-5)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, targets = (tensor.float() if tensor.is_floating_point() else tensor for tensor in _case(40))
    hidden.requires_grad_()
    torch.autograd.backward(chunked_cross_entropy(hidden, head, targets))
    assert head.grad is None
    assert hidden.grad is not None and hidden.grad[1].abs().sum() > 0
    assert hidden.grad[0].abs().sum() == 0, "an ignored position must not learn"


def test_all_targets_ignored_is_zero() -> None:
    loss = chunked_cross_entropy(torch.ones(4, 8), torch.ones(5, 8), torch.full((4,), IGNORE_INDEX))
    assert loss.item() == 0.0
