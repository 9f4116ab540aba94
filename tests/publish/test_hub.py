"""Pushing through the unmodified huggingface_hub client to a local Hub."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
import pytest
import torch
from transformers import AutoModelForCausalLM

from forge.checkpoint.assembly import accept, start
from forge.errors import HubError, StorageError
from forge.files import RunDirectory
from forge.publish.card import model_card
from forge.publish.hub import ATTEMPTS, push_model
from forge.publish.publication import publish
from forge.vocabulary import INDEX_FILE, MANIFEST_FILE, PROVENANCE_FILE, expert_file
from tests.checkpoint.conftest import make_shard, publish_run
from tests.fakes.hub import FakeHub, Fault, fake_hub

# The client gives its HTTP library an uploaded file in a way that the library has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
REPO = "ada/tiny"
COMMIT = "POST .*/commit/"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    disable_progress_bars()
    with fake_hub() as hub:
        yield hub
    huggingface_hub.close_session()
    enable_progress_bars()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = publish_run(tmp_path / "run")
    start(run)
    return run


def push(hub: FakeHub, run: RunDirectory, waits: list[float] | None = None, *, token: str = "hf_good",
         repo: str = REPO, private: bool = False) -> str:  # fmt: skip
    card = model_card(run.model, run={"name": "tiny"}, evaluation=None)
    waits = [] if waits is None else waits
    return push_model(run.model, repo, message="Push", card=card, endpoint=hub.endpoint, token=token,
                      sleep=waits.append, private=private)  # fmt: skip


def assert_every_commit_loads(hub: FakeHub, tmp_path: Path) -> None:
    for number, commit in enumerate(hub.repos[REPO].commits):
        if INDEX_FILE not in commit.tree:
            assert commit.message != "Push" and not any(path.endswith(".safetensors") for path in commit.tree)
            continue
        directory = hub.materialise(REPO, commit, tmp_path / f"commit-{number}")
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(directory)(torch.arange(20)[None]).logits
        assert torch.isfinite(logits).all()


def test_the_repo_loads_at_every_commit(hub: FakeHub, run: RunDirectory, tmp_path: Path) -> None:
    addresses = [push(hub, run, private=True)]
    for partition in range(3):
        accept(run, partition, make_shard(run, partition), {"node_name": f"node {partition}"})
        addresses.append(push(hub, run))
    commits = hub.repos[REPO].commits
    assert hub.repos[REPO].private
    assert addresses == [f"{hub.endpoint}/{REPO}/commit/{commit.oid}" for commit in commits[1:]]
    for partition, commit in enumerate(commits[2:]):
        assert commit.changed == [expert_file(partition), "README.md", PROVENANCE_FILE, INDEX_FILE, MANIFEST_FILE]
    held = {path.name: path.read_bytes() for path in run.model.iterdir()}
    pushed = {path: content for path, (content, _) in commits[-1].tree.items()}
    assert {name: pushed[name] for name in held} == held
    assert set(pushed) - set(held) == {".gitattributes", "README.md"}
    assert_every_commit_loads(hub, tmp_path)
    assert not list(run.root.glob(".push-*"))
    downloaded = huggingface_hub.snapshot_download(REPO, endpoint=hub.endpoint, local_dir=tmp_path / "got", token=False)
    assert (Path(downloaded) / expert_file(2)).read_bytes() == held[expert_file(2)]


def test_figures_are_of_the_experts_that_are_there(hub: FakeHub, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.publish.publication.push_model", partial(push_model, endpoint=hub.endpoint, token="hf_good"))
    accept(run, 1, make_shard(run, 1), {"node_name": "laptop"})
    rows: list[dict[str, Any]] = [{"experts": 1, "arrived": [k], "final": False, "partitions": [], "mean_perplexity": 20.0 + k,
                                   "pooled_perplexity": 1.0, "pooled_bits_per_byte": 1.0} for k in range(2)]  # fmt: skip
    publish(run.model, REPO, rows=rows[:1])  # Expert 0 was measured, and taken out again.
    assert b"20.0" not in hub.repos[REPO].commits[-1].tree["README.md"][0] and not hub.repos[REPO].tags
    publish(run.model, REPO, rows=rows)
    assert b"21.0" in hub.repos[REPO].commits[-1].tree["README.md"][0] and list(hub.repos[REPO].tags) == ["experts-1"]


def test_nothing_new_is_no_commit(hub: FakeHub, run: RunDirectory) -> None:
    (run.root / ".push-999999999-left").mkdir()  # by a push that was killed
    assert push(hub, run) == push(hub, run)
    assert len(hub.repos[REPO].commits) == 2
    assert not list(run.root.glob(".push-*"))


@pytest.mark.parametrize("pattern", [COMMIT, "GET .*/api/models/ada/tiny$", "POST /api/repos/create"])
@pytest.mark.parametrize("kind", [500, 503, "drop"])
def test_one_fault_costs_one_wait(hub: FakeHub, run: RunDirectory, pattern: str, kind: int | str) -> None:
    hub.faults.append(Fault(pattern, kind))
    waits: list[float] = []
    push(hub, run, waits)
    assert waits == [1.0] and hub.faults == [] and len(hub.repos[REPO].commits) == 2


def test_an_upload_that_is_cut_off_is_sent_again(hub: FakeHub, run: RunDirectory, monkeypatch: pytest.MonkeyPatch,
                                                 tmp_path: Path) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # the client's own retry
    hub.faults += [Fault("PUT /storage/", "drop"), Fault("PUT /storage/", 500), Fault("/preupload/", 500)]
    push(hub, run)
    assert hub.faults == []
    assert_every_commit_loads(hub, tmp_path)


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: FakeHub, run: RunDirectory) -> None:
    hub.faults.append(Fault(COMMIT, "answer-lost"))
    address = push(hub, run)
    assert address.endswith(hub.repos[REPO].commits[-1].oid) and len(hub.repos[REPO].commits) == 2


def test_a_parent_that_moved_is_read_again(hub: FakeHub, run: RunDirectory, tmp_path: Path) -> None:
    waits: list[float] = []
    hub.faults.append(Fault(COMMIT, "overtake"))
    push(hub, run, waits)
    messages = [commit.message for commit in hub.repos[REPO].commits]
    assert messages == ["initial commit", "someone else", "Push"] and waits == []
    assert hub.repos[REPO].head.tree["NOTES.md"][0] == b"mine"
    accept(run, 0, make_shard(run, 0), {})
    hub.faults += [Fault(COMMIT, "overtake")] * ATTEMPTS
    with pytest.raises(HubError, match="others keep committing"):
        push(hub, run, waits)
    assert_every_commit_loads(hub, tmp_path)


def test_a_tag_names_the_newest_commit_that_was_called_so(hub: FakeHub, run: RunDirectory) -> None:
    def tagged(tag: str) -> str:
        return push_model(run.model, REPO, message="Push", tag=tag, endpoint=hub.endpoint, token="hf_good",
                          sleep=lambda _: None).rpartition("/")[2]  # fmt: skip

    hub.faults.append(Fault("POST .*/tag/", 503))  # The commit is there by then, and is not made twice.
    without = tagged("experts-0")
    accept(run, 0, make_shard(run, 0), {})
    first = tagged("experts-1")
    assert hub.repos[REPO].tags == {"experts-0": without, "experts-1": first} and hub.faults == []
    assert tagged("experts-1") == first
    accept(run, 1, make_shard(run, 1), {})
    assert hub.repos[REPO].tags == {"experts-0": without, "experts-1": (moved := tagged("experts-1"))} and moved != first
    assert len(hub.repos[REPO].commits) == 4
    (held,) = [commit for commit in hub.repos[REPO].commits if commit.oid == without]
    assert huggingface_hub.HfApi(hub.endpoint, token="hf_good").repo_info(REPO, revision="experts-0").sha == held.oid


SENTENCES = {
    403: "may not write there", 404: "does not know the repo", 409: "another change of the repo is in progress",
    418: r"refused the request \(HTTP 418\)", 429: "allows no more requests", 500: r"a fault of its own \(HTTP 500\)",
}  # fmt: skip


@pytest.mark.parametrize("status", SENTENCES)
def test_refusals_are_one_sentence(hub: FakeHub, run: RunDirectory, status: int) -> None:
    hub.faults += [Fault(COMMIT, status)] * ATTEMPTS
    waits: list[float] = []
    with pytest.raises(HubError, match=f"^Cannot push to ada/tiny: .*{SENTENCES[status]}") as caught:
        push(hub, run, waits)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".") and caught.value.detail
    assert waits == ([1.0, 2.0, 4.0, 8.0] if status in (429, 500) else [])
    assert len(hub.repos[REPO].commits) == 1
    hub.faults.clear()
    push(hub, run)


def test_bad_token_bad_name_no_network_no_model(hub: FakeHub, run: RunDirectory, tmp_path: Path) -> None:
    hub.tokens = {"hf_good"}
    with pytest.raises(HubError, match="does not accept the token; log in"):
        push(hub, run, token="hf_bad")
    with pytest.raises(HubError, match="must look like USER/REPO"):
        push(hub, run, repo="a/b/c")
    waits: list[float] = []
    with pytest.raises(HubError, match="cannot be reached; check the network"):
        push_model(run.model, REPO, message="Push", endpoint="http://127.0.0.1:9", token="hf_good", sleep=waits.append)
    assert len(waits) == ATTEMPTS - 1
    with pytest.raises(StorageError, match="holds no assembled model"):
        push_model(tmp_path, REPO, message="Push", endpoint=hub.endpoint)
    assert hub.repos == {}
