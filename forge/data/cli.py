"""`forge data`: look at text before training on it."""

from __future__ import annotations

import json
from pathlib import Path
import sys
import time

import click

from forge.errors import StorageError, report_errors


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def data() -> None:
    """Look at text before training on it."""


@data.command()
@click.argument("source")
@click.option("--partitions", default=5, show_default=True, type=click.IntRange(1, 256), help="Clusters to describe.")
@click.option("--sample", default=2000, show_default=True, type=click.IntRange(10, 20_000),
              help="Documents that are looked at closely; all of them are counted.")  # fmt: skip
@click.option("--max-bytes", default=None, metavar="SIZE", help="Stop reading after so much text, such as 100M.")
@click.option("--text-field", default="text", show_default=True, help="Column of .jsonl and .parquet files with the text.")
@click.option("--run", "run_dir", metavar="RUN_DIR", type=click.Path(path_type=Path),
              help="Count tokens with the tokenizer of this run; default one learned from the sample.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@report_errors()
def inspect(source: str, partitions: int, sample: int, max_bytes: str | None, text_field: str, run_dir: Path | None,
            as_json: bool) -> None:  # fmt: skip
    """Say what SOURCE holds, what its partitions would be about, and what is wrong with it.

    SOURCE is what `data.source` takes: python-stdlib, wikitext-103, hf:NAME, or a directory, file or glob of .txt, .jsonl and
    .parquet, each also .gz or .zst. A run clusters by the shared components' view of the text, so its partitions will be
    similar to these and not the same.
    """
    from forge.config import DataConfig
    from forge.data.survey import lines, survey
    from forge.data.tokenizer import TOKENIZER_FILE, load_tokenizer
    from forge.files import RunDirectory
    from forge.train.memory import parse_size

    config = DataConfig(source=source, text_field=text_field, max_bytes=parse_size(max_bytes) if max_bytes else None)
    tokenizer = None
    if run_dir is not None:
        run = RunDirectory(run_dir)
        if run.config and not (run.data / TOKENIZER_FILE).is_file():
            raise StorageError(f"The run in {run_dir} has no tokenizer yet: run `forge prepare` on it first.")
        tokenizer = load_tokenizer(run.data / TOKENIZER_FILE)
    told = time.monotonic()

    def progress(count: int) -> None:
        nonlocal told
        if time.monotonic() - told >= 3 and sys.stderr.isatty():
            told = time.monotonic()
            click.echo(f"  {count:,} documents read", err=True)

    found = survey(config, partitions=partitions, sample=sample, tokenizer=tokenizer, progress=progress)
    click.echo(json.dumps(found, indent=2, ensure_ascii=False) if as_json else "\n".join(lines(found)))
