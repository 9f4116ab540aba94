from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from forge.config import PhaseConfig
from forge.train.adamw import BETAS, adamw_update
from forge.train.optim import learning_rate


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_the_librarys_to_the_bit(weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(37, 129, generator=generator)
    ours, theirs = start.clone(), torch.nn.Parameter(start.clone())
    library = torch.optim.AdamW([theirs], lr=0.01, betas=BETAS, weight_decay=weight_decay, foreach=False)
    state: dict[str, torch.Tensor] = {}
    for step in range(20):
        theirs.grad = torch.randn(start.shape, generator=generator)
        rate = library.param_groups[0]["lr"] = 0.01 / (step + 1)
        adamw_update(ours, theirs.grad.clone(), state, rate, weight_decay)
        library.step()
        assert torch.equal(ours, theirs)


#: A step of both phases' optimisers, and of a model that recomputes its layers, as a training process takes it.
TRAINING_STEP = """
import sys
import torch
from forge.config import ModelConfig, PhaseConfig
from forge.model.lm import DenseLM
import forge.train.expert, forge.train.shared
from forge.train.loss import chunked_cross_entropy
from forge.train.optim import Optimizer
model = DenseLM(ModelConfig(vocab_size=300, d_model=32, d_ff=64, n_layers=2, n_heads=2, n_experts=2, max_seq_len=16))
model.initialise(torch.Generator().manual_seed(0))
optimizer = Optimizer(dict(model.named_parameters()), PhaseConfig(tokens=1))
tokens = torch.arange(16)[None]
for model.recompute in (False, True):
    torch.autograd.backward(chunked_cross_entropy(model(tokens).flatten(0, 1), model.head_weight, tokens.flatten()))
    torch.nn.utils.clip_grad_norm_(optimizer.parameters.values(), 1.0, foreach=False)
    optimizer.step(0.01)
print(*sys.modules)
"""


def test_a_training_process_imports_nothing_large_that_it_does_not_need() -> None:
    done = subprocess.run([sys.executable, "-c", TRAINING_STEP], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    unneeded = {"torch._dynamo", "sympy", "sklearn", "scipy", "matplotlib", "huggingface_hub", "pyarrow", "pandas",
                "tokenizers", "transformers"}  # fmt: skip
    assert not loaded & unneeded


def test_the_rate_warms_up_stays_and_decays() -> None:
    phase = PhaseConfig(tokens=1, learning_rate=1.0, warmup_fraction=0.1, decay_fraction=0.2)
    rates = [learning_rate(phase, step, 100) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0
    assert rates[10:80] == [1.0] * 70
    assert rates[-1] == 0.05
    assert all(a >= b for a, b in zip(rates[80:], rates[81:], strict=False))
