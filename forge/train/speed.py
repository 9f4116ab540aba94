"""How fast a plan will train: the products that a token costs, over the rate at which this machine multiplies."""

from __future__ import annotations

import math
import time

import torch

from forge.config import RunConfig
from forge.system import cpu_products
from forge.train.memory import Plan
from forge.train.muon import STEPS

#: Share of the probe's rate that a whole training step reached (configs/default.yaml, two cores with AVX512-BF16); the rest
#: is what is not a product: norms, softmax, the optimiser's passes over memory. The faster the products, the more it is.
EFFICIENCY = {torch.float32: 0.72, torch.bfloat16: 0.70}
#: Seconds a byte of gradients costs a micro-batch: the backward pass adds to what the earlier ones left. Fitted to the curve
#: of micro-batches in docs/log.md.
_GRADIENT_SECONDS = 2.5e-10
#: Sides of the probe's product, of the size that training multiplies, and seconds that it takes at most.
_ROWS, _INNER, _COLUMNS = 512, 512, 2048
_PROBE_SECONDS = 0.5


def tokens_per_second(config: RunConfig, plan: Plan, rate: float) -> float:
    """Tokens that a plan of a training stage will take a second on a machine of `rate` FLOP/s."""
    model, shared = config.model, plan.stage == "shared"
    gradients = 4 * (model.dense_parameters if shared else model.expert_parameters)
    adding = _GRADIENT_SECONDS * gradients / (plan.micro_batch * model.max_seq_len)
    return 1 / (flops_per_token(config, plan) / (EFFICIENCY[product_type()] * rate) + adding)


def product_type() -> torch.dtype:
    """The type that the rate of this machine is that of."""
    return torch.bfloat16 if cpu_products() == "bfloat16" else torch.float32


def flops_per_token(config: RunConfig, plan: Plan) -> float:
    """FLOPs a token of training: 2 a weight in the forward pass, 2 for the inputs' gradients, 2 for the weights' own."""
    model, shared = config.model, plan.stage == "shared"
    phase = config.phase(plan.stage)
    head = model.vocab_size * model.d_model
    layers = model.expert_parameters + model.attention_parameters
    learned = layers + head if shared else model.expert_parameters
    # Causal scores and their mixing: half of 2 x 2 T a channel and layer, three times for forward and backward.
    attention = 6 * model.n_layers * model.n_heads * model.head_dim * model.max_seq_len
    again = (2 * layers + attention / 3) if plan.recompute else 0
    per_step = _muon_flops(config, shared) if phase.optimizer == "muon" else 0
    return 4.0 * (layers + head) + 2 * learned + attention + again + per_step / config.step_tokens(plan.stage)


def _muon_flops(config: RunConfig, shared: bool) -> int:
    """One orthogonalisation of every hidden matrix (m, n), m <= n: an iteration is m^2 n twice and m^3 once."""
    model = config.model
    matrices = [(model.d_model, model.ffn_width)] * 3
    if shared:
        heads, kv = model.n_heads * model.head_dim, model.kv_heads * model.head_dim
        matrices += [(model.d_model, heads)] * 2 + [(model.d_model, kv)] * 2
    sides = [(min(shape), max(shape)) for shape in matrices]
    return model.n_layers * STEPS * sum(4 * m * m * n + 2 * m**3 for m, n in sides)


def multiplication_rate(dtype: torch.dtype | None = None) -> float:
    """FLOP/s of a matrix product of a training step's size on this CPU, the best of half a second.

    `dtype` is by default the faster type.
    """
    dtype = dtype or product_type()
    left = torch.ones(_ROWS, _INNER, dtype=dtype)
    right = torch.ones(_INNER, _COLUMNS, dtype=dtype)
    left @ right
    best, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < _PROBE_SECONDS:
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * _ROWS * _INNER * _COLUMNS / best
