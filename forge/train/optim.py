"""The optimiser: Muon for hidden matrices and AdamW for the rest, and the learning-rate schedule."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from forge.config import PhaseConfig
from forge.train.adamw import adamw_update
from forge.train.muon import muon_update


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
        self._dtype = dtype
        self._state: dict[str, dict[str, Tensor]] = {name: {} for name in self.parameters}

    def step(self, learning_rate: float) -> None:
        """Update every parameter at `learning_rate` and zero the gradients, whose memory is used again."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            decay = self.phase.weight_decay if parameter.ndim >= 2 else 0.0
            if self._is_hidden(name):
                muon_update(parameter, parameter.grad, self._state[name], learning_rate, decay, self._dtype)
            else:
                adamw_update(parameter, parameter.grad, self._state[name], learning_rate, decay)
            parameter.grad.zero_()

    def _is_hidden(self, name: str) -> bool:
        matrix = self.parameters[name].ndim == 2
        return self.phase.optimizer == "muon" and matrix and "embed" not in name and "lm_head" not in name

    def state_tensors(self) -> dict[str, Tensor]:
        """The state as named tensors: `optimizer.<parameter>.<slot>`."""
        return {f"optimizer.{name}.{slot}": value for name, slots in self._state.items() for slot, value in slots.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state_tensors` gave; each tensor moves to its parameter's device."""
        for name, parameter in self.parameters.items():
            prefix = f"optimizer.{name}."
            self._state[name] = {key.removeprefix(prefix): value.to(parameter.device, copy=True) if value.ndim else value
                                 for key, value in tensors.items() if key.startswith(prefix)}  # fmt: skip


def learning_rate(phase: PhaseConfig, step: int, steps: int) -> float:
    """Rate of update `step` (from 0) of `steps`: linear warm-up, constant, linear decay towards zero.

    The trapezoid of Hägele et al. 2024 (arXiv 2405.18392).
    """
    warmup = max(1, round(phase.warmup_fraction * steps))
    decay = max(1, round(phase.decay_fraction * steps))
    return phase.learning_rate * min(1.0, (step + 1) / warmup, (steps - step) / decay)
