"""What `forge plan` prints: the memory of every process part by part, and how training will run within a budget."""

from __future__ import annotations

from collections.abc import Iterator
import math

from forge.config import RunConfig
from forge.live import duration
from forge.train.memory import STAGES, TRAINING, Plan, Stage, candidates, format_size, hungriest, plan
from forge.train.shared import maturity
from forge.train.speed import tokens_per_second

#: The least training tokens for each parameter of the shared components from which experts pay (`benchmarks/results/quality.md`).
MATURE = 10
#: What a share may differ from the best one and cost hardly more.
_TOLERANCE = 0.12


def best_share(steps: float) -> float:
    """The share of a run's time for which the shared components are best trained; `steps` are those that one machine takes in it.

    Fitted to the table `split` of `benchmarks/results/quality.md`, one machine for that share and five for the rest: 95 % of 200
    steps, 5 % less each time that they double, 80 % of 1,700, which is as far as was measured.
    """
    return min(0.95, max(0.80, 0.95 - 0.05 * math.log2(steps / 200)))


def plan_lines(config: RunConfig, ram_bytes: int, rate: float, nodes: int | None = None) -> Iterator[str]:
    """The lines of the plan of a run.

    Args:
        config: the run.
        ram_bytes: what a process may hold.
        rate: FLOP/s of this machine's matrix products.
        nodes: machines like this one that train experts; by default one for each.

    Raises:
        MemoryBudgetError: after the last line, when a process does not fit; names the `--ram` that would do.
    """
    yield f"predicted peak memory of every process within {format_size(ram_bytes)}"
    for stage in STAGES:
        options = list(candidates(config, stage))
        chosen = next((option for option in options if option.peak_bytes <= ram_bytes), options[-1])
        mark = " " if chosen.peak_bytes <= ram_bytes else "!"
        parts = ", ".join(f"{name} {format_size(size)}" for name, size in chosen.parts.items() if size)
        yield f"{mark} {stage:10}{format_size(chosen.peak_bytes):>7}  {parts}"
    yield ""
    yield f"training on this machine, which multiplies at {rate / 1e9:.0f} GFLOP/s (> is the plan)"
    yield f"  {'':8}{'micro-batch':>12}{'accumulated':>12}{'recomputed':>11}{'peak':>8}{'tokens/s':>10}{'takes':>17}"
    for stage in TRAINING:
        yield from _choices(config, stage, ram_bytes, rate)
    plan(config, hungriest(config, STAGES), ram_bytes)
    yield ""
    yield from _split(config, ram_bytes, rate, nodes or config.model.n_experts)


def _split(config: RunConfig, ram_bytes: int, rate: float, nodes: int) -> Iterator[str]:
    """How the time of a run is split between the phases, and whether another split would give a better model."""
    train = config.train
    speed = {stage: tokens_per_second(config, plan(config, stage, ram_bytes), rate) for stage in TRAINING}
    turns = math.ceil(config.model.n_experts / nodes)
    shared, experts = train.shared.tokens / speed["shared"], turns * train.expert.tokens / speed["expert"]
    total = shared + experts
    share, age = shared / total, maturity(config)
    best = best_share(total * speed["shared"] / (config.batch_size("shared") * config.model.max_seq_len))
    yield (f"with {nodes} nodes like this machine: {duration(shared)} for the shared components and {duration(experts)} for the "
           "experts")  # fmt: skip
    if abs(share - best) > _TOLERANCE or share > (1 + best) / 2:
        tokens = {"shared": best * total * speed["shared"], "expert": (1 - best) * total / turns * speed["expert"]}
        changes = " ".join(f"train.{stage}.tokens={float(f'{number:.2g}'):.0f}" for stage, number in tokens.items())
        yield (f"  the shared components get {share:.0%} of the time; the best model for the same time comes from about "
               f"{best:.0%}: {changes}")  # fmt: skip
    if age < MATURE:
        yield (f"  the shared components see {age:.1f} training tokens for each of their parameters outside the embedding; below "
               f"{MATURE} they hold every expert back: train them for longer, or make the model smaller")  # fmt: skip


def gain(config: RunConfig, stage: Stage, ram_bytes: int, rate: float) -> str:
    """What more memory would change in the speed of a training stage, as one sentence."""
    options = list(candidates(config, stage))
    fitting = [option for option in options if option.peak_bytes <= ram_bytes]
    if not fitting:
        return f"{stage}: nothing fits; the smallest plan holds {format_size(options[-1].peak_bytes)}."
    now = tokens_per_second(config, fitting[0], rate)
    faster = [option for option in options if tokens_per_second(config, option, rate) > now * 1.01]
    if not faster:
        return f"{stage}: more memory gains nothing."
    least = min(faster, key=lambda option: option.peak_bytes)
    share = tokens_per_second(config, least, rate) / now - 1
    return f"{stage}: {format_size(least.peak_bytes)} would be {share:.0%} faster."


def _choices(config: RunConfig, stage: Stage, ram_bytes: int, rate: float) -> Iterator[str]:
    options: list[Plan] = list(candidates(config, stage))
    chosen = next((option for option in options if option.peak_bytes <= ram_bytes), None)
    tokens = config.phase(stage).tokens
    for option in options:
        speed = tokens_per_second(config, option, rate)
        yield (f"{'>' if option is chosen else ' '} {stage:8}{option.micro_batch:12}"
               f"{config.batch_size(stage) // option.micro_batch:12}{'yes' if option.recompute else 'no':>11}"
               f"{format_size(option.peak_bytes):>8}{speed:10,.0f}{duration(tokens / speed):>17}")  # fmt: skip
    yield f"  {gain(config, stage, ram_bytes, rate)}"
