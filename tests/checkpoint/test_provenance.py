"""Where a model comes from, written at every step of the assembly, and `forge verify` on whole and on altered directories."""

from __future__ import annotations

from collections.abc import Callable
import json
import os
from pathlib import Path
import shutil
from typing import Any

from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
import pytest

from forge.checkpoint.assembly import accept, arrived, start, withdraw
from forge.checkpoint.provenance import keep, origin, read_lineage
from forge.checkpoint.verify import verify
from forge.cli import main
from forge.errors import ProvenanceError, StorageError
from forge.files import RunDirectory, read_json, write_json
from forge.signature import node_id_of
from forge.vocabulary import INDEX_FILE, MANIFEST_FILE, PROVENANCE_FILE, ROUTER_FILE, SHARED_FILE, expert_file
from tests.checkpoint.conftest import make_shard

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()


def manifest_of(run: RunDirectory, partition: int, sha256: str, **changed: Any) -> bytes:
    published = run.marker("publish")
    assert published is not None
    return json.dumps({"run_id": run.run_id, "lease_id": "1" * 32, "partition": partition, "sha256": sha256,
                       "shared_sha256": published["shared"]["sha256"], "config_fingerprint": run.config.fingerprint,
                       "tokens_seen": 1000, **changed}).encode()  # fmt: skip


def take_in(run: RunDirectory, partition: int, *, signed: bool = True, **changed: Any) -> str:
    """Accept a shard as a coordinator does, or as a run on one machine does."""
    sha256 = make_shard(run, partition)
    manifest = manifest_of(run, partition, sha256, **changed)
    proof = {"signature": KEY.sign(manifest), "public_key": PUBLIC} if signed else {}
    keep(run, origin(run.blobs.path(sha256), run.config, partition, manifest, sha256=sha256, **proof), {})
    accept(run, partition, sha256, {"node_name": "laptop"})
    return sha256


@pytest.fixture
def assembled(run: RunDirectory) -> RunDirectory:
    """Expert 0 of a node, expert 1 of the machine itself, expert 2 missing."""
    start(run)
    take_in(run, 0)
    take_in(run, 1, signed=False)
    return run


def test_a_run_and_a_copy_of_its_model_verify(assembled: RunDirectory, tmp_path: Path) -> None:
    found = verify(assembled.root)
    assert found.problems == []
    links = {link.what: link for link in found.links}
    assert links[expert_file(0)].by == f"node {node_id_of(PUBLIC)}"
    assert links[expert_file(0)].checked == "hash, signature"
    assert (links[expert_file(1)].by, links[expert_file(1)].checked) == ("this machine", "hash")
    assert links[expert_file(2)].made_from == "shared_ffn"
    copy = shutil.copytree(assembled.model, tmp_path / "copy")
    shutil.rmtree(assembled.root)
    found = verify(copy)
    assert found.problems == []
    assert {link.what: link.checked for link in found.links}["shared"] == "not in a model directory"


def test_the_command_prints_the_lineage_or_a_sentence_for_each_mismatch(assembled: RunDirectory) -> None:
    good = CliRunner().invoke(main, ["verify", str(assembled.root)])
    assert good.exit_code == 0, good.output
    assert "verified: every file" in good.stdout and "1 of 2 experts were trained by the run's own machine" in good.stdout
    for name in (SHARED_FILE, expert_file(0)):
        flip(assembled.model / name, -1)
    bad = CliRunner().invoke(main, ["verify", str(assembled.model), "--json"])
    assert bad.exit_code == ProvenanceError.exit_code
    said = json.loads(bad.stdout)
    assert not said["verified"] and len(said["problems"]) == 2
    sentences = bad.stderr.splitlines()
    assert len(sentences) == 2 and all(line.startswith("error: ") and line.endswith(".") for line in sentences)
    assert SHARED_FILE in sentences[0] and expert_file(0) in sentences[1]


def flip(path: Path, at: int) -> None:
    """Change one bit, in a copy: files of the model are hard links to blobs."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.unlink()
    path.write_bytes(data)


def edit(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    """A change of a JSON file of the model."""
    def apply(model: Path) -> None:
        tree = read_json(model / name)
        change(tree)
        write_json(model / name, tree)

    return apply


def resign(tree: Any) -> None:
    """The attacker's own signature on the attacker's own words: another run's, here."""
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    shard = tree["shards"][0]
    shard["manifest"] = shard["manifest"].replace('"tokens_seen": 1000', '"tokens_seen": 1000, "run_id": "x"')
    shard["signature"] = key.sign(shard["manifest"].encode()).hex()
    shard["public_key"] = key.public_key().public_bytes_raw().hex()


def swap(model: Path) -> None:
    """Put the placeholder of expert 2 in the place of expert 0."""
    shutil.copyfile(model / expert_file(2), model / "copy")
    os.replace(model / "copy", model / expert_file(0))


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "router": (lambda model: flip(model / ROUTER_FILE, -1), ROUTER_FILE),
    "tokenizer": (lambda model: flip(model / "tokenizer.json", 5), "tokenizer.json was changed"),
    "placeholder": (lambda model: flip(model / expert_file(2), -1), "does not hold the shared FFN"),
    "missing expert": (lambda model: (model / expert_file(0)).unlink(), expert_file(0)),
    "expert swapped for a placeholder": (swap, "lacks the tensor"),
    "stray weights": (lambda model: (model / "model.safetensors").write_bytes(b""), "model.safetensors does not belong"),
    "code": (lambda model: (model / "modeling.py").write_bytes(b""), "modeling.py does not belong"),
    "signature": (edit(PROVENANCE_FILE, lambda tree: tree["shards"][0].update(signature="0" * 128)), "is not signed by"),
    "key": (edit(PROVENANCE_FILE, lambda tree: tree["shards"][0].update(public_key="0" * 64)), "is not signed by"),
    "half a signature": (edit(PROVENANCE_FILE, lambda tree: tree["shards"][0].update(signature=None)), "half of a signature"),
    "words": (edit(PROVENANCE_FILE, lambda tree: tree["shards"][0].update(
        manifest=tree["shards"][0]["manifest"].replace("1000", "9999"))), "is not signed by"),
    "words of the attacker's": (edit(PROVENANCE_FILE, resign), "names a key twice"),
    "no words": (edit(PROVENANCE_FILE, lambda tree: tree["shards"][0].update(manifest=None)), "who made"),
    "no shard": (edit(PROVENANCE_FILE, lambda tree: tree["shards"].clear()), "expected none"),
    "run": (edit(PROVENANCE_FILE, lambda tree: tree.update(run_id="f" * 32)), "another run"),
    "shared": (edit(PROVENANCE_FILE, lambda tree: tree["components"].update(shared="f" * 64)), "other shared components"),
    "config": (edit(PROVENANCE_FILE, lambda tree: tree["config"].update(seed=7)), "config fingerprint"),
    "architecture": (edit("config.json", lambda tree: tree.update(rope_theta=5.0)), "config.json does not describe"),
    "index": (edit(INDEX_FILE, lambda tree: tree["weight_map"].update({"model.norm.weight": ROUTER_FILE})), INDEX_FILE),
    "index, experts": (edit(INDEX_FILE, lambda tree: tree["metadata"].update(experts_arrived=[0])), "forge assemble"),
    "manifest": (edit(MANIFEST_FILE, lambda tree: tree["experts"][0].update(sha256=None)), MANIFEST_FILE),
    "generation": (edit("generation_config.json", lambda tree: tree.update(eos_token_id=5)), "generation_config.json is not"),
    "index, size": (edit(INDEX_FILE, lambda tree: tree["metadata"].update(total_size=1)), "names another size"),
    "manifest, shared": (edit(MANIFEST_FILE, lambda tree: tree.update(shared_sha256="f" * 64)), "the same shared_sha256"),
    "manifest, credit": (edit(MANIFEST_FILE, lambda tree: tree["experts"][0]["credit"].update(tokens=5)), "another tokens"),
    "source": (edit(PROVENANCE_FILE, lambda tree: tree["data"].update(source="elsewhere")), "another data source"),
    "manifest, nonsense": (edit(MANIFEST_FILE, lambda tree: tree.update(experts=[3])), "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERED)
def test_what_was_changed_is_found_and_named(assembled: RunDirectory, what: str) -> None:
    change, sentence = TAMPERED[what]
    change(assembled.model)
    for target in (assembled.model, assembled.root):
        problems = verify(target).problems
        assert any(sentence in problem for problem in problems), problems
        assert all(problem.endswith(".") for problem in problems)


def test_one_flipped_bit_anywhere_is_found(run: RunDirectory) -> None:
    start(run)
    for partition in (0, 1):
        take_in(run, partition)
    for path in sorted(run.model.iterdir()):
        whole = path.read_bytes()
        for at in range(3, len(whole), max(len(whole) // 5, 1)):
            line = whole[whole.rfind(b"\n", 0, at) + 1 :].split(b"\n", 1)[0]
            if path.suffix == ".json" and (b"credit" in line or b"node_name" in line):
                continue  # Whom the model credits is nobody's signed word.
            flip(path, at)
            try:
                problems = verify(run.model).problems
            except (StorageError, ProvenanceError) as error:
                problems = [str(error)]
            assert problems and all(problem.endswith((".", "?")) for problem in problems), (path.name, at, problems)
            path.write_bytes(whole)
    assert verify(run.model).problems == []


def test_a_changed_blob_is_found_in_the_run_directory(assembled: RunDirectory) -> None:
    published = assembled.marker("publish")
    assert published is not None
    flip(assembled.blobs.path(published["shared_ffn"]["sha256"]), -1)
    assert any("was changed" in problem for problem in verify(assembled.root).problems)
    assembled.finish("publish", published | {"router": published["shared"]})
    assert any("router is not the file that the run published" in problem for problem in verify(assembled.root).problems)


def test_what_cannot_be_verified_at_all_is_one_sentence(assembled: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is not there"):
        verify(tmp_path / "nowhere")
    (assembled.model / PROVENANCE_FILE).write_text('{"format_version": 1}')
    with pytest.raises(StorageError, match="format_version is not what it should be"):
        verify(assembled.model)
    (assembled.model / PROVENANCE_FILE).unlink()
    with pytest.raises(StorageError, match="nothing says where its weights come from"):
        verify(assembled.model)
    start(assembled)
    assert verify(assembled.model).problems == []


def test_a_withdrawn_expert_leaves_the_lineage(assembled: RunDirectory) -> None:
    withdraw(assembled, 0)
    assert [shard.partition for shard in read_lineage(assembled.model).shards] == [1]
    assert verify(assembled.root).problems == []


def test_whenever_it_is_killed_every_expert_in_the_model_has_its_origin(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(run)
    moments: list[Path] = []
    replace = os.replace

    def photographed(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).is_relative_to(run.root):
            moments.append(tmp_path / f"moment-{len(moments)}")
            shutil.copytree(run.root, moments[-1])

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", photographed)
        for partition in (0, 1):
            take_in(run, partition)
        withdraw(run, 0)
    assert len(moments) > 12
    for moment in moments:
        killed = RunDirectory(moment)
        origins = {shard.partition: shard.sha256 for shard in read_lineage(killed.model).shards if shard.signature}
        assert arrived(killed.model).items() <= origins.items()
        named = read_json(killed.model / INDEX_FILE)["metadata"]["experts_arrived"]
        assert set(arrived(killed.model)) >= set(named) - {0}  # The placeholder of what is withdrawn comes before the index.
        start(killed)
        assert verify(moment).problems == []
