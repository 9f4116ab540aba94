"""A part of the bad lines, within half a minute: `make test-network` tries all of them."""

from __future__ import annotations

import os

import pytest

from forge.vocabulary import CHUNK_BYTES

from .network import UPLOADED, lost_replies, through_a_line

#: Chunks that may be sent twice for a cut: what the coordinator lets be on its way (`http2.lookahead_bytes`), and one. It is less
#: than one where the coordinator gets the processor at once, as `make test-network` requires.
LOOKAHEAD = 5
#: Bytes from the node at which the line is cut: every third chunk.
CUTS = [3 * CHUNK_BYTES * number for number in range(1, UPLOADED // CHUNK_BYTES // 3)]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="its processes are killed in the end")
def test_a_line_that_is_cut_again_and_again_sends_little_twice() -> None:
    outcome, faults, remark = through_a_line(cuts=list(CUTS), patience=300.0, chunks=LOOKAHEAD)
    assert outcome.wrong == [] and faults == len(CUTS), remark


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="its processes are killed in the end")
def test_no_call_needs_its_reply() -> None:
    outcome, faults, _ = lost_replies()
    assert outcome.wrong == [] and faults >= 20
