"""What `forge plan` prints: the memory of every process part by part, and how training will run within a budget."""

from __future__ import annotations

from collections.abc import Iterator

from forge.config import RunConfig
from forge.errors import MemoryBudgetError
from forge.train.memory import STAGES, TRAINING, Plan, Stage, candidates, format_size, plan
from forge.train.speed import tokens_per_second

_HOUR = 3600


def plan_lines(config: RunConfig, ram_bytes: int, rate: float) -> Iterator[str]:
    """The lines of the plan of a run.

    Args:
        config: the run.
        ram_bytes: what a process may hold.
        rate: FLOP/s of this machine's matrix products.

    Raises:
        MemoryBudgetError: after the last line, when a process does not fit; names the `--ram` that would do.
    """
    misfit: MemoryBudgetError | None = None
    yield f"predicted peak memory of every process within {format_size(ram_bytes)}"
    for stage in STAGES:
        try:
            chosen = plan(config, stage, ram_bytes)
        except MemoryBudgetError as error:
            chosen, misfit = list(candidates(config, stage))[-1], misfit or error
        mark = " " if chosen.peak_bytes <= ram_bytes else "!"
        parts = ", ".join(f"{name} {format_size(size)}" for name, size in chosen.parts.items() if size)
        yield f"{mark} {stage:10}{format_size(chosen.peak_bytes):>7}  {parts}"
    yield ""
    yield f"training on this machine, which multiplies at {rate / 1e9:.0f} GFLOP/s (> is the plan)"
    yield f"  {'':8}{'micro-batch':>12}{'accumulated':>12}{'recomputed':>11}{'peak':>8}{'tokens/s':>10}{'hours':>8}"
    for stage in TRAINING:
        yield from _choices(config, stage, ram_bytes, rate)
    if misfit is not None:
        raise misfit


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
               f"{format_size(option.peak_bytes):>8}{speed:10,.0f}{tokens / speed / _HOUR:8.1f}")  # fmt: skip
    yield f"  {gain(config, stage, ram_bytes, rate)}"
