"""The words of the project as constants: stages, file names and versions, each defined once.

run, shared components, partition, expert, shard, lease, node, coordinator, receipt, assembled model.
"""

from __future__ import annotations

from typing import Final

#: Version of the wire contract; a node and a coordinator must agree on it.
PROTOCOL_VERSION: Final = 3
#: Version of the shard format, written into every shard's metadata.
SHARD_FORMAT_VERSION: Final = "1"
#: Default address of a coordinator.
DEFAULT_PORT: Final = 7433
#: Default port of its dashboard, on loopback.
DASHBOARD_PORT: Final = 7473
#: Bytes of one message of a transfer: a cut line loses at most so many. Larger ones are slower (they leave the processor's caches
#: between two layers) and cost the coordinator more memory; smaller ones cost more Python (`benchmarks/transfer.py`).
CHUNK_BYTES: Final = 256 << 10
#: Bytes of the smallest message that a node makes or asks for, on a line that breaks all the time.
SMALLEST_CHUNK_BYTES: Final = 16 << 10

#: Stages of the pipeline in order. The first five end with a marker `stages/NAME.json`.
STAGES: Final = ("prepare", "shared", "partition", "router", "publish")

END_OF_TEXT: Final = "<|endoftext|>"
#: Its id in every tokenizer of ours: the first special token.
END_OF_TEXT_ID: Final = 0

#: What a repository of the Hub is called: USER/REPO.
REPOSITORY: Final = r"[\w.-]+/[\w.-]+"

#: Held by the process that works in a run directory.
LOCK_FILE: Final = "run.lock"
#: What a coordinator adds to it.
DATABASE_FILE: Final = "forge.db"
#: What training goes on from, in its work directory.
CHECKPOINT_FILE: Final = "checkpoint.safetensors"

#: A whole checkpoint in one file, as transformers writes small ones.
SINGLE_FILE: Final = "model.safetensors"
#: Files of the assembled model.
SHARED_FILE: Final = "shared.safetensors"
ROUTER_FILE: Final = "router.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
#: Where all of it comes from, with hashes and signatures; written first.
PROVENANCE_FILE: Final = "provenance.json"
#: What is in the model directory and who made it; written last.
MANIFEST_FILE: Final = "modularforge.json"

#: Rows of an evaluation (`forge/evaluate/rivals.py` says what they are).
SHARED: Final = "shared components alone"
ALONE: Final = "expert {} alone"
UNIFORM: Final = "uniform gate"
OURS: Final = "ours"
ORACLE: Final = "oracle"

#: Keys of a shard's safetensors metadata.
SHARD_KEYS: Final = (
    "run_id", "config_fingerprint", "shared_sha256", "partition", "tokens_seen", "final_loss", "format_version",
)  # fmt: skip


def expert_file(partition: int) -> str:
    """Name of an expert's file in the assembled model, such as `expert-003.safetensors`."""
    return f"expert-{partition:03d}.safetensors"


def kept_file(step: int) -> str:
    """Name of the checkpoint of a step that is kept for an audit, in the same directory."""
    return f"kept-{step:08d}.safetensors"
