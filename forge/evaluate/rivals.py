"""What the assembled model is compared with, everything on the same windows of held-out documents.

- **shared components alone**: the dense model that every expert started from.
- **expert k alone**: one expert takes every token of every partition.
- **uniform gate**: every token goes to all experts, with equal weights.
- **ours**: the router.
- **oracle**: every document is under its own partition's expert, which nobody could know of a new text.

An expert that has not arrived is the shared FFN in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from forge.data.tokenizer import token_bytes
from forge.evaluate.heldout import HeldOut
from forge.evaluate.perplexity import Loss, figures, measure
from forge.model.moe import GateMode, MixtureLM
from forge.vocabulary import ALONE, ORACLE, OURS, SHARED, UNIFORM


def compare(
    model: MixtureLM, tokenizer: Tokenizer, held_out: HeldOut, ours: Sequence[Loss], shared: Sequence[Loss] | None,
    arrived: Sequence[int], *, every: bool,
) -> dict[str, Any]:  # fmt: skip
    """Measure the rivals on the compared windows.

    After each shard that is the uniform gate and the oracle; every expert on every partition would cost another evaluation
    and says little before the last shard has come. With `configs/smoke.yaml` the evaluation takes 2.0 s of CPU time, these
    two rivals 1.2 s more, and all of them 2.2 s.

    Args:
        model: the assembled model.
        tokenizer: that the documents were encoded with.
        held_out: the windows.
        ours: losses of the assembled model on each partition's compared windows.
        shared: those of the shared components alone, if known.
        arrived: the experts that are not the shared FFN.
        every: whether to measure every expert alone too.

    Returns:
        `compared_tokens`; `rivals`, name -> `perplexity.figures`; and `matrix`:
        nats a token of every expert (row) on every partition (column), null where a partition has no tokens, or null as a
        whole without `every`.
    """
    sizes_V = np.asarray(token_bytes(tokenizer))

    def losses(partition: int, gate: GateMode = "router", only_expert: int | None = None) -> Loss:
        return measure(model, held_out.compared(partition), sizes_V, gate=gate, only_expert=only_expert)

    partitions = range(held_out.partitions)
    uniform = [losses(partition, gate="uniform") for partition in partitions]
    experts: list[list[Loss]] = []
    if every:
        placeholder: list[Loss] | None = None
        for expert in range(model.config.n_experts):
            row = placeholder if expert not in arrived else None
            row = row or [losses(partition, only_expert=expert) for partition in partitions]
            placeholder = row if expert not in arrived else placeholder
            experts.append(row)
        oracle = [experts[partition][partition] for partition in partitions]
    else:
        oracle = [losses(partition, only_expert=partition) for partition in partitions]
    rows = {} if shared is None else {SHARED: shared}
    rows |= {ALONE.format(expert): experts[expert] for expert in arrived} if every else {}
    rows |= {UNIFORM: uniform, OURS: ours, ORACLE: oracle}
    return {
        "compared_tokens": sum(loss.tokens for loss in ours),
        "rivals": {name: figures(row) for name, row in rows.items()},
        "matrix": [figures(row)["losses"] for row in experts] if every else None,
    }
