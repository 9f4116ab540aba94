"""The model on the Hub: pushed with its card as it grows."""

from __future__ import annotations

import re

from coordinator.assembler import Push
from coordinator.state import State
from forge.checkpoint.assembly import arrived
from forge.errors import ConfigError, HubError
from forge.files import RunDirectory
from forge.vocabulary import REPOSITORY


def check_repo(repo: str) -> None:
    """Find out before a run begins what would otherwise be found when its first expert arrives. Asks no network.

    Raises:
        ConfigError: `repo` does not look like `USER/REPO`.
        HubError: this machine has no token for the Hub.
    """
    if not re.fullmatch(REPOSITORY, repo):
        raise ConfigError(f"--push {repo!r} must look like USER/REPO.")
    from huggingface_hub import get_token

    if get_token() is None:
        raise HubError(f"Cannot push to {repo}: this machine is not logged in to the Hub; log in with `hf auth login` or "
                       "set HF_TOKEN.")  # fmt: skip


def pusher(run: RunDirectory, state: State, repo: str) -> Push:
    """A function that pushes the run's model directory, as it is then, to `repo` (`USER/REPO`)."""

    def push(message: str) -> str:
        from huggingface_hub.utils import disable_progress_bars

        from forge.publish.card import model_card, run_facts
        from forge.publish.hub import push_model

        disable_progress_bars()  # They would be drawn into the coordinator's own lines.
        # A model whose evaluation failed must not show the figures of the one before it.
        experts = len(arrived(run.model))
        rows = [row for row in state.evaluations() if row["experts"] == experts]
        card = model_card(run.model, run=run_facts(run, repo), evaluation=rows[-1] if rows else None)
        return push_model(run.model, repo, message=message, card=card)

    return push
