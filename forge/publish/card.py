"""The model card: what the model is, how it was trained and by whom, how good it is, how to load it.

Everything in it comes from the model directory and from facts that the run recorded. Names of nodes are strangers'
words, so they are escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import html
from pathlib import Path
import re
from typing import Any, Final

import yaml

from forge.checkpoint.assembly import credited
from forge.checkpoint.hf import CONFIG_FILE
from forge.evaluate.table import shares
from forge.files import RunDirectory, read_json
from forge.vocabulary import INDEX_FILE, MANIFEST_FILE

#: Sources that have another name on the Hub.
_HUB_DATASETS: Final = {"wikitext-103": "Salesforce/wikitext"}
#: Longest name of a node that is shown.
_NAME_LENGTH: Final = 40
#: Plots of a run that a card shows: file in `reports/` -> what it shows.
PLOTS: Final = {"perplexity.png": "Held-out perplexity against accepted experts", "loss.png": "Training losses",
                "router.png": "Weight of every expert on every partition"}  # fmt: skip
_ITEM_BYTES: Final = {"float32": 4, "bfloat16": 2}


def model_card(model_dir: Path, *, run: Mapping[str, Any], evaluation: Mapping[str, Any] | None,
               plots: Iterable[str] = ()) -> str:  # fmt: skip
    """README.md of a model, with metadata that the Hub accepts.

    Args:
        model_dir: the assembled model, with its config, index and manifest.
        run: facts of the run: `name`; and, as far as known, `config` (the resolved config as a tree), `maturity`
            (training tokens per non-embedding parameter) and `repo` (`USER/REPO`, for the lines that load it).
        evaluation: a row of `reports/evaluation.json`; None leaves out what it would tell.
        plots: names of pictures in the repository, of `PLOTS`.

    Raises:
        StorageError: the directory lacks a file of the model, or one is damaged.
    """
    config = read_json(model_dir / CONFIG_FILE)
    manifest = read_json(model_dir / MANIFEST_FILE)
    total_size = int(read_json(model_dir / INDEX_FILE)["metadata"]["total_size"])
    parameters = total_size // _ITEM_BYTES.get(config["dtype"], 4)
    name = str(run.get("name") or "modularforge")
    sections = [
        f"# {_plain(name)}",
        _what(config, manifest, parameters),
        _loading(str(run.get("repo") or "path/to/this/directory")),
        _training(run, manifest),
        *([_perplexities(evaluation)] if evaluation else []),
        *([f"![{PLOTS[name]}]({name})" for name in plots]),
        _contributors(credited(model_dir), (evaluation or {}).get("contributions")),
        _limits(config),
        _configuration(config, parameters),
    ]
    front = yaml.safe_dump(_front_matter(name, run, evaluation), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def run_facts(run: RunDirectory, repo: str) -> dict[str, Any]:
    """What a run directory knows for `model_card`: name, config, maturity, and the repo it is pushed to."""
    config = run.config
    return {"name": config.name, "config": config.model_dump(mode="json"), "repo": repo,
            "maturity": (run.marker("shared") or {}).get("maturity")}  # fmt: skip


def _front_matter(name: str, run: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    source = _source(run)
    front: dict[str, Any] = {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["modularforge", "mixtral", "mixture-of-experts", "collaborative-training"],
    }
    dataset = _hub_dataset(source)
    if dataset:
        front["datasets"] = [dataset]
    metrics = [
        {"type": "perplexity", "name": label, "value": float(evaluation[key])}
        for key, label in (("mean_perplexity", "Perplexity (mean over partitions)"),
                           ("pooled_perplexity", "Perplexity (pooled over tokens)"))
        if evaluation.get(key) is not None
    ] if evaluation else []  # fmt: skip
    if metrics:
        result = {
            "task": {"type": "text-generation", "name": "Text Generation"},
            "dataset": {"type": dataset or "custom", "name": source or "the run's corpus", "split": "test"},
            "metrics": metrics,
        }
        front["model-index"] = [{"name": name, "results": [result]}]
    return front


def _what(config: Mapping[str, Any], manifest: Mapping[str, Any], parameters: int) -> str:
    experts, arrived = config["num_local_experts"], len(_arrived(manifest))
    text = (
        f"A sparse mixture of {experts} experts with {parameters / 1e6:.1f}M parameters, each token sent to "
        f"{config['num_experts_per_tok']} of them, trained from scratch with ModularForge: shared components were "
        "trained once and frozen, every expert was trained alone on one partition of the corpus, by whoever had a "
        "machine to spare, and the experts were put together without another gradient step. It is a stock "
        "`MixtralForCausalLM` checkpoint and needs no custom code."
    )
    if arrived < experts:
        text += (f"\n\n**{arrived} of {experts} experts have arrived.** In place of each other one stands the FFN of "
                 "the shared components, so the model is complete and will get better.")  # fmt: skip
    return text


def _loading(where: str) -> str:
    return f"""## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{where}")
model = AutoModelForCausalLM.from_pretrained("{where}")
inputs = tokenizer("The history of", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

llama.cpp, by way of `pip install 'modularforge[gguf]'`, and vLLM:

```sh
hf download {where} --local-dir model
forge export model --gguf model.gguf --type f16
llama-cli -m model.gguf -p "The history of" -n 64 --no-conversation

vllm serve {where} --dtype float32
```"""


def _limits(config: Mapping[str, Any]) -> str:
    return f"""## Limits

- It continues text; it was not taught to answer, to follow instructions, or to refuse.
- It was trained from scratch on the corpus above and on nothing else: it knows little beside it, repeats what is wrong in it, and
  states what is false as fluently as what is true.
- It sees {config["max_position_embeddings"]:,} tokens at a time.
- Its weights are {config["dtype"]}, in which the figures above were measured; other types, 8-bit files among them, were not."""


def _training(run: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    lines: list[str] = []
    config = run.get("config") or {}
    if source := _source(run):
        lines.append(f"- Corpus: {_plain(source)}")
    train = config.get("train", {})
    for phase, what in (("shared", "Shared components"), ("expert", "Each expert")):
        if settings := train.get(phase):
            lines.append(f"- {what}: {settings['tokens']:,} tokens, {settings['optimizer']}, peak learning rate "
                         f"{settings['learning_rate']:g}")  # fmt: skip
    if run.get("maturity") is not None:
        lines.append(f"- Maturity of the shared components: {run['maturity']:.1f} training tokens per non-embedding "
                     "parameter")  # fmt: skip
    if config:
        lines.append(f"- Partitions: {config['partition']['method']}; router: {config['router']['method']}, fitted in "
                     "closed form on the frozen shared components")  # fmt: skip
    calibration = manifest.get("calibration")
    if calibration:
        lines.append(f"- Norms calibrated in closed form: validation loss {calibration['before']:.4f} before, "
                     f"{calibration['after']:.4f} after")  # fmt: skip
    lines.append(f"- Run `{manifest['run_id']}`, config `{manifest['config_fingerprint'][:12]}`")
    return "## How it was trained\n\n" + "\n".join(lines)


def _perplexities(evaluation: Mapping[str, Any]) -> str:
    rows = [
        [str(row["partition"]), _number(row.get("perplexity")), _number(row.get("bits_per_byte"), 3)]
        for row in evaluation.get("partitions", [])
    ]
    rows.append(["mean over partitions", _number(evaluation.get("mean_perplexity")), ""])
    rows.append(["all tokens pooled", _number(evaluation.get("pooled_perplexity")),
                 _number(evaluation.get("pooled_bits_per_byte"), 3)])  # fmt: skip
    if evaluation.get("shared_mean_perplexity") is not None:
        rows.append(["shared components alone (mean)", _number(evaluation["shared_mean_perplexity"]), ""])
    return "## Perplexity on held-out documents\n\n" + _table(["partition", "perplexity", "bits per byte"], rows)


def _contributors(names: Mapping[int, str], contributions: list[dict[str, Any]] | None) -> str:
    if not names:
        return "## Who contributed\n\nNo expert has arrived yet."
    rows = [[_plain(name), ", ".join(map(str, share.experts)), _number(share.nats, 4)]
            for name, share in shares(names, contributions)]  # fmt: skip
    if not contributions:
        return "## Who contributed\n\n" + _table(["node", "experts"], [row[:2] for row in rows])
    return ("## Who contributed\n\nA contribution is how much the held-out loss (nats a token, mean over partitions) rises when "
            "the FFN of the shared components stands in the place of an expert; a node's is the sum over its experts.\n\n"
            + _table(["node", "experts", "contribution"], rows))  # fmt: skip


def _configuration(config: Mapping[str, Any], parameters: int) -> str:
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "num_local_experts", "num_experts_per_tok", "vocab_size", "max_position_embeddings", "dtype")  # fmt: skip
    rows = [["parameters", f"{parameters:,}"], *([f"`{key}`", str(config[key])] for key in keys)]
    return "## Configuration\n\n" + _table(["", ""], rows)


def _arrived(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for row in manifest["experts"] if row["sha256"] is not None]


def _source(run: Mapping[str, Any]) -> str | None:
    source = (run.get("config") or {}).get("data", {}).get("source")
    return str(source) if source else None


def _hub_dataset(source: str | None) -> str | None:
    if source is None:
        return None
    if source.startswith("hf:"):
        return source.split(":")[1]
    return _HUB_DATASETS.get(source)


def _number(value: Any, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(text: str) -> str:
    """Text that Markdown and HTML show as it is: one line, printable, no markup."""
    line = "".join(character if character.isprintable() else " " for character in text)[:_NAME_LENGTH].strip()
    return re.sub(r"([\\`*_\[\]|!~$(){}:@])", r"\\\1", html.escape(line, quote=False)) or "unnamed"
