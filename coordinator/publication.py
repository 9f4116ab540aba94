"""What the run publishes, read from the disk once: every lease and every download asks for it."""

from __future__ import annotations

import json
from typing import Any

from forge.files import RunDirectory
from forge.vocabulary import STAGES


class Publication:
    """The facts of the publish stage, which never change once they are there.

    Args:
        run: the run directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._facts: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        self._made = ""

    @property
    def facts(self) -> dict[str, Any]:
        """What the stage left; empty before the run is published."""
        if not self._facts:
            self._facts = self._run.marker("publish") or {}
        return self._facts

    @property
    def sizes(self) -> dict[str, int]:
        """sha256 -> size of every blob that nodes may read: what they train with, and no held-out document."""
        if not self._sizes and self.facts:
            blobs = [self.facts["shared"], self.facts["shared_ffn"], *(part["train"] for part in self.facts["partitions"])]
            self._sizes = {blob["sha256"]: int(blob["size"]) for blob in blobs}
        return self._sizes

    def made(self, sha256: str) -> bool:
        """Whether a stage of the run left this blob, which stays, whatever somebody calls it."""
        if not self._made and self.facts:
            self._made = json.dumps([self._run.marker(stage) for stage in STAGES])
        return sha256 in self._made
