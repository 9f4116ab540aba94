"""The assembled model: lazy loading, routing, overrides, other types, and directories that are not models."""

from __future__ import annotations

from collections.abc import Callable
import json
from pathlib import Path
import subprocess
import sys
from typing import Any

import pytest
import torch

from forge.config import ModelConfig
from forge.errors import ConfigError, StorageError
from forge.model.moe import MixtureLM, Override, Routing, read_model_config
from forge.vocabulary import INDEX_FILE
from tests.model.conftest import TINY, write_mixture

TOKENS = torch.randint(1, TINY.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))


def test_the_config_survives_the_journey_through_hugging_face(mixture: Callable[..., Path]) -> None:
    config = TINY.model_copy(update={"n_kv_heads": 2, "tie_embeddings": False, "rope_theta": 5e5, "head_dim": 32})
    # Whether a head is a context head is in its weights alone.
    assert read_model_config(mixture(config)) == config.model_copy(update={"context_channels": 0})


@torch.inference_mode()
def test_routing_is_reported_for_every_layer(mixture: Callable[..., Path]) -> None:
    model = MixtureLM.load(mixture())
    routing: list[Routing] = []
    model(TOKENS, routing=routing)
    assert len(routing) == TINY.n_layers
    for probabilities_NE, experts_NK, weights_NK in routing:
        assert probabilities_NE.shape == (80, 4) and experts_NK.shape == weights_NK.shape == (80, 2)
        torch.testing.assert_close(probabilities_NE.sum(dim=1), torch.ones(80))
        torch.testing.assert_close(weights_NK.sum(dim=1), torch.ones(80))
        assert torch.equal(experts_NK[:, 0], probabilities_NE.argmax(dim=1))


@torch.inference_mode()
def test_overrides_do_what_they_say(mixture: Callable[..., Path]) -> None:
    model = MixtureLM.load(mixture())
    moe: Any = model.model.layers[0]
    moe = moe.block_sparse_moe
    x_BTD = torch.randn(1, 6, TINY.d_model)
    outputs = [expert(x_BTD) for expert in moe.experts]
    torch.testing.assert_close(moe(x_BTD, Override(gate="uniform")), sum(outputs) / 4)
    torch.testing.assert_close(moe(x_BTD, Override(only_expert=2)), outputs[2])
    routing: list[Routing] = []
    mixed = moe(x_BTD, Override(), routing)
    _, experts_NK, weights_NK = routing[0]
    for row in range(6):
        expected = sum(weights_NK[row, slot] * outputs[experts_NK[row, slot]][0, row] for slot in range(2))
        torch.testing.assert_close(mixed[0, row], expected)


def test_experts_that_no_token_reaches_are_not_computed(mixture: Callable[..., Path]) -> None:
    model = MixtureLM.load(mixture(TINY.model_copy(update={"n_experts": 6, "top_k": 1})))
    computed: list[int] = []
    layer: Any = model.model.layers[0]
    for index, expert in enumerate(layer.block_sparse_moe.experts):
        expert.register_forward_hook(lambda *_, index=index: computed.append(index))
    routing: list[Routing] = []
    with torch.inference_mode():
        model(TOKENS[:1, :3], routing=routing)
    assert sorted(computed) == sorted(set(routing[0].experts_NK.flatten().tolist()))


@torch.inference_mode()
def test_bfloat16_files_are_computed_in_float32(tmp_path: Path) -> None:
    model = MixtureLM.load(write_mixture(tmp_path, TINY.model_copy(update={"dtype": "bfloat16"})))
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert all((kind == torch.bfloat16) == (".experts." in name) for name, kind in types.items())
    hidden = model(TOKENS)
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(hidden, model.float()(TOKENS))


def test_loading_reads_headers_and_not_experts(tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=384, d_model=512, d_ff=3072, n_layers=2, n_heads=4, n_experts=8, top_k=1)
    write_mixture(tmp_path, config)  # experts of 25 MB, 201 MB in all
    script = (
        "import sys, torch, psutil; from pathlib import Path; from forge.model.moe import MixtureLM\n"
        "process = psutil.Process(); before = process.memory_info().rss\n"
        "model = MixtureLM.load(Path(sys.argv[1])); loaded = process.memory_info().rss\n"
        "with torch.inference_mode(): model(torch.ones(1, 1, dtype=torch.long))\n"
        "print(loaded - before, process.memory_info().rss - before)"
    )
    out = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True).stdout
    loaded, used = map(int, out.split())
    assert loaded < 20e6
    assert used < 110e6  # one expert in each of two layers, not eight


def test_a_directory_that_is_not_a_model_is_one_sentence(mixture: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is not a model directory"):
        MixtureLM.load(tmp_path / "nowhere")
    directory = mixture()
    index = json.loads((directory / INDEX_FILE).read_text())
    outside = {**index["weight_map"], "model.norm.weight": "../../etc/passwd"}
    for text, sentence in (
        (json.dumps({"weight_map": outside}), "outside its directory"),
        (json.dumps({"weight_map": {}}), "does not name every tensor"),
        ("{", "is damaged"),
    ):
        (directory / INDEX_FILE).write_text(text)
        with pytest.raises(StorageError, match=sentence):
            MixtureLM.load(directory)
    (directory / INDEX_FILE).unlink()
    with pytest.raises(StorageError, match="is not a whole model"):
        MixtureLM.load(directory)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "llama"}, "does not describe a Mixtral"),
        ({"hidden_act": "gelu"}, "asks for hidden_act = 'gelu'"),
        ({"sliding_window": 4096}, "asks for sliding_window = 4096"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "asks for rope_type = 'yarn'"),
        ({"head_dim": 31}, r"head_dim \(31\) must be even"),
        ({"num_local_experts": 1}, "top_k"),
        ({"hidden_size": None}, "cannot be loaded here"),
    ],
)
def test_a_model_of_another_kind_is_one_sentence(
    change: dict[str, Any], sentence: str, mixture: Callable[..., Path]
) -> None:
    path = mixture() / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=sentence) as caught:
        MixtureLM.load(path.parent)
    assert str(caught.value).count("\n") == 0
