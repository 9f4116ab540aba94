"""The model on the Hub: pushed with its card as it grows."""

from __future__ import annotations

from coordinator.assembler import Push
from coordinator.state import State
from forge.files import RunDirectory


def pusher(run: RunDirectory, state: State, repo: str) -> Push:
    """A function that pushes the run's model directory, as it is then, to `repo` (`USER/REPO`)."""

    def push(message: str) -> str:
        from huggingface_hub.utils import disable_progress_bars

        from forge.publish.card import model_card, run_facts
        from forge.publish.hub import push_model

        disable_progress_bars()  # They would be drawn into the coordinator's own lines.
        evaluations = state.evaluations()
        card = model_card(run.model, run=run_facts(run, repo), evaluation=evaluations[-1] if evaluations else None)
        return push_model(run.model, repo, message=message, card=card)

    return push
