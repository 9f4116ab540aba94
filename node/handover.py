"""Checkpoints that leave this machine: an unfinished expert that goes to the next node (`forge-node finish --now` leaves it),
and those of a finished one that a coordinator who audits asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from forge.config import RunConfig
from forge.errors import AccessError, ForgeError, ProtocolError, ShardError
from forge.vocabulary import CHECKPOINT_FILE
from node.cache import Cache, Submission
from node.client import FleetClient, OnBytes
from node.messages import Assignment, Progress


def inherit(assignment: Assignment, cache: Cache, client: FleetClient, config: RunConfig, say: Callable[[str], None],
            on_bytes: OnBytes) -> None:  # fmt: skip
    """Go on from what another node left of an expert, if this one has no checkpoint of its own and it is still there.

    Raises:
        ForgeError: it could not be downloaded.
    """
    left, partition = assignment.checkpoint, assignment.partition
    if left is None or (cache.work_dir(partition) / CHECKPOINT_FILE).is_file():
        return
    from forge.checkpoint.handover import check_checkpoint  # It imports NumPy, which an agent can do without.

    path = cache.blobs.path(left.sha256)
    try:
        step = check_checkpoint(cache.fetch(client, left, on_bytes), config)
    except AccessError:
        raise
    except (ProtocolError, ShardError) as error:  # The expert may be finished by now, or somebody else have left more of it.
        for held in path.parent.glob(f"{path.name}*"):
            held.unlink()
        return say(f"What another node left of partition {partition} is of no use: {error}")
    cache.inherit(partition, path)
    say(f"Partition {partition} was left at step {step:,}.")


def hand_over(assignment: Assignment, cache: Cache, client: FleetClient, say: Callable[[str], None], on_bytes: OnBytes) -> bool:
    """Leave the checkpoint to the next node, and the lease with it; False when there is none, or it is not wanted."""
    partition = assignment.partition
    checkpoint = cache.work_dir(partition) / CHECKPOINT_FILE
    if not checkpoint.is_file():
        return False
    try:
        client.hand_over(assignment.lease_id, checkpoint, on_bytes)
    except (ProtocolError, AccessError, ShardError) as error:
        say(f"Partition {partition} could not be handed over: {error}")
        return False
    cache.finish(partition)
    say(f"Partition {partition} is handed over: another node goes on from there.")
    return True


def leave(assignment: Assignment, cache: Cache, client: FleetClient, say: Callable[[str], None], on_bytes: OnBytes) -> bool:
    """Hand over on the way out, if there is something to leave and somebody to take it; Ctrl-C ends that, too."""
    if not (cache.work_dir(assignment.partition) / CHECKPOINT_FILE).is_file():
        return False
    try:
        client.heartbeat(assignment.lease_id, Progress(activity="uploading"))  # Who does not answer now is not waited for.
        say(f"Handing partition {assignment.partition} over; press Ctrl-C again to leave at once.")
        return hand_over(assignment, cache, client, say, on_bytes)
    except (KeyboardInterrupt, ForgeError):
        return False


def show_checkpoints(submission: Submission, wanted: Iterable[str], cache: Cache, client: FleetClient,
                     say: Callable[[str], None], on_bytes: OnBytes) -> None:  # fmt: skip
    """Send the checkpoints of a finished training that the coordinator wants to repeat a part from; nothing else is sent."""
    kept, partition = cache.kept(submission), submission.partition
    asked = dict.fromkeys(wanted)
    if not asked.keys() <= kept.keys():
        say(f"Partition {partition}: the coordinator asks for something that is no checkpoint of the training; it stays here.")
    for sha256 in asked.keys() & kept.keys():
        path = kept[sha256]
        if not path.is_file():
            say(f"Partition {partition}: the coordinator asks for a checkpoint that is not here any more.")
            continue
        say(f"Partition {partition}: the coordinator repeats a part of the training and asks for a checkpoint of it.")
        try:
            client.upload(submission.lease_id, sha256, path, on_bytes, checkpoint=True)
        except (ProtocolError, ShardError) as error:  # It may have its verdict by now.
            say(f"Partition {partition}: the checkpoint was not taken: {error}")
