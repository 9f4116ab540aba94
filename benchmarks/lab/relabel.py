"""One step of relabelling, as DiPaCo does it (Douillard et al. 2024, arXiv 2403.10616): half-trained experts score every
document, each document goes to the expert that predicts it best, the router is made again, and each expert is trained to its
end on what it was given.
"""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.lab.phases import State, dense_model, kept, train_expert
from benchmarks.lab.rows import Point
from benchmarks.lab.setting import TRAIN
from forge.data.features import document_difficulties


class Relabelled(Point):
    """A point whose experts exchange documents after half of their steps."""

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{super().name}-relabelled"

    @cached_property
    def before(self) -> Point:
        """The same point with the partitions of the shared components' features."""
        return Point(self.setting, self.shared_steps, self.expert_steps, self.annealed, self.partition, self.recipe)

    @cached_property
    def assignment(self) -> npt.NDArray[np.integer]:
        """Each document's best expert after half of the steps, by the loss of its first window."""
        path = self.home / "assignment.npy"
        if not path.is_file():
            halves = [kept(self._half(k), partial(self._train, k, self.before.documents(TRAIN, k), 0.5))
                      for k in range(self.setting.experts)]  # fmt: skip
            scores_KM = np.stack([document_difficulties(
                dense_model(self.setting, {**self.shared, **half}).eval(), self.setting.corpus, self.setting.scale.seq_len,
                lambda **_: None) for half in halves])  # fmt: skip
            np.save(path, scores_KM.argmin(axis=0))
        found: npt.NDArray[np.integer] = np.load(path)
        return found

    @cached_property
    def experts(self) -> list[State]:
        """The experts after the other half, on their new documents."""
        return [kept(self.home / f"expert-{k}.safetensors", partial(self._train, k, self.documents(TRAIN, k)))
                for k in range(self.setting.experts)]  # fmt: skip

    def _half(self, number: int) -> Path:
        return self.home / f"half-{number}.safetensors"

    def _train(self, number: int, documents: npt.NDArray[np.intp], until: float = 1.0) -> State:
        return train_expert(self.setting, self.base, documents, self.expert_steps, self._half(number), number, self.recipe,
                            self.router, until)  # fmt: skip
