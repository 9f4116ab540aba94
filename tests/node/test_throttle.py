from __future__ import annotations

from node.throttle import Throttle


class Time:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.longest = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.longest = max(self.longest, seconds)


def test_chunks_travel_at_the_rate_and_somebody_hears_of_it_every_second() -> None:
    time, lives = Time(), [0]
    throttle = Throttle(1000, lambda: time.now, time.sleep)

    def alive() -> None:
        lives[0] += 1

    for _ in range(5):
        throttle.take(10_000, alive)
    assert abs(time.now - 150.0) < 0.01
    assert time.longest <= 1.0 and lives[0] >= 50


def test_a_second_is_saved_up_and_no_more() -> None:
    time = Time()
    throttle = Throttle(1000, lambda: time.now, time.sleep)
    time.now += 3600
    throttle.take(1000)
    assert time.now == 3700.0
    throttle.take(500)
    assert abs(time.now - 3700.5) < 0.01


def test_chunks_are_a_second_long_at_most() -> None:
    assert Throttle(1000).chunk(1 << 20) == 1000
    assert Throttle(10 << 20).chunk(1 << 20) == 1 << 20
    assert Throttle().chunk(1 << 20) == 1 << 20


def test_without_a_rate_nothing_waits() -> None:
    time = Time()
    Throttle(None, lambda: time.now, time.sleep).take(1 << 40)
    assert time.now == 100.0
