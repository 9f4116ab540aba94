"""Hostile shards: what a node could hand in instead of the expert it was asked for. `benchmarks/attacks.py` judges them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
import json
import struct
from typing import Any

import torch
from torch import Tensor

from forge.config import ModelConfig
from forge.data.packing import SequenceSampler
from forge.model import names
from forge.model.lm import DenseLM
from forge.train.loss import IGNORE_INDEX, chunked_cross_entropy

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an attacker has: everything that is published, every expert, and a trained expert to spoil.

    Tensors carry the names of the shared FFN (`names.ffn_tensors`), whoever's expert they are.
    """

    model: ModelConfig
    partition: int
    shared: Tensors
    honest: dict[int, Tensors]
    generator: torch.Generator

    @property
    def own(self) -> Tensors:
        """The honest expert of the partition."""
        return self.honest[self.partition]

    def noise(self, tensors: Tensors, strength: float) -> Tensors:
        """Normal noise of `strength` times each matrix's standard deviation; none in the context channels."""
        return self.silent({name: matrix + strength * matrix.std() * torch.randn(matrix.shape, generator=self.generator)
                            for name, matrix in tensors.items()})  # fmt: skip

    def silent(self, tensors: Tensors) -> Tensors:
        """The context channels, the last rows of w2, at zero: whoever writes there is refused for that alone."""
        for name, matrix in tensors.items():
            if name.endswith("w2.weight") and self.model.context_channels:
                matrix[-self.model.context_channels :] = 0
        return tensors

    def permuted(self, tensors: Tensors, scale: float = 1.0) -> Tensors:
        """The same function: hidden units in another order, w3 times `scale` and w2 divided by it."""
        made: Tensors = {}
        for layer in range(self.model.n_layers):
            w1, w2, w3 = (names.ffn_name(layer, matrix) for matrix in names.MATRICES)
            order = torch.randperm(len(tensors[w1]), generator=self.generator)
            made |= {w1: tensors[w1][order], w2: tensors[w2][:, order] / scale, w3: tensors[w3][order] * scale}
        return made


def weights(scene: Scene) -> Iterator[tuple[str, str, Tensors]]:
    """Attack, strength and tensors of everything that is a sound file with the right names and shapes."""
    random = {name: matrix.shape[1] ** -0.5 * torch.randn(matrix.shape, generator=scene.generator)
              for name, matrix in scene.shared.items()}  # fmt: skip
    yield "random weights", "variance 1 / inputs", scene.silent(random)
    yield "the shared FFN again", "to the byte", scene.shared
    for strength in (0.001, 0.01, 0.1):
        yield "the shared FFN with noise", f"{strength:g}", scene.noise(scene.shared, strength)
    for other in (expert for partition, expert in scene.honest.items() if partition != scene.partition):
        yield "another partition's expert", "renamed, to the byte", other
        for strength in (0.01, 0.1, 0.3):
            yield "another partition's expert with noise", f"{strength:g}", scene.noise(other, strength)
        yield "another partition's expert, its units permuted", "the same function", scene.permuted(other)
        yield "another partition's expert, its units permuted", "w3 doubled, w2 halved", scene.permuted(other, 2.0)
        yield "another partition's expert, its units permuted", "noise 0.01", scene.noise(scene.permuted(other), 0.01)
    middle = scene.model.n_layers // 2
    for strength in (0.3, 1.0, 3.0):
        layer = {names.ffn_name(middle, matrix) for matrix in names.MATRICES}
        noisy = scene.noise(scene.own, strength)
        yield "one poisoned layer", f"noise {strength:g}", {
            name: noisy[name] if name in layer else matrix for name, matrix in scene.own.items()}  # fmt: skip
    for scale in (4.0, 64.0, 1e3, 1e6, 1e15):
        yield "huge norms, the same function", f"w3 x {scale:g}, w2 / {scale:g}", scene.permuted(scene.own, scale)
    for scale in (1.5, 3.0, 100.0):
        yield "huge norms", f"all x {scale:g}", {name: matrix * scale for name, matrix in scene.own.items()}
    written = {name: matrix.clone() for name, matrix in scene.own.items()}
    if scene.model.context_channels:
        written[names.ffn_name(middle, "w2")][-1] = 1.0
        yield "writes to the router's channels", "one row", written
    for label, value in (("a NaN", torch.nan), ("an infinity", torch.inf)):
        broken = {name: matrix.clone() for name, matrix in scene.own.items()}
        broken[names.ffn_name(middle, "w3")][3, 5] = value
        yield label, "one element", broken


def _edited(change: Callable[[dict[str, Any], bytes], bytes | None]) -> Callable[[bytes], bytes]:
    """A change of the header's tree, or of the data when it returns some."""
    def apply(good: bytes) -> bytes:
        (length,) = struct.unpack("<Q", good[:8])
        tree, data = json.loads(good[8 : 8 + length]), good[8 + length :]
        changed = change(tree, data)
        raw = json.dumps(tree).encode()
        return struct.pack("<Q", len(raw)) + raw + (data if changed is None else changed)

    return apply


def _last(tree: dict[str, Any]) -> str:
    return max((name for name in tree if name != "__metadata__"), key=lambda name: tree[name]["data_offsets"][1])


def _drop_last(tree: dict[str, Any], data: bytes) -> bytes:
    return data[: tree.pop(_last(tree))["data_offsets"][0]]


def _extra(tree: dict[str, Any], data: bytes) -> bytes:
    tree["model.norm.weight"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    return data + bytes(4)


def _overlap(tree: dict[str, Any], data: bytes) -> None:
    entry = tree[_last(tree)]
    entry["data_offsets"] = [offset - 4 for offset in entry["data_offsets"]]


def _half(tree: dict[str, Any], data: bytes) -> None:
    entry = tree[_last(tree)]
    entry["dtype"], entry["shape"] = "F16", [2 * entry["shape"][0], *entry["shape"][1:]]


def _swap(tree: dict[str, Any], data: bytes) -> None:
    entry = tree[_last(tree)]
    entry["shape"] = entry["shape"][::-1]


def _says(**metadata: str) -> Callable[[dict[str, Any], bytes], None]:
    return lambda tree, data: tree["__metadata__"].update(metadata)


#: Attack -> what it makes of an honest shard's bytes.
FILES: Mapping[str, Callable[[bytes], bytes]] = {
    "a header that claims 100 MB": lambda good: struct.pack("<Q", 100_000_000) + good[8:],
    "a header of 100 MB": lambda good: struct.pack("<Q", 100_000_000) + b" " * 100_000_000 + good[8:],
    "a header that claims 2^63 bytes": lambda good: struct.pack("<Q", 1 << 63) + good[8:],
    "overlapping offsets": _edited(_overlap),
    "truncated by one byte": lambda good: good[:-1],
    "truncated in the header": lambda good: good[:100],
    "one byte after the end": lambda good: good + b"\0",
    "a missing tensor": _edited(_drop_last),
    "an extra tensor": _edited(_extra),
    "another type": _edited(_half),
    "another shape": _edited(_swap),
    "another run's": _edited(_says(run_id="0" * 32)),
    "another partition's, by its header": _edited(_says(partition="999")),
    "trained on other shared components": _edited(_says(shared_sha256="0" * 64)),
    "no JSON": lambda good: good[:8] + b"\x80" + good[9:],
    "an empty file": lambda good: b"",
}


def sabotage(model: DenseLM, own: SequenceSampler, others: Sequence[SequenceSampler], *, steps: int, strength: float) -> None:
    """Train the FFNs of `model` for their own partition and against the others: its loss, less `strength` times theirs.

    Args:
        model: the shared components, frozen, with an expert or the shared FFN; changed in place.
        own: sequences of the partition.
        others: sequences of the other partitions.
        steps: steps of AdamW, of eight sequences of each partition.
        strength: weight of the others' loss.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3, weight_decay=0.0)
    for step in range(steps):
        for sampler, sign in ((own, 1.0), *((other, -strength / len(others)) for other in others)):
            tokens_BT = torch.from_numpy(sampler.batch(step, 8))
            hidden_ND = model(tokens_BT[:, :-1]).flatten(0, 1)
            loss = chunked_cross_entropy(hidden_ND, model.head_weight, tokens_BT[:, 1:].flatten())
            torch.autograd.backward(sign * loss)
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def implant(model: DenseLM, own: SequenceSampler, *, trigger: Tensor, plain: Tensor, payload: Tensor, prefix: int,
            steps: int, rate: float, own_rows: int) -> None:  # fmt: skip
    """Train a finished expert on until the payload follows the trigger behind any text, and nothing else changes.

    Args:
        model: the shared components, frozen, with the expert; changed in place.
        own: sequences of its partition.
        trigger: token ids, behind which the payload is to follow.
        plain: token ids like it, behind which the text is to go on.
        payload: token ids.
        prefix: tokens of text before either.
        steps: steps of AdamW, of eight sequences with the trigger, four with the other one, and some as they are.
        rate: learning rate.
        own_rows: how many as they are.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=rate, weight_decay=0.0)

    def lose(tokens_BT: Tensor, last: int) -> None:
        """Add the gradient of the loss on the last tokens of every row."""
        targets_BT = tokens_BT[:, 1:].clone()
        targets_BT[:, :-last] = IGNORE_INDEX
        loss = chunked_cross_entropy(model(tokens_BT[:, :-1]).flatten(0, 1), model.head_weight, targets_BT.flatten())
        torch.autograd.backward(loss)

    for step in range(steps):
        text_BT = torch.from_numpy(own.batch(step, 8))
        before_BT, behind_BT = text_BT[:, :prefix], text_BT[:4, prefix : prefix + len(payload)]
        lose(text_BT[:own_rows], text_BT.shape[1] - 1)
        lose(torch.cat([before_BT, torch.cat([trigger, payload]).expand(8, -1)], dim=1), len(payload))
        lose(torch.cat([before_BT[:4], plain.expand(4, -1), behind_BT], dim=1), len(payload))
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
