"""The model on the Hub: pushed with its card as it grows."""

from __future__ import annotations

from coordinator.assembler import Push
from coordinator.state import State
from forge.errors import HubError
from forge.files import RunDirectory


def check_repo(repo: str) -> None:
    """Find out before a run begins what would otherwise be found when its first expert arrives. Asks no network.

    Raises:
        ConfigError: `repo` does not look like `USER/REPO`.
        HubError: this machine has no token for the Hub.
    """
    from huggingface_hub import get_token

    from forge.publish.publication import check_repository

    check_repository(repo)
    if get_token() is None:
        raise HubError(f"Cannot push to {repo}: this machine is not logged in to the Hub; log in with `hf auth login` or "
                       "set HF_TOKEN.")  # fmt: skip


def pusher(run: RunDirectory, state: State, repo: str, private: bool = False) -> Push:
    """A function that pushes the run's model directory, as it is then, to `repo` (`USER/REPO`)."""

    def push(message: str) -> str:
        from huggingface_hub.utils import disable_progress_bars

        from forge.publish.publication import publish

        disable_progress_bars()  # They would be drawn into the coordinator's own lines.
        return publish(run.model, repo, message=message, rows=state.evaluations(), private=private)

    return push
