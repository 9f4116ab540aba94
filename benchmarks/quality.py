"""Is the assembled mixture better than what a person would train instead? Every row on the same text and tokens.

    python benchmarks/quality.py --data FILE.jsonl.gz --seeds 3 --scale small

Six tables. `rows`: every rival at one operating point. `properties`: what else a modular model must do there. `variants`:
one thing of that point changed at a time. `alone` and `together`: how much of the time to spend on the shared components,
against one machine, or five by DiLoCo, that train a dense model for all of it, and against a dense model of as many tokens;
`split`: which share of a given time is the best.
Killed and started again, it goes on where it was; its workspace keeps every model and every measured row, and
benchmarks/results/ what was found.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
import sys
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own directory is on the path, its package is not

from benchmarks.lab import tables  # noqa: E402
from benchmarks.lab.maturity import SHARES, measure_alone, measure_split, measure_together  # noqa: E402
from benchmarks.lab.phases import steps_of  # noqa: E402
from benchmarks.lab.properties import measure_properties  # noqa: E402
from benchmarks.lab.rows import ROWS, Point, result, wanted  # noqa: E402
from benchmarks.lab.setting import SCALES, Setting, prepare_data  # noqa: E402
from benchmarks.lab.variants import measure_variants  # noqa: E402
from forge.files import read_json, write_json  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TABLES = ("rows", "properties", "variants", "alone", "together", "split")
#: Training tokens per live parameter at which the curves are drawn.
MATURITIES = (3.0, 6.0, 12.0, 25.0, 50.0)


def main() -> int:
    """Run what is missing, seed by seed, and write the tables after every row."""
    options = _options()
    torch.set_num_threads(options.threads)
    for found in _measure(options):
        # Read again each time: another seed may be measured beside this one.
        results = [row for row in _known(options) if _key(row) != _key(found)] + [found]
        options.results.mkdir(parents=True, exist_ok=True)
        write_json(options.results / "quality.json", sorted(results, key=_key))
        (options.results / "quality.md").write_text(tables.markdown(results), encoding="utf-8")
        print(tables.line(found), flush=True)
    tables.plots(_known(options), options.results)
    return 0


def _measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        setting = Setting(options.work, SCALES[options.scale], experts=options.experts, seed=seed)
        prepare_data(setting, options.data, options.hold_out)
        facts = {"scale": options.scale, "experts": options.experts, "hold_out": options.hold_out}
        shared = steps_of(setting, options.maturity * setting.parameters)
        point = Point(setting, shared, round(shared * (1 - options.share) / options.share))
        if "rows" in options.tables:
            for name in [row for row in ROWS if wanted(row, options.only)]:
                yield {"table": "rows", "maturity": options.maturity, "share": options.share, **facts,
                       **result(name, point, ROWS[name])}  # fmt: skip
        if "variants" in options.tables:
            for found in measure_variants(point, options.only):
                yield {"table": "variants", "maturity": options.maturity, "share": options.share, **facts, **found}
        if "properties" in options.tables:
            for found in measure_properties(point, options.only):
                yield {"table": "properties", "maturity": options.maturity, "share": options.share, **facts, **found}
        for table, curves in (("alone", measure_alone), ("together", measure_together), ("split", measure_split)):
            for maturity in options.maturities if table in options.tables else []:
                for found in curves(setting, maturity, options.shares, options.only):
                    yield {"table": table, "maturity": maturity, **facts, **found}


def _known(options: argparse.Namespace) -> list[dict[str, Any]]:
    path = options.results / "quality.json"
    return list(read_json(path)) if path.is_file() else []


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in ("table", "scale", "experts", "maturity", "share", "row", "seed"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help='.jsonl or .jsonl.gz of {"domain", "text"}')
    parser.add_argument("--hold-out", default="brown", help="the domain that nobody trains on")
    parser.add_argument("--scale", choices=sorted(SCALES), default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--maturity", type=float, default=12.0, help="training tokens per live parameter at the split (rows)")
    parser.add_argument("--share", type=float, default=0.85, help="share of the time that the shared phase takes (rows)")
    parser.add_argument("--maturities", type=float, nargs="+", default=list(MATURITIES), help="of the curves")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="of the curves")
    parser.add_argument("--only", nargs="+", default=(), help="only rows whose name has one of these in it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="where models and rows are kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
