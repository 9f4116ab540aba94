from __future__ import annotations

import json

from click.testing import CliRunner
import pytest

from coordinator.cli import main
from coordinator.simulation import SLOWER, Scenario, Simulation


@pytest.mark.parametrize("churn", [0.0, 0.6])
def test_every_expert_is_accepted_once_and_nothing_is_made_of_nothing(churn: float) -> None:
    scenario = Scenario(nodes=8, experts=12, churn=churn, seed=3)
    seen = Simulation(scenario).run()
    assert seen["accepted"] == 12
    assert seen["hours"] >= seen["ideal_hours"]
    assert 0 <= seen["wasted_node_hours"] < seen["trained_node_hours"]
    if churn:
        assert seen["expired"] and seen["handed_over"] and seen["crash"] and seen["sleep"] and seen["leave"]
    else:
        assert not any(seen[what] for what in ("expired", "late", "handed_over", "crash", "sleep", "offline", "leave"))
    assert Simulation(scenario).run() == seen  # The same seed is the same run.


def test_a_straggler_that_nobody_backs_up_would_hold_everybody_up() -> None:
    seen = Simulation(Scenario(nodes=12, experts=12, churn=0.0, seed=1, stragglers=0.25, rejections=0.0)).run()
    assert seen["backups"] >= 1 and seen["hours"] < 4.0 * SLOWER / 2


def test_the_command() -> None:
    typed = CliRunner().invoke(main, ["simulate", "--nodes", "4", "--experts", "3", "--churn", "0.3", "--seeds", "2", "--json"])
    assert typed.exit_code == 0, typed.output
    (row,) = json.loads(typed.output)
    assert (row["churn"], row["accepted"]) == (0.3, 3)
    table = CliRunner().invoke(main, ["simulate", "--nodes", "4", "--experts", "3", "--churn", "0", "--seeds", "1"]).output
    assert table.count("\n") == 3 and "handed over" in table
