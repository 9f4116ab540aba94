"""The laboratory of the quality benchmark: its rivals against hand calculations, and a whole small benchmark, twice."""

from __future__ import annotations

import json
from pathlib import Path
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
import torch

from benchmarks.lab import mixtures, properties, rivals
from benchmarks.lab.phases import MixedSampler, dense_model, state_of
from benchmarks.lab.setting import SCALES, Setting
from forge.config import parse_config
from forge.data.packing import SequenceSampler
from forge.data.sources import documents
from forge.model.moe import Routing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path, SCALES["tiny"], experts=3)


def test_copies_of_the_shared_ffn_are_the_shared_model_under_any_gate(setting: Setting) -> None:
    base = dense_model(setting).eval().requires_grad_(False)
    ffn = {name: weight for name, weight in state_of(base).items() if ".mlp." in name}
    tokens = torch.randint(0, setting.scale.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    rows = [torch.randn(3, base.config.d_model, generator=torch.Generator().manual_seed(layer)) for layer in range(2)]
    for gate in (mixtures.top_k_gate(rows, 2), mixtures.top_k_gate(rows, 1), mixtures.constant_gate([0.2, 0.3, 0.5])):
        torch.testing.assert_close(mixtures.GatedMixture(base, [ffn] * 3, gate)(tokens), base(tokens), rtol=0, atol=1e-6)


def test_top_k_gate_is_mixtrals() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    probabilities = logits.softmax(-1)[0]
    kept = probabilities[[1, 2]] / probabilities[[1, 2]].sum()
    assert torch.allclose(mixtures.keep_top(logits, 2), torch.tensor([[0.0, float(kept[0]), float(kept[1])]]))


def test_ties_keeps_the_large_changes_that_agree_on_a_sign() -> None:
    shared = {"w": torch.zeros(1, 10)}
    first = {"w": torch.tensor([[5.0, -4.0, 0.1, 0, 0, 0, 0, 0, 0, 0]])}
    second = {"w": torch.tensor([[-1.0, -2.0, 0.0, 0, 0, 0, 0, 0, 0, 0]])}
    merged = rivals.ties(shared, [first, second])["w"][0]
    assert merged[:3].tolist() == [5.0, -3.0, 0.0]


def test_average_is_the_mean_of_the_experts_beside_the_shared_weights() -> None:
    merged = rivals.average({"a": torch.ones(2), "w": torch.zeros(2)}, [{"w": torch.ones(2)}, {"w": torch.full((2,), 3.0)}])
    assert merged["a"].tolist() == [1.0, 1.0] and merged["w"].tolist() == [2.0, 2.0]


def test_the_posterior_ensemble_is_bayes_rule_on_the_prefix() -> None:
    rng = np.random.default_rng(0)
    p_ET = rng.uniform(0.1, 0.9, (3, 5))
    prior = np.array([0.5, 0.3, 0.2])
    expected, weights = 0.0, prior.copy()
    for t in range(5):
        expected -= np.log((weights / weights.sum()) @ p_ET[:, t])
        weights = weights * p_ET[:, t]
    loss = rivals.ensemble_loss([[np.log(row)] for row in p_ET], np.log(prior), 3, [10])
    assert loss.nats == pytest.approx(expected) and loss.tokens == 5 and loss.bytes == 10
    best = rivals.ensemble_loss([[np.log(row)] for row in p_ET], np.log(prior), 1, [10])
    chosen = [int(np.argmax(np.log(prior) + np.log(p_ET[:, :t]).sum(axis=1))) for t in range(5)]
    assert best.nats == pytest.approx(-sum(np.log(p_ET[k, t]) for t, k in enumerate(chosen)))


def test_an_ensemble_under_a_gate_mixes_probabilities_at_every_position() -> None:
    p_ET, weights_ET = np.array([[0.5, 0.1], [0.25, 0.3]]), np.array([[1.0, 0.25], [0.0, 0.75]])
    loss = rivals.weighted_loss([[np.log(row)] for row in p_ET], [weights_ET], [7])
    assert loss.nats == pytest.approx(-np.log(0.5) - np.log(0.25 * 0.1 + 0.75 * 0.3)) and (loss.tokens, loss.bytes) == (2, 7)


def test_the_gate_of_an_ensemble_is_that_of_the_mixtures_first_layer(setting: Setting) -> None:
    base = dense_model(setting).eval().requires_grad_(False)
    ffn = {name: weight for name, weight in state_of(base).items() if ".mlp." in name}
    rows = torch.randn(3, base.config.d_model, generator=torch.Generator().manual_seed(1))
    window = np.random.default_rng(0).integers(0, setting.scale.vocab_size, 20)
    inputs: list[torch.Tensor] = []
    mixtures.GatedMixture(base, [ffn] * 3, mixtures.top_k_gate([rows] * 2, 2))(torch.from_numpy(window[None, :-1]), inputs)
    (found_ET,) = rivals.gate_weights(base, rows, [window], 2)
    expected_TE = mixtures.keep_top(inputs[0][0] @ rows.T, 2)
    np.testing.assert_allclose(found_ET, expected_TE.T, rtol=0, atol=1e-6)
    assert (found_ET > 0).sum(axis=0).tolist() == [2] * 19


def test_the_document_router_decides_after_the_prefix() -> None:
    good, bad = np.full(40, np.log(0.5)), np.full(40, np.log(0.1))
    plain = np.full(40, np.log(0.2))
    loss = rivals.document_router_loss([[bad], [good]], [plain], [1])
    assert loss.nats == pytest.approx(-32 * np.log(0.2) - 8 * np.log(0.5))


def test_the_balance_loss_is_one_when_all_experts_are_used_alike() -> None:
    even = Routing(torch.full((4, 2), 0.5), torch.tensor([[0], [1], [0], [1]]), torch.ones(4, 1))
    one = Routing(torch.tensor([[1.0, 0.0]] * 4), torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1))
    assert float(rivals.balance_loss(even)) == pytest.approx(1.0)
    assert float(rivals.balance_loss(one)) == pytest.approx(2.0)


def _corpus(path: Path) -> None:
    """Three domains from the standard library: modules, by the first letter of their name."""
    config = parse_config({"data": {"source": "python-stdlib", "max_bytes": 1_500_000},
                           "train": {"shared": {"tokens": 1}, "expert": {"tokens": 1}}})  # fmt: skip
    with open(path, "w", encoding="utf-8") as file:
        for number, document in enumerate(documents(config.data)):
            file.write(json.dumps({"domain": f"third-{number % 3}", "text": document.text[:4000]}) + "\n")


@pytest.mark.slow
def test_a_small_benchmark_measures_its_rows_once(tmp_path: Path) -> None:
    _corpus(tmp_path / "text.jsonl")
    command = [sys.executable, str(ROOT / "benchmarks" / "quality.py"), "--data", str(tmp_path / "text.jsonl"), "--hold-out",
               "third-2", "--scale", "tiny", "--experts", "2", "--seeds", "1", "--maturity", "2", "--share", "0.6",
               "--maturities", "2", "--shares", "0.6", "--tables", "rows", "properties", "alone",
               "together", "split", "--threads", "1", "--work", str(tmp_path / "work"),
               "--results", str(tmp_path / "results")]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads((tmp_path / "results" / "quality.json").read_text())
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout == first.stdout
    assert json.loads((tmp_path / "results" / "quality.json").read_text()) == rows
    losses = {row["row"]: row["mean"] for row in rows if "mean" in row}
    assert losses["oracle: the partition's expert"] < losses["shared components alone"]
    assert losses["ours (ridge), top-2"] < losses["random router, top-2"]
    assert {row["table"] for row in rows} == {"rows", "properties", "alone", "together", "split"}
    assert all(set(row) >= {"row", "seed", "loss", "mean", "pooled", "ood", "tokens", "flops"} for row in rows
               if row["table"] != "properties")  # fmt: skip
    values = {row["row"]: row["values"] for row in rows if row["table"] == "properties"}
    assert values["arrivals"]["2 experts: mean loss over the orders"] < values["arrivals"]["0 experts: mean loss over the orders"]
    for how in ("shared FFN in its place", "with its counts"):
        assert values["removing an expert"][f"{how}: its own partition loses, mean"] > 0
    page = (tmp_path / "results" / "quality.md").read_text()
    assert page.count("| ours (ridge), top-2 | 1 |") == 1 and page.count("by the share of a given T") == 1
    assert (tmp_path / "results" / "maturity-tiny.png").stat().st_size > 10_000

    subprocess.run([*command[: command.index("--tables")], "--tables", "variants", "--only", "AdamW", "under their gate",
                    "random weights", *command[command.index("--threads") :]], check=True)  # fmt: skip
    found = {row["row"]: row["mean"] for row in json.loads((tmp_path / "results" / "quality.json").read_text())
             if row["table"] == "variants"}  # fmt: skip
    assert len(found) == 3 and len(set(found.values())) == 3, "every variant changes the result"


class Numbered(SequenceSampler):
    """Windows that all hold one number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def batch(self, step: int, batch_size: int) -> npt.NDArray[np.int64]:
        return np.full((batch_size, 3), self.number)


def test_a_share_of_less_than_a_window_comes_in_every_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = MixedSampler.__new__(MixedSampler)
    mixed._other, mixed._share = Numbered(1), 1 / 8
    monkeypatch.setattr(SequenceSampler, "batch", Numbered(0).batch)
    assert [int(mixed.batch(step, 4)[:, 0].sum()) for step in range(8)] == [0, 1] * 4
    mixed._share = 3 / 8
    assert [int(mixed.batch(step, 4)[:, 0].sum()) for step in range(4)] == [1, 2, 1, 2]


def test_distinct_pairs_and_repetition() -> None:
    assert properties.distinct_2([[1, 2, 1, 2], [3, 4]]) == pytest.approx(3 / 4)
    assert properties.repetition([[1, 2, 3, 4, 5, 6]]) == 0
    assert properties.repetition([[1, 1, 1, 1, 1, 1]]) == pytest.approx(2 / 3)
