from __future__ import annotations

import json
import os
from pathlib import Path
import re
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from forge.config import RunConfig, load_config
from forge.errors import ConfigError, MemoryBudgetError
from forge.model.lm import DenseLM
from forge.planning import MATURE, best_share, gain, plan_lines
from forge.train.loop import LoopSettings, train
from forge.train.memory import (
    LIGHT_MB,
    MB,
    STAGES,
    Plan,
    Stage,
    candidates,
    format_size,
    hungriest,
    parse_size,
    plan,
    predict,
    process_bytes,
)
from forge.train.shared import maturity


@pytest.mark.parametrize(("text", "size"), [("8G", 8 << 30), ("512M", 512 << 20), ("1.5GiB", 3 << 29), ("1024", 1024),
                                            ("64 MB", 64 << 20)])  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1G", "0", "8X"])
def test_wrong_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


@given(ram=st.integers(1, 64 << 10).map(lambda megabytes: megabytes * MB), stage=st.sampled_from(STAGES))
def test_a_plan_fits_or_the_refusal_names_a_budget_that_does(ram: int, stage: Stage) -> None:
    config = load_config("default")
    try:
        chosen = plan(config, stage, ram)
        assert chosen.peak_bytes <= ram
        assert config.train.batch_size % chosen.micro_batch == 0
    except MemoryBudgetError as error:
        named = str(error).split("use --ram ")[1].split(" or more")[0]
        assert parse_size(named) > ram
        assert isinstance(plan(config, stage, parse_size(named)), Plan)


def test_the_hungriest_stage_decides() -> None:
    config = load_config("default")
    needed = min(option.peak_bytes for option in candidates(config, hungriest(config, STAGES)))
    assert all(plan(config, stage, needed).peak_bytes <= needed for stage in STAGES)


def test_an_expert_costs_less_than_the_shared_components() -> None:
    config = load_config("default")
    assert predict(config, "expert", 1).peak_bytes < predict(config, "shared", 1).peak_bytes


def test_every_stage_of_the_billion_fits_eight_gigabytes() -> None:
    config = load_config("billion")
    for stage in STAGES:
        assert predict(config, stage).peak_bytes < 8 << 30


def test_a_thousand_partitions_are_routed_within_eight_gigabytes() -> None:
    assert predict(load_config("default", ["model.n_experts=1000"]), "router").peak_bytes < 8 << 30


@pytest.mark.parametrize("stage", ["shared", "expert"])
def test_less_memory_means_smaller_micro_batches_then_recomputation(stage: Stage) -> None:
    options = list(candidates(load_config("default"), stage))
    assert [(option.micro_batch, option.recompute) for option in options] == [(2, False), (1, False), (1, True)]
    peaks = [option.peak_bytes for option in options]
    assert peaks == sorted(peaks, reverse=True)


def test_a_bigger_model_costs_more_in_every_process() -> None:
    small, large = load_config("default"), load_config("default", ["model.d_model=1024", "model.d_ff=4096"])
    for stage in set(STAGES) - {"prepare", "assemble"}:  # These hold text or chunks of files, and no tensors.
        assert predict(large, stage).peak_bytes > predict(small, stage).peak_bytes, stage


def test_pytorch_built_for_cuda_is_known_by_its_library_and_holds_more(tmp_path: Path) -> None:
    """Found without an import of it, which would take a second: here is a package that has the file and nothing else."""
    libraries = tmp_path / "torch" / "lib"
    libraries.mkdir(parents=True)
    (libraries.parent / "__init__.py").write_text("raise ImportError")
    ask = ("from forge.config import load_config; from forge.train.memory import MB, predict; "
           "print(*(predict(load_config('smoke'), stage).peak_bytes // MB for stage in ('prepare', 'expert')))")  # fmt: skip

    def peaks() -> list[int]:
        told = subprocess.run([sys.executable, "-c", ask], env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True,
                              capture_output=True, text=True)  # fmt: skip
        return [int(peak) for peak in told.stdout.split()]

    for_cpus = peaks()
    (libraries / "libtorch_cuda.so").touch()
    assert [more - less for more, less in zip(peaks(), for_cpus, strict=True)] == [0, 392]


def test_every_process_of_a_run_has_a_prediction() -> None:
    config = load_config("smoke")
    for process in (*STAGES, *LIGHT_MB):
        assert process_bytes(config, process) > 20 * MB


class RandomSampler:
    """Sequences that are a pure function of the step, as the real sampler's are."""

    def __init__(self, config: RunConfig) -> None:
        self._model = config.model

    def batch(self, step: int, batch_size: int) -> np.ndarray:
        # A quarter of the vocabulary, so that there is something to learn.
        shape = (batch_size, self._model.max_seq_len + 1)
        return np.random.default_rng(step).integers(0, self._model.vocab_size // 4, size=shape)


@pytest.mark.parametrize("stage", ["shared", "expert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_budget_does_not_change_the_loss_curve(tmp_path: Path, stage: Stage, dtype: torch.dtype) -> None:
    config = load_config("smoke", ["model.d_model=64", "model.d_ff=128", "model.n_layers=2", "model.vocab_size=512",
                                   "model.max_seq_len=96", "train.batch_size=4"])  # fmt: skip
    smallest = min(option.peak_bytes for option in candidates(config, stage))
    curves = []
    for ram in (smallest, 16 << 30):
        chosen = plan(config, stage, ram)
        model = DenseLM(config.model)
        model.initialise(torch.Generator().manual_seed(0))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(stage == "shared" or ".mlp." in name)
        model.recompute = chosen.recompute
        model.compute_in(dtype)
        phase = config.train.shared.model_copy(update={"tokens": 50 * 4 * 96})
        directory = tmp_path / str(ram)
        train(model, RandomSampler(config), LoopSettings(  # type: ignore[arg-type]
            phase=phase, batch_size=4, sequence_length=96, micro_batch=chosen.micro_batch, directory=directory,
            checkpoint_seconds=1e9, stage=stage, dtype=dtype),
            lambda **_: None, lambda: False)  # fmt: skip
        curves.append([json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()])
        settings = (chosen.micro_batch, chosen.recompute)
        assert settings == ((1, True) if ram == smallest else (2, False))
    assert len(curves[0]) == 50 and curves[0][-1] < curves[0][0] - 0.05
    np.testing.assert_allclose(curves[0], curves[1], rtol=0, atol=2e-6)


def test_the_printed_plan_marks_the_chosen_plan_and_what_does_not_fit() -> None:
    config = load_config("default")
    shared = list(candidates(config, "shared"))
    lines = list(plan_lines(config, shared[1].peak_bytes, rate=1e11))
    assert [line.split()[:3] for line in lines if line.startswith(">")] == [[">", "shared", "1"], [">", "expert", "2"]]
    assert all(any(line[2:].startswith(stage) for line in lines) for stage in STAGES)
    printed, config = [], load_config("billion")
    too_little = list(candidates(config, "shared"))[-1].peak_bytes - 1
    with pytest.raises(MemoryBudgetError, match="Training the shared components .* use --ram"):
        for line in plan_lines(config, too_little, rate=1e11):
            printed.append(line)
    assert [line.split()[1] for line in printed if line.startswith("!")] == ["shared"]


def test_the_plan_says_how_the_time_is_split_and_what_would_be_better() -> None:
    def advice(*overrides: str, nodes: int | None = None) -> list[str]:
        return list(plan_lines(load_config("default", overrides), 16 << 30, 1e11, nodes))[-3:]

    assert "with 5 nodes" in "".join(advice()) and "the best model" not in "".join(advice()), "the default's split is a good one"
    # As many tokens for each expert as for the shared components: far too many, and three turns of them with two nodes.
    said, better, _ = advice("train.shared.tokens=20_000_000", nodes=2)
    assert said.startswith("with 2 nodes") and "the best model for the same time comes from about 80%" in better
    changed = re.findall(r"train\.\w+\.tokens=\d+", better)
    assert len(changed) == 2
    again = advice(*changed, nodes=2)
    assert not any("the best model" in line for line in again), "the advice holds to itself"
    taken = [sum(60 * int(hours) + int(minutes) for hours, minutes in re.findall(r"(\d+) h (\d+) min", line)) for line in (
        said, next(line for line in again if line.startswith("with 2")))]  # fmt: skip
    assert taken[1] == pytest.approx(taken[0], rel=0.1), "for the same time"
    assert [best_share(steps) for steps in (100, 200, 400, 1600, 100_000)] == pytest.approx([0.95, 0.95, 0.9, 0.8, 0.8])
    old, young = "train.shared.tokens=200_000_000", "train.shared.tokens=20_000_000"
    assert maturity(load_config("default", [young])) < MATURE < maturity(load_config("default", [old]))
    assert "hold every expert back" in advice(young)[-1] and "hold every expert back" not in "".join(advice(old))


def test_the_gain_of_more_memory_is_a_sentence() -> None:
    config = load_config("default")
    options = list(candidates(config, "shared"))
    assert gain(config, "shared", options[0].peak_bytes, 1e11) == "shared: more memory gains nothing."
    assert "would be" in gain(config, "shared", options[-1].peak_bytes, 1e11)
    assert "nothing fits" in gain(config, "shared", 64 * MB, 1e11)


def test_format() -> None:
    assert format_size(380 * MB) == "380M"
    assert format_size(7.5 * 1024 * MB) == "7.5G"


def test_the_plan_command_prints_every_process_and_ends_with_the_codes_of_the_errors() -> None:
    command = [sys.executable, "-m", "forge.cli", "plan", "smoke", "--ram"]
    fits = subprocess.run([*command, "8G"], capture_output=True, text=True, check=True)
    assert all(f"\n  {stage} " in fits.stdout for stage in STAGES)
    assert "GFLOP/s" in fits.stdout and "gains nothing" in fits.stdout
    small = subprocess.run([*command, "64M"], capture_output=True, text=True, check=False)
    assert small.returncode == MemoryBudgetError.exit_code
    assert "--ram allows 64M: use --ram" in small.stderr and len(small.stderr.splitlines()) == 1
