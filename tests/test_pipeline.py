"""The whole road on one machine with real processes, on a corpus of three invented topics."""

from __future__ import annotations

import json
from pathlib import Path
import random
import shutil
from typing import Any

from click.testing import CliRunner
import pytest
from safetensors.torch import load_file, save_file
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.hostile import Scene, Tensors, sabotage
from forge import pipeline
from forge.checkpoint.assembly import accept, arrived, start, withdraw
from forge.checkpoint.shard import write_shard
from forge.cli import main
from forge.config import EvaluationConfig, RunConfig, load_config
from forge.data.packing import SequenceSampler
from forge.data.tokens import TokenFile
from forge.errors import StorageError
from forge.evaluate import slices
from forge.evaluate.likeness import learned_alike
from forge.evaluate.perplexity import Loss, measure
from forge.evaluate.stage import evaluate_run
from forge.evaluate.validation import load_shared, validate_shard
from forge.files import RunDirectory, hash_file, read_json
from forge.model import names
from forge.model.lm import load_dense
from forge.model.moe import MixtureLM
from forge.vocabulary import SHARED_FILE, STAGES, expert_file

GREEDY_TOKENS = 64
TOPICS = {
    "sea": "wave salt harbour sail tide anchor gull storm reef captain",
    "kitchen": "onion butter oven flour simmer spoon pepper recipe bread taste",
    "orbit": "rocket planet orbit fuel launch moon capsule thrust comet gravity",
}


def write_corpus(path: Path, documents: int = 240) -> Path:
    """Sentences of nouns of one topic a document."""
    draw = random.Random(3)
    with open(path, "w", encoding="utf-8") as file:
        for index in range(documents):
            nouns = list(TOPICS.values())[index % len(TOPICS)].split()
            text = " ".join(f"The {draw.choice(nouns)} and the {draw.choice(nouns)} meet {draw.choice(nouns)}."
                            for _ in range(25))  # fmt: skip
            file.write(json.dumps({"text": text}) + "\n")
    return path


def small_config(corpus: Path, *overrides: str) -> RunConfig:
    """A run of seconds."""
    return load_config("smoke", [
        f"data.source={corpus}", "data.validation_fraction=0.15", "data.test_fraction=0.15", "model.vocab_size=340",
        "model.d_model=64", "model.d_ff=192", "model.n_layers=2", "model.n_heads=2", "model.max_seq_len=640",
        "train.batch_size=4", "train.shared.tokens=40000", "train.expert.tokens=16000", "router.tokens=20000",
        "evaluation.tokens=3000", "evaluation.samples=1", "evaluation.sample_tokens=8",
        "train.shared.learning_rate=0.004", *overrides])  # fmt: skip


def run_stages(root: Path, config: RunConfig) -> RunDirectory:
    """Everything up to the placeholders."""
    run = pipeline.prepare_run(root, config, STAGES, ram_bytes=4 << 30, threads=1, on_event=_silent)
    start(run)
    return run


def _silent(event: dict[str, Any]) -> None:
    """Progress that nobody reads."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run taken to its end by hand, with what transformers says of the model after each arrival."""
    directory = tmp_path_factory.mktemp("road")
    config = small_config(write_corpus(directory / "corpus.jsonl"))
    run = run_stages(directory / "run", config)
    windows = [list(_test_windows(run, partition)) for partition in range(3)]
    dense = load_shared(run)
    identity = [(measure(dense, w).nats_per_token, measure(MixtureLM.load(run.model), w).nats_per_token) for w in windows]
    compared = [_compare(run.model)]
    before = {index: hash_file(run.model / expert_file(index)) for index in range(3)}
    for partition in range(3):
        pipeline.train_and_accept(run, partition, ram_bytes=4 << 30, threads=1, device="cpu", on_event=_silent)
        if partition in (0, 2):
            compared.append(_compare(run.model))
        if partition == 0:
            after = {index: hash_file(run.model / expert_file(index)) for index in range(3)}
    row = pipeline.run_all(run.root, config, ram_bytes=4 << 30, threads=1, device="cpu", on_event=_silent)
    return {"run": run, "config": config, "identity": identity, "compared": compared, "before": before, "after": after,
            "row": row}  # fmt: skip


def _test_windows(run: RunDirectory, partition: int) -> Any:
    from forge.data.packing import evaluation_windows
    from forge.data.tokens import TokenFile

    published = run.marker("publish")
    assert published is not None
    blob = published["partitions"][partition]["test"]["sha256"]
    return evaluation_windows(TokenFile(run.blobs.path(blob)), 640, 0, 3000)


def _compare(model_dir: Path) -> tuple[float, bool]:
    """Largest difference of our logits from transformers' on 512 tokens, and whether both generate alike."""
    tokens = torch.randint(1, 340, (1, 512), generator=torch.Generator().manual_seed(5))
    theirs = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ours = MixtureLM.load(model_dir)
    with torch.inference_mode():
        difference = (theirs(tokens).logits - ours(tokens) @ ours.head_weight.T).abs().max().item()
    prompt = AutoTokenizer.from_pretrained(model_dir)("The wave and the", return_tensors="pt").input_ids
    from forge.evaluate.generate import generate_ids

    greedy = generate_ids(ours, prompt[0].tolist(), GREEDY_TOKENS, temperature=0)
    reference = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=GREEDY_TOKENS,
                                do_sample=False, eos_token_id=None, pad_token_id=0)[0, prompt.shape[1] :]  # fmt: skip
    return difference, reference.tolist() == greedy


def test_with_no_shard_the_model_is_the_shared_components(finished: dict[str, Any]) -> None:
    for dense, assembled in finished["identity"]:
        assert assembled == pytest.approx(dense, abs=1e-6)


def test_transformers_agrees_before_after_one_and_after_all_shards(finished: dict[str, Any]) -> None:
    assert len(finished["compared"]) == 3
    for difference, same_text in finished["compared"]:
        assert difference < 1e-4
        assert same_text


def test_an_arrival_changes_no_other_expert(finished: dict[str, Any]) -> None:
    before, after = finished["before"], finished["after"]
    assert before[0] != after[0]
    assert (before[1], before[2]) == (after[1], after[2])


def test_the_mixture_beats_the_shared_components(finished: dict[str, Any]) -> None:
    row = finished["row"]
    assert sorted(arrived(finished["run"].model)) == [0, 1, 2]
    assert row["mean_loss"] < row["shared_mean_loss"]
    for name in ("loss.png", "perplexity.png", "router.png"):
        assert (finished["run"].reports / name).read_bytes().startswith(b"\x89PNG")


def test_a_contribution_is_what_transformers_loses_without_the_expert(finished: dict[str, Any], tmp_path: Path) -> None:
    """The checkpoint with the shared FFN's weights under the expert's names, against the one that the run made."""
    run, measured = finished["run"], finished["row"]["contributions"]
    assert [row["expert"] for row in measured] == [0, 1, 2] and max(row["nats"] for row in measured) > 0.01
    windows = [list(_test_windows(run, partition)) for partition in range(3)]
    whole = _mean_loss(run.model, windows)
    assert whole == pytest.approx(finished["row"]["rivals"]["ours"]["mean_loss"], abs=1e-5)
    published = run.marker("publish")
    ffn = load_file(run.blobs.path(published["shared_ffn"]["sha256"]))
    for row in measured:
        copy = shutil.copytree(run.model, tmp_path / f"without-{row['expert']}")
        name = f"block_sparse_moe.experts.{row['expert']}."
        (copy / expert_file(row["expert"])).unlink()
        save_file({key.replace("mlp.", name): value for key, value in ffn.items()}, copy / expert_file(row["expert"]),
                  {"format": "pt"})  # fmt: skip
        without = _mean_loss(copy, windows)
        assert row["loss_without"] == pytest.approx(without, abs=1e-5)
        assert row["nats"] == pytest.approx(without - whole, abs=1e-5)


def test_contributions_are_measured_again_from_the_run_directory(finished: dict[str, Any]) -> None:
    run, before = finished["run"], (finished["run"].reports / "evaluation.json").read_bytes()
    again = CliRunner().invoke(main, ["evaluate", str(run.root), "--contributions", "--json"])
    assert json.loads(again.output) == finished["row"]["contributions"]
    assert (run.reports / "evaluation.json").read_bytes() == before
    shown = CliRunner().invoke(main, ["evaluate", str(run.root), "--contributions"]).output.splitlines()
    best = max(finished["row"]["contributions"], key=lambda row: row["nats"])
    assert shown[2].split() == ["expert", str(best["expert"]), f"{best['nats']:.4f}"]
    together = sum(row["nats"] for row in finished["row"]["contributions"])
    assert shown[-1].split() == f"this machine {together:.4f} experts 0, 1, 2".split()


def _mean_loss(model_dir: Path, windows: list[list[Any]]) -> float:
    """What transformers gives a checkpoint: nats a token, mean of the partitions."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    losses = []
    for partition in windows:
        nats = 0.0
        for window in partition:
            tokens_T = torch.tensor([int(token) for token in window])
            with torch.inference_mode():
                logits_TV = model(tokens_T[None, :-1]).logits[0]
            nats += torch.nn.functional.cross_entropy(logits_TV, tokens_T[1:], reduction="sum").item()
        losses.append(nats / sum(len(window) - 1 for window in partition))
    return sum(losses) / len(losses)


def test_the_same_run_again_trains_nothing(finished: dict[str, Any]) -> None:
    stages: list[str] = []
    pipeline.run_all(finished["run"].root, finished["config"], ram_bytes=4 << 30, threads=1, device="cpu",
                     on_event=lambda event: stages.append(event["stage"]) if event["event"] == "stage" else None)  # fmt: skip
    assert stages == []


def test_a_shard_of_another_run_is_rejected(finished: dict[str, Any], tmp_path: Path) -> None:
    run = finished["run"]
    shard = run.blobs.path(arrived(run.model)[0])
    assert validate_shard(run, 0, shard)["accepted"]
    verdict = validate_shard(run, 1, shard)
    assert not verdict["accepted"] and verdict["reasons"]


@pytest.fixture(scope="module")
def scene(finished: dict[str, Any]) -> Scene:
    """What somebody has who hands in something else than the expert of partition 0."""
    run, model = finished["run"], finished["config"].model
    ffn = load_file(run.blobs.path(run.marker("publish")["shared_ffn"]["sha256"]))
    experts = {k: dict(zip(names.ffn_tensors(model), (load_file(run.model / expert_file(k))[name]
               for name in names.expert_tensors(model, k)), strict=True)) for k in range(3)}  # fmt: skip
    return Scene(model=model, partition=0, shared=ffn, honest=experts, generator=torch.Generator().manual_seed(0))


def judged(run: RunDirectory, tensors: Tensors, path: Path) -> dict[str, Any]:
    """The verdict on tensors, named as the shared FFN's, as the shard of partition 0."""
    published = run.marker("publish")
    assert published is not None
    renamed = zip(names.expert_tensors(run.config.model, 0), names.ffn_tensors(run.config.model), strict=True)
    write_shard(path / "shard.safetensors", {theirs: tensors[ours] for theirs, ours in renamed}, {
        "run_id": run.run_id, "config_fingerprint": run.config.fingerprint, "partition": "0", "tokens_seen": "1",
        "shared_sha256": published["shared"]["sha256"], "final_loss": "1.0", "format_version": "1"})  # fmt: skip
    return validate_shard(run, 0, path / "shard.safetensors")


def test_the_shared_ffn_is_no_expert(finished: dict[str, Any], scene: Scene, tmp_path: Path) -> None:
    """The untouched copy of the shared FFN is a valid file and must still be refused; so must one that is hardly touched."""
    assert "is the shared FFN again" in judged(finished["run"], scene.shared, tmp_path)["reasons"][0]
    assert "must be below" in judged(finished["run"], scene.noise(scene.shared, 1e-4), tmp_path)["reasons"][0]


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_an_accepted_expert_is_known_again_with_noise_and_its_units_in_another_order(
    finished: dict[str, Any], scene: Scene, tmp_path: Path, noise: float
) -> None:
    assert learned_alike(scene.own, scene.honest[1], scene.shared) < 0.6
    (reason,) = judged(finished["run"], scene.noise(scene.permuted(scene.honest[1], 2.0), noise), tmp_path)["reasons"]
    assert "it is the accepted expert 1 again, changed a little" in reason


def test_weights_of_a_size_that_no_training_gives_are_refused(finished: dict[str, Any], scene: Scene, tmp_path: Path) -> None:
    assert judged(finished["run"], scene.permuted(scene.own, 2.0), tmp_path)["accepted"]  # The same function.
    (reason,) = judged(finished["run"], scene.permuted(scene.own, 1000.0), tmp_path)["reasons"]
    assert "its largest weight in model.layers." in reason and "times the shared FFN's, and at most 16 times" in reason


def test_an_expert_that_the_margin_lets_in_and_that_harms_the_model_is_refused_by_tolerance(
    finished: dict[str, Any], scene: Scene, tmp_path: Path
) -> None:
    run, blobs = finished["run"], finished["run"].blobs
    published = run.marker("publish")
    weak, strong = 0.2, 0.4  # One is accepted, the other is worse than the shared FFN; what is looked for lies between.
    for _ in range(8):
        strength = (weak + strong) / 2
        model = load_dense(scene.model, blobs.path(published["shared"]["sha256"]), blobs.path(published["shared_ffn"]["sha256"]))
        model.load_state_dict(scene.own, strict=False)
        samplers = [SequenceSampler(TokenFile(blobs.path(file["train"]["sha256"])), 64, 7, 0) for file in published["partitions"]]
        sabotage(model, samplers.pop(0), samplers, steps=30, strength=strength)
        verdict = judged(run, {name: value.detach() for name, value in model.named_parameters()}, tmp_path)
        if verdict["effect"] and not verdict["accepted"]:
            break
        weak, strong = (strength, strong) if verdict["accepted"] else (weak, strength)
    (reason,) = verdict["reasons"]
    assert verdict["loss"] < verdict["shared_loss"] - run.config.assembly.margin  # The margin alone would let it in.
    worst = max(range(3), key=lambda partition: verdict["effect"][partition])
    assert verdict["effect"][worst] > run.config.assembly.tolerance
    assert reason.startswith(f"in the assembled model the loss on the validation documents of partition {worst} rises from ")
    assert reason.endswith("nats a token with it, and at most 0.02 more is tolerated")


def test_a_shard_is_measured_where_its_expert_is_asked_and_nowhere_else(
    finished: dict[str, Any], scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model = finished["run"], MixtureLM.load(finished["run"].model)
    noisy = scene.noise(scene.own, 0.05)
    ours = [noisy[name] for name in names.ffn_tensors(scene.model)]
    renamed = dict(zip(names.expert_tensors(scene.model, 0), ours, strict=True))
    save_file(renamed, tmp_path / "shard.safetensors")

    def expected() -> list[float]:
        sums: dict[int, Loss] = {}
        for partition, batch in slices._batches(run):
            sums[partition] = sums.get(partition, Loss()) + measure(model, batch)
        return [sums[partition].nats for partition in range(3)]

    measure_batch, calls = slices._measure, []

    def counted(model: MixtureLM, partition: int, batch: list[Any]) -> slices.Measured:
        calls.append(partition)
        return measure_batch(model, partition, batch)

    monkeypatch.setattr(slices, "_measure", counted)
    (run.reports / "slices.json").unlink(missing_ok=True)
    before, after = slices.mixture_losses(run, 0, tmp_path / "shard.safetensors")
    count = len(list(slices._batches(run)))
    asked = sum(0 in row["experts"] for row in read_json(run.reports / "slices.json")[0]["batches"])
    assert len(calls) == count + asked
    assert [loss.nats for loss in before] == pytest.approx(expected(), rel=1e-9)
    model.load_state_dict(renamed, strict=False, assign=True)
    assert [loss.nats for loss in after] == pytest.approx(expected(), rel=1e-9) and after != before
    calls.clear()
    assert slices.mixture_losses(run, 0, tmp_path / "shard.safetensors") == (before, after) and len(calls) == asked
    (run.reports / "slices.json").write_text("[{")  # A cache that cannot be read is measured anew.
    assert slices.mixture_losses(run, 0, tmp_path / "shard.safetensors") == (before, after)


def test_a_run_measured_on_less_text_judges_shards_as_before(finished: dict[str, Any], tmp_path: Path) -> None:
    run = RunDirectory(Path(shutil.copytree(finished["run"].root, tmp_path / "run")))
    shard = run.blobs.path(arrived(run.model)[0])
    expected = validate_shard(run, 0, shard)
    run = RunDirectory.open(run.root, run.config.model_copy(update={"evaluation": EvaluationConfig(tokens=300, samples=0)}))
    assert validate_shard(run, 0, shard) == expected
    withdraw(run, 1)
    row = evaluate_run(run, final=False, progress=lambda **_: None)
    assert read_json(run.reports / "evaluation.json")["rows"] == [row]  # Those on other text are no rivals.


def test_the_final_norm_is_rescaled_when_every_expert_is_there(finished: dict[str, Any], tmp_path: Path) -> None:
    run = RunDirectory(Path(shutil.copytree(finished["run"].root, tmp_path / "run")))
    tree = run.config.model_dump(mode="json")
    tree["assembly"]["calibrate_norms"] = True
    (run.root / "run.yaml").write_text(RunConfig.model_validate(tree).to_yaml())
    shard = run.blobs.path(arrived(run.model)[0])
    whole, _ = slices.mixture_losses(run, 0, shard)
    withdraw(run, 0)
    assert evaluate_run(run, final=True, progress=lambda **_: None)["calibration"] is None
    accept(run, 0, shard.name, {})
    shared = hash_file(run.model / SHARED_FILE)
    assert evaluate_run(run, final=True, progress=lambda **_: None)["calibration"]["kept"]
    assert hash_file(run.model / SHARED_FILE) != shared
    softened, _ = slices.mixture_losses(run, 0, shard)  # Not what was measured before it was rescaled.
    assert softened != whole


def test_a_missing_run_directory_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is not a run directory"):
        _ = RunDirectory(tmp_path / "none").config
