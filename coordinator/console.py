"""What the terminal of a coordinator shows beside its lines: the snapshot that the dashboard shows, in a few words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
import threading

from coordinator.snapshot import Json
from forge.errors import ForgeError
from forge.live import Output, View, duration
from forge.tracking import Tracker, track_evaluations, track_progress
from forge.train.memory import format_size

#: Seconds between two looks at the run; in JSON an object is printed at every fifth.
LOOK_SECONDS = 1.0
RECORD_EVERY = 5


def view(snapshot: Json, ram_bytes: int | None) -> View:
    """The view of a snapshot.

    Args:
        snapshot: of coordinator/snapshot.py.
        ram_bytes: what each job may use; None has no limit.
    """
    phase, how_long, experts = snapshot["phase"], snapshot["estimate"], snapshot["experts"]
    accepted = sum(expert["state"] == "accepted" for expert in experts)
    step, steps = (phase["step"], phase["steps"]) if phase["steps"] else (accepted, len(experts))
    at_work = [expert for expert in experts if expert["shows"] == "training"]
    speed = phase["tokens_per_second"] or sum(expert["tokens_per_second"] or 0.0 for expert in at_work)
    facts = [] if phase["loss"] is None else [f"loss {phase['loss']:.3f}"]
    if speed:
        facts.append(f"{speed:,.0f} tokens/s")
    if phase["resident_bytes"]:
        known = {"predicted": phase["predicted_bytes"], "allowed": ram_bytes}
        promises = [f"{what} {format_size(size)}" for what, size in known.items() if size]
        facts.append(f"memory {format_size(phase['resident_bytes'])}" + (f" ({', '.join(promises)})" if promises else ""))
    if experts:
        facts.append(f"{accepted} of {len(experts)} experts accepted")
    nodes = snapshot["nodes"]["total"]
    facts.append(f"{nodes} node{'' if nodes == 1 else 's'} joined, {len(at_work)} training")
    seconds = how_long["seconds"]
    # During a stage the reasoning begins with the time.
    left = f"{duration(seconds)} until {how_long['until']}: " if seconds and phase["phase"] == "experts" else ""
    idle = phase["phase"] == "experts" and any(expert["state"] == "open" for expert in experts) and not any(
        expert["state"] == "leased" for expert in experts)  # fmt: skip
    return View(title=f"{snapshot['run']['name']}: {phase['sentence']}", done=step / steps if steps else 0.0,
                facts=tuple(facts), left=left + how_long["because"],
                waits_for="waiting for a node that trains" if idle else "")  # fmt: skip


@contextmanager
def watching(out: Output, take: Callable[[], Json], ram_bytes: int | None, tracker: Tracker | None = None) -> Iterator[None]:
    """Show a run for as long as the block runs: live on a terminal, as `state` objects in JSON, else not at all.

    Args:
        out: where.
        take: takes a snapshot.
        ram_bytes: what each job may use.
        tracker: told the same, each time.
    """
    over = threading.Event()

    def watch() -> None:
        looks = 0
        while not over.is_set():
            with suppress(ForgeError):  # The database was closed or is busy: the next look, or the end, comes soon.
                snapshot = take()
                if tracker is not None:
                    track(tracker, snapshot)
                out.show(view(snapshot, ram_bytes))
                if looks % RECORD_EVERY == 0:
                    out.record("state", **{section: snapshot[section] for section in ("phase", "estimate", "quality")})
            looks += 1
            over.wait(LOOK_SECONDS)

    thread = threading.Thread(target=watch, name="console", daemon=True)
    if out.live or out.json or tracker is not None:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.is_alive():
            thread.join(5.0)
        if tracker is not None:
            track(tracker, take())  # What happened since the last look, such as the final evaluation.
        out.calm()


def track(tracker: Tracker, snapshot: Json) -> None:
    """Log the coordinator's own training, that of each node, and the perplexity after every shard."""
    track_progress(tracker, snapshot["phase"] | {"stage": snapshot["phase"]["phase"]})
    for expert in snapshot["experts"]:
        if expert["shows"] == "training":
            track_progress(tracker, expert | {"stage": f"expert {expert['partition']}", "loss": expert["training_loss"]})
    track_evaluations(tracker, snapshot["evaluations"])
