"""The optimiser: Muon for hidden matrices and AdamW for the rest, and the learning-rate schedule."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from forge.config import PhaseConfig
from forge.train.muon import Muon

#: Betas of AdamW; 0.95 rather than 0.999 for the second moment, as is usual for language models of this kind.
ADAM_BETAS = (0.9, 0.95)


class Optimizer:
    """Muon (Jordan et al. 2024) for hidden matrices, with updates scaled to AdamW's RMS, and AdamW for the rest.

    Embedding and LM head go to AdamW although they are matrices, as Muon's author advises. With
    `phase.optimizer == "adamw"` everything goes to AdamW.

    Args:
        parameters: name -> parameter; those with `requires_grad` False are left out and cost no state.
        phase: learning rate, weight decay and the choice of optimiser.
        dtype: type of Muon's orthogonalisation.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], phase: PhaseConfig,
                 dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
        self.phase = phase
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        hidden = {n for n, p in self.parameters.items()
                  if phase.optimizer == "muon" and p.ndim == 2 and "embed" not in n and "lm_head" not in n}  # fmt: skip
        self._optimizers: list[torch.optim.Optimizer] = []
        if hidden:
            matrices = [p for n, p in self.parameters.items() if n in hidden]
            self._optimizers.append(Muon(matrices, phase.learning_rate, phase.weight_decay, dtype))
        rest = {n: p for n, p in self.parameters.items() if n not in hidden}
        groups = [{"params": [p for p in rest.values() if p.ndim >= 2], "weight_decay": phase.weight_decay},
                  {"params": [p for p in rest.values() if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
        groups = [group for group in groups if group["params"]]
        if groups:
            self._optimizers.append(torch.optim.AdamW(groups, lr=phase.learning_rate, betas=ADAM_BETAS, foreach=False))

    def step(self, learning_rate: float) -> None:
        """Update every parameter at `learning_rate` and drop the gradients."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """The state as named tensors: `optimizer.<parameter>.<slot>`."""
        names = {id(p): n for n, p in self.parameters.items()}
        return {f"optimizer.{names[id(parameter)]}.{slot}": value if isinstance(value, Tensor) else torch.tensor(value)
                for optimizer in self._optimizers for parameter, slots in optimizer.state.items()
                for slot, value in slots.items()}  # fmt: skip

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state_tensors` gave."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = next(n for n, p in self.parameters.items() if p is parameter)
                    prefix = f"optimizer.{name}."
                    optimizer.state[parameter] = {key.removeprefix(prefix): value.clone()
                                                  for key, value in tensors.items() if key.startswith(prefix)}  # fmt: skip


def learning_rate(phase: PhaseConfig, step: int, steps: int) -> float:
    """Rate of update `step` (from 0) of `steps`: linear warm-up, constant, linear decay towards zero.

    The trapezoid of Hägele et al. 2024 (arXiv 2405.18392).
    """
    warmup = max(1, round(phase.warmup_fraction * steps))
    decay = max(1, round(phase.decay_fraction * steps))
    return phase.learning_rate * min(1.0, (step + 1) / warmup, (steps - step) / decay)
