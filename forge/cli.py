"""The `forge` command: the whole pipeline on one machine, on a config or on a model directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
import json
from pathlib import Path
import sys
from typing import TYPE_CHECKING, Any

import click

from forge.data.cli import data
from forge.devices import DEVICES, find_device
from forge.errors import INTERRUPTED, ConfigError, ProvenanceError, StorageError, report_errors
from forge.system import total_memory, wait_asleep
from forge.terminal import Printer, print_evaluation
from forge.tracking import track_evaluations, track_option, track_progress, tracking
from forge.vocabulary import INDEX_FILE, SINGLE_FILE

if TYPE_CHECKING:
    from forge.config import RunConfig
    from forge.live import LogFormat


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="modularforge")
def main() -> None:
    """Train a mixture of experts from scratch, one expert in memory at a time.

    CONFIG is a YAML file or the name of a packaged one: smoke, default (where none is given) or billion.
    """
    wait_asleep()


main.add_command(data)


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    options = [
        click.argument("config", default="default"),
        click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]..."),
        click.option("--run-dir", type=click.Path(path_type=Path), help="Directory of the run; default runs/NAME."),
        click.option("--ram", default=None, metavar="SIZE", help="Memory that a stage may use; default all there is."),
        click.option("--threads", type=click.IntRange(1), default=None,
                     help="Threads; default OMP_NUM_THREADS, else the physical cores."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


_device_option = click.option("--device", default="auto", type=click.Choice(DEVICES), show_default=True,
                              help="Where experts train.")  # fmt: skip


@main.command("config")
@click.argument("config", default="default")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@report_errors()
def show_config(config: str, overrides: tuple[str, ...]) -> None:
    """Print the resolved config. With it its parameters, the memory of each stage and its fingerprint."""
    from forge.config import load_config
    from forge.train.memory import STAGES, candidates, format_size

    resolved = load_config(config, overrides)
    model = resolved.model
    click.echo(resolved.to_yaml())
    rows = [("embedding", model.embedding_parameters), ("attention", model.attention_parameters),
            ("norms", model.norm_parameters), ("router", model.router_parameters),
            ("one expert", model.expert_parameters), (f"{model.n_experts} experts", model.n_experts * model.expert_parameters),
            ("total", model.total_parameters)]  # fmt: skip
    click.echo("parameters")
    for name, count in rows:
        click.echo(f"  {name:12} {count:>15,}")
    click.echo("memory, predicted peak of the smallest plan")
    for stage in STAGES:
        click.echo(f"  {stage:12} {format_size(min(p.peak_bytes for p in candidates(resolved, stage))):>15}")
    click.echo(f"fingerprint    {resolved.fingerprint}")


@main.command("plan")
@click.argument("config", default="default")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--ram", default=None, metavar="SIZE", help="Memory that a process may use; default all there is.")
@click.option("--nodes", type=click.IntRange(1), help="Machines like this one that will train experts; default one an expert.")
@report_errors()
def show_plan(config: str, overrides: tuple[str, ...], ram: str | None, nodes: int | None) -> None:
    """Print how a run would go within --ram. Every process's memory, the speed of training, and whether time is well split."""
    from forge.config import load_config
    from forge.train.memory import parse_size

    resolved = load_config(config, overrides)
    ram_bytes = parse_size(ram) if ram is not None else total_memory()
    from forge.planning import plan_lines  # Imports torch: after everything that a mistyped command stops at.
    from forge.train.speed import multiplication_rate

    for line in plan_lines(resolved, ram_bytes, multiplication_rate(), nodes):
        click.echo(line)


@main.command()
@_run_options
@_device_option
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", help="json prints an object a line.")
@track_option
@report_errors()
def run(config: str, overrides: tuple[str, ...], run_dir: Path | None, ram: str | None, threads: int | None,
        device: str, log_format: LogFormat, track: str | None) -> None:  # fmt: skip
    """Do everything here: prepare, train, assemble, evaluate."""
    from forge import pipeline

    with _begun(config, overrides, run_dir, ram, device) as (resolved, root, ram_bytes):
        with (Printer(log_format, ram_bytes=None if ram is None else ram_bytes) as printer,
              nullcontext() if track is None else tracking(track, root) as tracker):  # fmt: skip

            def on_event(event: dict[str, Any]) -> None:
                printer(event)
                if tracker is not None:
                    track_progress(tracker, event)

            pipeline.run_all(root, resolved, ram_bytes=ram_bytes, threads=_threads(threads), device=device, on_event=on_event)
            if tracker is not None:
                track_evaluations(tracker, json.loads((root / "reports" / "evaluation.json").read_text())["rows"])
        if log_format == "json":
            return printer.out.record("done", model=str(root / "model"))
        print_evaluation(root)
        click.echo(f"model: {root / 'model'}")


@main.command()
@_run_options
@report_errors()
def prepare(config: str, overrides: tuple[str, ...], run_dir: Path | None, ram: str | None,
            threads: int | None) -> None:  # fmt: skip
    """Read the corpus, train the tokenizer and write the token files."""
    from forge import pipeline

    with _begun(config, overrides, run_dir, ram) as (resolved, root, ram_bytes):
        with Printer(ram_bytes=None if ram is None else ram_bytes) as printer:
            pipeline.prepare_run(root, resolved, ("prepare",), ram_bytes=ram_bytes, threads=_threads(threads),
                                 on_event=printer)  # fmt: skip
        facts = json.loads((root / "stages" / "prepare.json").read_text())
        click.echo(f"prepared {facts['documents']:,} documents, {facts['tokens']:,} tokens in {root}")


@main.command()
@_run_options
@_device_option
@click.option("--partition", type=click.IntRange(0), default=None, help="Train only the expert of this partition.")
@report_errors()
def train(config: str, overrides: tuple[str, ...], run_dir: Path | None, ram: str | None, threads: int | None,
          device: str, partition: int | None) -> None:  # fmt: skip
    """Train the shared components, the router and the missing experts."""
    from forge import pipeline
    from forge.checkpoint.assembly import arrived, start
    from forge.vocabulary import STAGES

    with _begun(config, overrides, run_dir, ram, device) as (resolved, root, ram_bytes):
        if partition is not None and partition >= resolved.model.n_experts:
            raise click.BadParameter(f"the run has partitions 0 to {resolved.model.n_experts - 1}", param_hint="--partition")
        with Printer(ram_bytes=None if ram is None else ram_bytes) as printer:
            opened = pipeline.prepare_run(root, resolved, STAGES, ram_bytes=ram_bytes, threads=_threads(threads),
                                          on_event=printer)  # fmt: skip
            start(opened)
            wanted = range(resolved.model.n_experts) if partition is None else [partition]
            for index in wanted:
                if index not in arrived(opened.model):
                    pipeline.train_and_accept(opened, index, ram_bytes=ram_bytes, threads=_threads(threads), device=device,
                                              on_event=printer)  # fmt: skip
        click.echo(f"{len(arrived(opened.model))} of {resolved.model.n_experts} experts are in {root / 'model'}")


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@report_errors()
def assemble(run_dir: Path) -> None:
    """Put the shards that a run directory holds into its model."""
    from forge.checkpoint.assembly import arrived, start
    from forge.files import RunDirectory, claimed

    opened = RunDirectory(run_dir)
    n_experts = opened.config.model.n_experts
    if opened.marker("publish") is None:
        raise StorageError(f"The run in {run_dir} has no frozen shared components yet: run `forge train` on it first.")
    with claimed(run_dir):
        start(opened)
    click.echo(f"{len(arrived(opened.model))} of {n_experts} experts are in {opened.model}; the others are the shared FFN")


@main.command()
@click.argument("target", metavar="MODEL_DIR|RUN_DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@report_errors()
def verify(target: Path, as_json: bool) -> None:
    """Check every hash and signature of a model. Print its lineage, from its data set to the last expert."""
    from forge.checkpoint import verify as verification

    found = verification.verify(target)
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else "\n".join(verification.lines(found)))
    for problem in found.problems:
        click.echo(f"error: {problem}", err=True)
    if found.problems:
        sys.exit(ProvenanceError.exit_code)


@main.command()
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--data", default=None, metavar="SOURCE", help="Text to measure the model on: any source of `data.source`.")
@click.option("--contributions", is_flag=True, help="Measure only what each expert of a run contributes, and who it is from.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@report_errors()
def evaluate(target: Path, data: str | None, contributions: bool, as_json: bool) -> None:
    """Measure a run on its held-out documents, or a model on --data."""
    if data is not None and contributions:
        raise ConfigError("--contributions measures a run on its own held-out documents: leave --data out.")
    if data is None:
        from forge import pipeline
        from forge.files import RunDirectory, claimed

        if not (target / "run.yaml").is_file():
            raise StorageError(f"{target} is not a run directory: give one, or a model directory with --data SOURCE.")
        if RunDirectory(target).marker("publish") is None:
            raise StorageError(f"The run in {target} has no assembled model yet: run `forge train` on it first.")
        if contributions:
            from forge.checkpoint.assembly import credited
            from forge.evaluate.table import contribution_lines

            with Printer() as printer:
                rows = pipeline.call("contributions", {"run_dir": str(target)}, printer)["contributions"]
            click.echo(json.dumps(rows, indent=2) if as_json else
                       "\n".join(contribution_lines(rows, credited(target / "model"))))  # fmt: skip
            return
        with claimed(target), Printer() as printer:
            row = pipeline.call("evaluate", {"run_dir": str(target), "final": True}, printer)
        if as_json:
            click.echo(json.dumps(row, indent=2))
        else:
            print_evaluation(target)
        return
    from forge.config import DataConfig
    from forge.data.sources import documents
    from forge.evaluate.text import evaluate_text

    result = evaluate_text(_model_of(target), (document.text for document in documents(DataConfig(source=data))))
    click.echo(json.dumps(result, indent=2) if as_json else
               f"{result['documents']:,} documents, {result['tokens']:,} tokens: loss {result['loss']:.4f} nats a token, "
               f"perplexity {result['perplexity']:.2f}, {result['bits_per_byte']:.4f} bits per byte")  # fmt: skip


def _sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    options = [
        click.argument("model", type=click.Path(path_type=Path)),
        click.option("--max-tokens", default=None, type=click.IntRange(1), show_default="128, or as many as fit",
                     help="Tokens to write at most."),
        click.option("--temperature", default=0.8, show_default=True, type=click.FloatRange(0),
                     help="How bold to choose; 0 takes the most likely token each time."),
        click.option("--top-p", default=None, type=click.FloatRange(0, 1, min_open=True),
                     help="Choose among the likeliest tokens that reach this probability together."),
        click.option("--top-k", default=None, type=click.IntRange(1), help="Choose among so many of the likeliest tokens."),
        click.option("--repetition-penalty", default=1.0, show_default=True, type=click.FloatRange(0, min_open=True),
                     help="Above 1, what is in the text already becomes less likely."),
        click.option("--seed", default=0, show_default=True, help="The same seed gives the same text."),
        click.option("--show-experts", is_flag=True, help="Show which expert spoke each token."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--output", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
              help="HTML file to write; default report.html beside the run's other reports.")  # fmt: skip
@report_errors()
def report(run_dir: Path, output: Path | None) -> None:
    """Write the story of a run as one HTML file, to send to someone."""
    if not (run_dir / "run.yaml").is_file():
        raise StorageError(f"{run_dir} is not a run directory: it has no run.yaml.")
    from forge.files import RunDirectory
    from forge.report import write_report

    run = RunDirectory(run_dir)
    target = output or run.reports / "report.html"
    click.echo(f"{target} ({write_report(run, target) / 1000:,.0f} kB); the plots in it are in {run.reports}")


@main.command()
@_sampling_options
@click.argument("prompt", default="")
@report_errors()
def generate(model: Path, prompt: str, show_experts: bool, **sampling: Any) -> None:
    """Continue PROMPT with a model. MODEL is the directory of a model or of a run; - reads the prompt from stdin."""
    directory = _model_of(model)
    if prompt == "-":
        prompt = sys.stdin.read()
    from forge.chat import Voice, telling_words
    from forge.evaluate.generate import Sampling, stream
    from forge.evaluate.text import read_tokenizer
    from forge.model.moe import MixtureLM

    tokenizer, loaded = read_tokenizer(directory), MixtureLM.load(directory)
    pieces = stream(loaded, tokenizer, prompt, Sampling(**sampling))
    try:
        Voice(show_experts, telling_words(directory)).speak(pieces, after=prompt)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@main.command()
@_sampling_options
@report_errors()
def chat(model: Path, show_experts: bool, **sampling: Any) -> None:
    """Write a text in turns with a model. MODEL is the directory of a model or of a run; it continues what you type."""
    directory = _model_of(model)
    from forge.chat import Chat, Voice, telling_words
    from forge.evaluate.generate import Sampling
    from forge.evaluate.text import read_tokenizer
    from forge.model.moe import MixtureLM

    voice = Voice(show_experts, telling_words(directory))
    Chat(MixtureLM.load(directory), read_tokenizer(directory), Sampling(**sampling), voice).run()


@main.command()
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option("--gguf", "target", required=True, metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
              help="GGUF file to write, for llama.cpp.")  # fmt: skip
@click.option("--type", "kind", default="f16", show_default=True, type=click.Choice(["f32", "f16", "q8_0"]),
              help="Type of the weights.")  # fmt: skip
@report_errors()
def export(model_dir: Path, target: Path, kind: Any) -> None:
    """Write a model as one GGUF file. An Ollama Modelfile goes beside it."""
    model_dir = _model_of(model_dir)
    from forge.publish.gguf import export_gguf
    from forge.train.memory import format_size

    size = export_gguf(model_dir, target, kind)
    click.echo(f"{target} ({format_size(size)}) and {target.with_name('Modelfile')} beside it")


@main.command()
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.argument("repo", metavar="USER/REPO")
@click.option("--private", is_flag=True, help="Create the repository private.")
@report_errors()
def push(model_dir: Path, repo: str, private: bool) -> None:
    """Push a model to the Hugging Face Hub. The repository holds a loadable model at every commit."""
    from forge.publish.publication import check_repository, publish

    model_dir = _model_of(model_dir, INDEX_FILE)
    check_repository(repo)
    click.echo(publish(model_dir, repo, private=private))


@contextmanager
def _begun(config: str, overrides: tuple[str, ...], run_dir: Path | None, ram: str | None,
           device: str = "auto") -> Iterator[tuple[RunConfig, Path, int]]:  # fmt: skip
    """The config, run directory and bytes of memory of a command that works in the directory, alone while this lasts."""
    from forge.config import load_config
    from forge.files import claimed
    from forge.pipeline import check_budget
    from forge.train.memory import parse_size

    resolved = load_config(config, overrides)
    find_device(device)
    ram_bytes = parse_size(ram) if ram is not None else total_memory()
    check_budget(resolved, ram_bytes)
    root = run_dir or Path("runs") / resolved.name
    with claimed(root):
        yield resolved, root, ram_bytes


def _model_of(path: Path, *files: str) -> Path:
    """The model directory that a path means: itself, or the one of a run directory. It has one of the files."""
    if (path / "run.yaml").is_file() and not (path / "model" / INDEX_FILE).is_file():
        raise StorageError(f"The run in {path} has no assembled model yet: it has one as soon as it is published.")
    model = path / "model" if (path / "model" / INDEX_FILE).is_file() else path
    files = files or (INDEX_FILE, SINGLE_FILE)
    if not path.exists():
        raise StorageError(f"There is no {path}: give a model directory or a run directory.")
    if not any((model / name).is_file() for name in files):
        raise StorageError(f"{path} is not a model directory: it has no {' and no '.join(files)}; give one, or a run directory.")
    return model


def _threads(threads: int | None) -> int:
    from forge.system import default_threads

    return threads or default_threads()


if __name__ == "__main__":
    main()
