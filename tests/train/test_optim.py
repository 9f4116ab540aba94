from __future__ import annotations

from forge.config import PhaseConfig
from forge.train.optim import learning_rate


def test_the_rate_warms_up_stays_and_decays() -> None:
    phase = PhaseConfig(tokens=1, learning_rate=1.0, warmup_fraction=0.1, decay_fraction=0.2)
    rates = [learning_rate(phase, step, 100) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0
    assert rates[10:80] == [1.0] * 70
    assert rates[-1] == 0.05
    assert all(a >= b for a, b in zip(rates[80:], rates[81:], strict=False))
