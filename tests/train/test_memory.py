from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
import pytest

from forge.config import load_config
from forge.errors import ConfigError, MemoryBudgetError
from forge.train.memory import MB, Plan, format_size, parse_size, plan, predict


@pytest.mark.parametrize(("text", "size"), [("8G", 8 << 30), ("512M", 512 << 20), ("1.5GiB", 3 << 29), ("1024", 1024),
                                            ("64 MB", 64 << 20)])  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1G", "0", "8X"])
def test_wrong_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


@given(ram=st.integers(1, 64 << 10).map(lambda megabytes: megabytes * MB), stage=st.sampled_from(["shared", "expert"]))
def test_a_plan_fits_or_the_refusal_names_a_budget_that_does(ram: int, stage: str) -> None:
    config = load_config("default")
    try:
        chosen = plan(config, stage, ram)  # type: ignore[arg-type]
        assert chosen.peak_bytes <= ram
        assert config.train.batch_size % chosen.micro_batch == 0
    except MemoryBudgetError as error:
        named = str(error).split("use --ram ")[1].split(" or more")[0]
        assert parse_size(named) > ram
        assert isinstance(plan(config, stage, parse_size(named)), Plan)  # type: ignore[arg-type]


def test_an_expert_costs_less_than_the_shared_components() -> None:
    config = load_config("default")
    assert predict(config, "expert", 1).peak_bytes < predict(config, "shared", 1).peak_bytes


def test_every_stage_of_the_billion_fits_eight_gigabytes() -> None:
    config = load_config("billion")
    for stage in ("shared", "expert", "evaluate"):
        assert predict(config, stage, 1).peak_bytes < 8 << 30


def test_format() -> None:
    assert format_size(380 * MB) == "380M"
    assert format_size(7.5 * 1024 * MB) == "7.5G"
