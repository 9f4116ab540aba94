from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel
import pytest

from forge.config import RunConfig, config_keys, load_config, packaged_configs, parse_config
from forge.errors import ConfigError


def test_the_packaged_configs_have_the_promised_sizes() -> None:
    assert packaged_configs() == ["billion", "default", "smoke"]
    default, billion = load_config("default").model, load_config("billion").model
    assert 50e6 < default.total_parameters < 60e6
    assert 8e6 < default.expert_parameters < 9e6
    assert default.ffn_width == 1408
    assert 1.0e9 < billion.total_parameters < 1.2e9


def test_the_default_is_the_documented_table() -> None:
    config = load_config("default")
    model = config.model
    assert (model.d_model, model.d_ff, model.n_layers, model.n_experts, model.top_k, model.vocab_size,
            model.max_seq_len, config.train.batch_size) == (512, 2048, 4, 5, 2, 16384, 512, 16)  # fmt: skip
    assert config.train.shared.learning_rate == config.train.expert.learning_rate == 1e-3


def test_the_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_config("smoke", ["train.expert.tokens=2e6", "data.source=some/file.txt"])
    assert config.train.expert.tokens == 2_000_000
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    again = load_config(str(path))
    assert again == config and again.fingerprint == config.fingerprint


def test_the_fingerprint_covers_what_decides_the_result_and_nothing_else() -> None:
    config = load_config("smoke")
    assert load_config("smoke", ["fleet.lease_seconds=7"]).fingerprint == config.fingerprint
    assert load_config("smoke", ["seed=1"]).fingerprint != config.fingerprint


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.expert.token=1", "unknown key 'train.expert.token'; did you mean 'train.expert.tokens'"),
        ("model.dmodel=1", "did you mean 'model.d_model'"),
        ("model.d_model=wide", "model.d_model = 'wide' is wrong"),
        ("model.d_model=1.5", "model.d_model = 1.5 is wrong"),
        ("model.top_k=9", "top_k (9) must not exceed n_experts"),
        ("model.head_dim=7", "head_dim (7) must be even"),
        ("model.context_channels=99", "must not exceed head_dim (32)"),
        ("model.n_kv_heads=1", "a key/value head of its own"),
        ("partition.method=labels", "needs data.label_field"),
        ("nonsense", "must look like section.key=value"),
        ("name.deeper=1", "which is a value and not a section"),
        ("name=../escape", "name = '../escape' is wrong"),
        ("seed=[", "is not valid YAML"),
        ("model=3", "model = 3 is wrong: it is a section, with keys of its own"),
        ("seed=1e20", "seed = 100000000000000000000 is wrong"),
        ("router.shrinkage=0", "router.shrinkage = 0 is wrong"),
    ],
)
def test_wrong_input_is_one_sentence(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("smoke", [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: [1\ntrain: 3")
    with pytest.raises(ConfigError, match=r"bad.yaml, line \d is not valid YAML"):
        load_config(str(bad))
    bad.write_text("- 1")
    with pytest.raises(ConfigError, match="must be a YAML mapping"):
        load_config(str(bad))
    with pytest.raises(ConfigError, match="no config file nowhere.yaml.*billion, default, smoke"):
        load_config(str(tmp_path / "nowhere.yaml").replace(str(tmp_path) + "/", ""))
    bad.write_text("model:\n  d_model: 64\nmodel:\n  d_ff: 64\n")
    with pytest.raises(ConfigError, match=r"bad.yaml, line 3 is not valid YAML: the key 'model' is there twice"):
        load_config(str(bad))
    bad.write_text("base: &base {d_model: 64}\nmodel: {<<: *base, d_model: 32}")
    with pytest.raises(ConfigError, match="unknown key 'base'"):  # A merge is no second time.
        load_config(str(bad))
    with pytest.raises(ConfigError, match="the key 'train' is missing"):
        parse_config({})
    with pytest.raises(ConfigError, match="unknown key 'trian'; did you mean 'train'"):
        parse_config({"trian": {"batch_size": 4}})


def test_every_field_is_documented() -> None:
    def walk(section: type[BaseModel]) -> None:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} has no docstring"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                walk(field.annotation)

    walk(RunConfig)
    assert "train.expert.init" in list(config_keys())


def test_a_phase_may_have_its_own_batches() -> None:
    config = load_config("smoke", ["train.batch_size=8", "train.expert.batch_size=2", "train.expert.tokens=1000"])
    assert (config.batch_size("shared"), config.batch_size("expert")) == (8, 2)
    assert config.step_tokens("expert") == 2 * 128 and config.steps("expert") == 4  # The last step is a whole one.
    assert config.steps("shared") == 600_000 // (8 * 128) + 1
