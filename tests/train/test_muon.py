from __future__ import annotations

import pytest
import torch

from forge.train.muon import muon_update, orthogonalise


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 32)])
def test_steps_equal_the_librarys_up_to_its_bfloat16(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    ours, theirs = start.clone(), torch.nn.Parameter(start.clone())
    state: dict[str, torch.Tensor] = {}
    library = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        theirs.grad = torch.randn(shape, generator=generator)
        muon_update(ours, theirs.grad.clone(), state, 0.01, 0.1, torch.bfloat16)
        library.step()  # type: ignore[no-untyped-call]
    moved = (theirs - start).norm().item()
    assert (ours - theirs).norm().item() < 0.02 * moved


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(2)), torch.float32))
    assert values.min() > 0.5 and values.max() < 1.3
