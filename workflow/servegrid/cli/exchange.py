"""`servegrid export` and `servegrid import`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from servegrid.cli.arguments import positive_int
from servegrid.errors import ExchangeError
from servegrid.study.text import pluralize

FORMATS = ("llm-d", "vllm-bench")


def add_export(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "export",
        help="write results in the format of llm-d or vllm bench",
        description="Write one JSON file per served trial: a Benchmark Report 0.2 of llm-d, or "
        "the result of `vllm bench serve --save-result --save-detailed`.",
    )
    add = parser.add_argument
    add("results", type=Path, metavar="RESULTS", help="a folder of results")
    add("--format", choices=FORMATS, required=True)
    add("--output-dir", type=Path, metavar="DIR", required=True, help="folder for the files")
    add("--configfile", type=Path, metavar="FILE", help="a study; its slo is used for goodput")
    parser.set_defaults(run=_export)


def add_import(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "import",
        help="read results of vllm bench or guidellm into a table of cells",
        description="Read results of `vllm bench serve` (preferably with --save-detailed) and of "
        "guidellm, and write tables/cells.parquet and .csv. The column `origin` names the client. "
        "Files with the same workload become trials of one cell.",
    )
    add = parser.add_argument
    add(
        "files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="a JSON file of either client; also a list, as vllm bench sweep writes it",
    )
    add("--output-dir", type=Path, metavar="DIR", required=True, help="a new folder of results")
    add("--gpu", required=True, help="kind of GPU that the server used, or cpu")
    add(
        "--gpu-count",
        type=positive_int,
        default=1,
        metavar="N",
        help="GPUs of the server; default: 1",
    )
    add("--quantization", default="", metavar="Q", help="quantization of the weights")
    add("--engine", metavar="E", help="engine of the server, for example vllm")
    add("--model", default="", metavar="M", help="name of the model; default: as in the file")
    add(
        "--deployment",
        default="",
        metavar="NAME",
        help="name of the deployment; default: made from the other options",
    )
    parser.set_defaults(run=_import)


def _export(options: argparse.Namespace) -> int:

    from servegrid.analysis.slo import parse_slo_classes
    from servegrid.exchange import llmd, trials, vllm_bench
    from servegrid.records import parquet
    from servegrid.study import config

    if options.configfile and options.format == "llm-d":
        raise ExchangeError("--configfile: reports of llm-d have no goodput. Leave it out.")
    classes = parse_slo_classes(config.load_settings(options.configfile))
    folder = trials.find_records_folder(options.results)
    written = 0
    for trial, record, row in trials.read_trials(folder):
        if options.format == "llm-d":
            exported = llmd.format_report(record, row)
        elif row["requests"] == row["failed_requests"]:
            continue
        else:
            _, requests = parquet.read_rows(folder / trial.id / "requests.parquet")
            exported = vllm_bench.format_result(record, row, requests, classes)
        _write_json(exported, options.output_dir / f"{trial.id.replace('/', '.')}.json")
        written += 1
    print(f"{written} files in {options.output_dir}")
    return 0


def _import(options: argparse.Namespace) -> int:
    from servegrid.analysis import tables
    from servegrid.exchange.files import load_results
    from servegrid.exchange.imported import drop_repeated, imported_cells
    from servegrid.study.deployment import Deployment

    table = options.output_dir / "tables" / "cells.parquet"
    if table.exists():
        raise ExchangeError(f"{table}: already exists. Name a new folder with --output-dir.")
    results, left_out = [], []
    for file in options.files:
        taken, refused = load_results(file)
        results += taken
        left_out += refused
    results, repeated = drop_repeated(results)
    left_out += repeated
    if not results:
        raise ExchangeError("\n".join(left_out))
    # The user describes the deployment, because no file does. What remains is unknown.
    deployment = Deployment(
        name=options.deployment,
        model=options.model,
        checkpoint="",
        tokenizer="",
        quantization=options.quantization,
        engine=options.engine or "",
        gpu=options.gpu,
        gpu_count=options.gpu_count,
        max_model_len=0,
        max_num_seqs=0,
    )
    cells = imported_cells(results, deployment, options.engine)
    tables.write_cells(cells, table, table.with_suffix(".csv"))
    for row in cells.to_dict("records"):
        print(f"{row['deployment']}, trial {row['trial']}: {'; '.join(row['invalid_evidence'])}")
    print(f"{pluralize(len(cells), 'trial')} in {table}")
    if left_out:
        total = len(results) + len(left_out)
        print(
            f"left out: {len(left_out)} of {pluralize(total, 'benchmark')}\n" + "\n".join(left_out),
            file=sys.stderr,
        )
    return 0


def _write_json(data: Any, path: Path) -> None:
    from servegrid.records import parquet

    with parquet.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
