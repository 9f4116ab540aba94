"""What a node has left, counted."""

from __future__ import annotations

from coordinator.quotas import Limits, Quotas


def test_transfers_of_nothing_are_counted_like_others() -> None:
    quotas = Quotas(Limits())
    for size in (0, 10):
        with quotas.transfer("node", 0), quotas.transfer("node", size):
            assert quotas._flying == {"node": (2, size)}
        assert not quotas._flying and not quotas._transfers
