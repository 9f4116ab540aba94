from __future__ import annotations

import pytest
import torch

from forge.config import ModelConfig
from forge.model.lm import DenseLM

MODEL = ModelConfig(vocab_size=300, d_model=32, d_ff=64, n_layers=3, n_heads=2, n_experts=2, max_seq_len=16)
TOKENS = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_get_the_same_gradients_when_everything_before_them_is_frozen(dtype: torch.dtype) -> None:
    gradients = []
    for recompute in (False, True):
        model = DenseLM(MODEL)
        model.initialise(torch.Generator().manual_seed(0))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".mlp." in name)
        model.recompute = recompute
        for _ in range(2):  # The second pass adds to the gradients of the first.
            model.compute_in(dtype)
            model(TOKENS).float().square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    plain, saving = gradients
    assert all((gradient is not None) == (".mlp." in name) for name, gradient in saving.items())
    for name, gradient in saving.items():
        assert gradient is plain[name] or torch.equal(gradient, plain[name]), name  # type: ignore[arg-type]
