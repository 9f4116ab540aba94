from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
import shutil
import threading
import tracemalloc
from typing import NamedTuple

import pytest

from coordinator.blobs import HEADER_BYTES, UploadInterruptedError, Uploads, largest_shard
from coordinator.records import LeaseRecord
from forge.errors import ProtocolError, ShardError, StorageError
from forge.files import BlobStore

from .fakes import CONFIG, sha256_of

DATA = bytes(range(256)) * 40
SHA = sha256_of(DATA)


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return Uploads(BlobStore(tmp_path / "blobs"), largest=1 << 20)


def lease(number: int = 0) -> LeaseRecord:
    return LeaseRecord(id=str(number), partition=0, node_id="n", expires_at=0.0, ended=None)


@pytest.fixture(autouse=True)
def store(tmp_path: Path) -> BlobStore:
    (tmp_path / "blobs").mkdir()
    return BlobStore(tmp_path / "blobs")


def test_an_upload_becomes_a_blob(uploads: Uploads, store: BlobStore) -> None:
    assert uploads.open(lease(), SHA, len(DATA)) == 0
    assert uploads.write(SHA, 0, [DATA[:100], DATA[100:]]) == len(DATA)
    assert store.path(SHA).read_bytes() == DATA
    assert uploads.open(lease(), SHA, len(DATA)) == len(DATA)
    assert uploads.write(SHA, 0, [DATA]) == len(DATA)
    assert not list((store.directory / "incoming").iterdir())


def test_an_upload_goes_on_from_what_is_on_disk_after_a_restart(uploads: Uploads, store: BlobStore) -> None:
    uploads.open(lease(), SHA, len(DATA))
    assert uploads.write(SHA, 0, [DATA[:1000]]) == 1000
    again = Uploads(store, largest=1 << 20)
    with pytest.raises(UploadInterruptedError, match="restarted"):
        again.write(SHA, 1000, [DATA[1000:]])
    assert again.open(lease(), SHA, len(DATA)) == 1000
    assert again.write(SHA, 900, [DATA[900:]]) == len(DATA)
    assert store.has(SHA)


def test_what_a_second_stream_wrote_over_the_first_is_what_is_hashed(uploads: Uploads, store: BlobStore) -> None:
    uploads.open(lease(), SHA, len(DATA))
    uploads.write(SHA, 0, [DATA[:1000]])
    with pytest.raises(UploadInterruptedError, match="damaged"):
        uploads.write(SHA, 0, [bytes(1000), DATA[1000:]])
    assert uploads.open(lease(), SHA, len(DATA)) == 0
    uploads.write(SHA, 0, [DATA[:1000]])
    assert not store.has(SHA)
    with pytest.raises(ShardError, match="twice"):
        uploads.write(SHA, 500, [bytes(500), DATA[1000:]])


def test_a_complete_part_is_finished_when_it_is_opened_again(uploads: Uploads, store: BlobStore) -> None:
    (store.directory / "incoming").mkdir()
    (store.directory / "incoming" / f"{SHA}.part").write_bytes(DATA)
    assert uploads.open(lease(), SHA, len(DATA)) == len(DATA)
    assert store.has(SHA)


def test_what_is_longer_than_announced_is_refused_or_dropped(uploads: Uploads, store: BlobStore) -> None:
    for size in (0, (1 << 20) + 1):
        with pytest.raises(ProtocolError, match="at most"):
            uploads.open(lease(), SHA, size)
    uploads.open(lease(), SHA, 10)
    with pytest.raises(ProtocolError, match="brings more"):
        uploads.write(SHA, 0, [DATA[:8], DATA[8:16]])
    with pytest.raises(ProtocolError, match="8 bytes so far"):
        uploads.write(SHA, 9, [DATA[9:10]])
    assert uploads.open(lease(), SHA, 5) == 0


def test_damaged_bytes_are_asked_for_again_and_then_refused(uploads: Uploads, store: BlobStore) -> None:
    wrong = DATA[:-1] + b"?"
    uploads.open(lease(), SHA, len(DATA))
    with pytest.raises(UploadInterruptedError, match="send it again"):
        uploads.write(SHA, 0, [wrong])
    assert uploads.open(lease(), SHA, len(DATA)) == 0
    with pytest.raises(ShardError, match="twice"):
        uploads.write(SHA, 0, [wrong])
    assert not store.has(SHA)
    assert uploads.write(SHA, 0, [DATA]) == len(DATA)


def test_a_newer_stream_takes_over_from_a_stalled_one(uploads: Uploads, store: BlobStore) -> None:
    uploads.open(lease(), SHA, len(DATA))
    arrived, go_on, cancelled = threading.Event(), threading.Event(), threading.Event()
    outcome: list[Exception] = []

    def stalling() -> Iterator[bytes]:
        yield DATA[:100]
        arrived.set()
        go_on.wait(5)
        yield b"x" * 100

    def first() -> None:
        try:
            uploads.write(SHA, 0, stalling(), cancelled.set)
        except UploadInterruptedError as error:
            outcome.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert arrived.wait(5)
    assert uploads.open(lease(), SHA, len(DATA)) == 100
    assert uploads.write(SHA, 100, [DATA[100:200]]) == 200
    assert cancelled.is_set()
    go_on.set()
    thread.join(5)
    assert "took over" in str(outcome[0])
    assert uploads.write(SHA, 200, [DATA[200:]]) == len(DATA)


def test_a_lease_has_one_upload(uploads: Uploads, store: BlobStore) -> None:
    uploads.open(lease(), SHA, len(DATA))
    uploads.write(SHA, 0, [DATA[:10]])
    uploads.open(lease(), sha256_of(b"other"), 5)
    assert not list((store.directory / "incoming").glob(f"{SHA}*"))


def test_what_a_lease_finished_makes_way_as_well(store: BlobStore) -> None:
    needed: set[str] = set()
    uploads = Uploads(store, largest=1 << 20, needed=needed.__contains__)
    finished = [b"first", b"second", b"third"]
    for data in finished:
        uploads.open(lease(), sha256_of(data), len(data))
        uploads.write(sha256_of(data), 0, [data])
        needed |= {sha256_of(data)} if data == b"second" else set()
    assert [store.has(sha256_of(data)) for data in finished] == [False, True, True]
    uploads.open(lease(1), sha256_of(b"third"), 5)  # Another lease brings the same.
    uploads.open(lease(), SHA, len(DATA))
    uploads.discard("0", sha256_of(b"third"))
    assert store.has(sha256_of(b"third"))
    uploads.discard("1", sha256_of(b"third"))
    assert not store.has(sha256_of(b"third"))


def test_a_stream_whose_upload_was_dropped_does_not_finish_another_ones_part(uploads: Uploads, store: BlobStore) -> None:
    def interrupted() -> Iterator[bytes]:
        yield DATA
        uploads.open(lease(), sha256_of(b"other"), 5)
        uploads.open(lease(), SHA, len(DATA))
        uploads.write(SHA, 0, [DATA[:-1]])
        (store.directory / "incoming" / f"{SHA}.part").write_bytes(bytes(len(DATA)))

    uploads.open(lease(), SHA, len(DATA))
    with pytest.raises(UploadInterruptedError, match="dropped"):
        uploads.write(SHA, 0, interrupted())
    assert not store.has(SHA)


def test_no_path_leaves_the_directory(uploads: Uploads) -> None:
    with pytest.raises(StorageError):
        uploads.open(lease(), "../" * 20 + "etcx", 10)


def test_a_full_disk_is_told_before_the_bytes_come(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int = 10

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage())
    with pytest.raises(StorageError, match="is full"):
        uploads.open(lease(), SHA, len(DATA))


def test_an_upload_takes_the_memory_of_a_chunk(store: BlobStore) -> None:
    chunk, count = bytes(1 << 16), 300
    data = sha256_of(chunk * count)
    uploads = Uploads(store, largest=1 << 30)
    uploads.open(lease(), data, len(chunk) * count)
    tracemalloc.start()
    uploads.write(data, 0, (bytes(1 << 16) for _ in range(count)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert store.has(data)
    assert peak < 4 << 20


def test_the_largest_shard_follows_from_the_architecture() -> None:
    assert largest_shard(CONFIG.model) == CONFIG.model.expert_parameters * 4 + HEADER_BYTES


def test_forgetting_deletes_what_is_unfinished(uploads: Uploads, store: BlobStore) -> None:
    uploads.open(lease(), SHA, len(DATA))
    uploads.write(SHA, 0, [DATA[:10]])
    uploads.forget_all()
    assert not (store.directory / "incoming").exists()
