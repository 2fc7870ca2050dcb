"""`servegrid export` and `servegrid import`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from servegrid.analysis import tables
from servegrid.errors import ExchangeError
from servegrid.exchange import guidellm, llmd, vllm_bench
from servegrid.exchange.foreign import Foreign, cells_of
from servegrid.records import parquet
from servegrid.study.deployment import Deployment
from servegrid.study.grid import Trial

FORMATS = ("llm-d", "vllm-bench")


def add_export(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "export",
        help="write trials as other tools write their results",
        description="Writes one JSON file per trial that was served: a Benchmark Report 0.2 of "
        "llm-d, or what `vllm bench serve --save-result --save-detailed` saves.",
    )
    add = parser.add_argument
    add("results", type=Path, metavar="RESULTS", help="a folder of results")
    add("--format", choices=FORMATS, required=True)
    add("--output-dir", type=Path, metavar="DIR", required=True, help="a folder for the files")
    parser.set_defaults(run=_export)


def add_import(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "import",
        help="take what vllm bench or guidellm has measured, as a table of cells",
        description="Reads results of `vllm bench serve` (best with --save-detailed) and of "
        "guidellm, and writes tables/cells.parquet and .csv, marked by their origin. Files of the "
        "same load become trials of one cell.",
    )
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="a JSON file of either")
    add("--output-dir", type=Path, metavar="DIR", required=True, help="a new folder of results")
    add("--gpu", required=True, help="kind of GPU that served, or cpu: no file says it")
    add("--gpu-count", type=int, default=1, metavar="N", help="default: 1")
    add("--quantization", default="", metavar="Q", help="how the weights were stored")
    add("--engine", metavar="E", help="the engine that served, for example vllm")
    add("--model", default="", metavar="M", help="default: as the file says")
    add("--deployment", default="", metavar="NAME", help="default: made of the others")
    parser.set_defaults(run=_import)


def _export(options: argparse.Namespace) -> int:
    folder = _cells_below(options.results)
    written = 0
    for trial, record, row in _trials(folder):
        if options.format == "llm-d":
            told = llmd.report(record, row)
        elif row["requests"] == row["failed_requests"]:
            continue
        else:
            requests = pq.read_table(folder / trial.id / "requests.parquet")
            told = vllm_bench.written(record, requests)
        _write(told, options.output_dir / f"{trial.id.replace('/', '.')}.json")
        written += 1
    print(f"{written} files in {options.output_dir}")
    return 0


def _import(options: argparse.Namespace) -> int:
    table = options.output_dir / "tables" / "cells.parquet"
    if table.exists():
        raise ExchangeError(f"{table}: is there already. Name a new folder with --output-dir.")
    workloads = [workload for file in options.files for workload in _loads(file)]
    cells = cells_of(workloads, _deployment(options), options.engine)
    tables.write_cells(cells, table, table.with_suffix(".csv"))
    for row in cells.to_dict("records"):
        print(f"{row['deployment']}, trial {row['trial']}: {'; '.join(row['invalid_evidence'])}")
    print(f"{len(cells)} trials in {table}")
    return 0


def _deployment(options: argparse.Namespace) -> Deployment:
    """As far as the user says it; the rest is not known."""
    return Deployment(
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


def _loads(file: Path) -> list[Foreign]:
    """The loads of one file. Raises ExchangeError, naming it, where it is of neither kind."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExchangeError(f"{file}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ExchangeError(
            f"{file}: is not JSON ({error}). Where `vllm bench` has appended several results, "
            "put each into a file of its own."
        ) from error
    readers: Mapping[tuple[str, ...], Callable[[Any, str], list[Foreign]]] = {
        vllm_bench.KEYS: lambda result, source: [vllm_bench.read(result, source)],
        guidellm.KEYS: guidellm.read,
    }
    for keys, read in readers.items():
        if isinstance(found, dict) and all(key in found for key in keys):
            try:
                return read(found, file.name)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                told = f"{type(error).__name__}: {error}"
                raise ExchangeError(
                    f"{file}: is not as its tool writes it ({told}). servegrid reads vllm bench "
                    "serve 0.32 and guidellm 0.8, and what has kept their keys."
                ) from error
    wanted = " or ".join(", ".join(f"`{key}`" for key in keys) for keys in readers)
    raise ExchangeError(
        f"{file}: is of neither vllm bench serve nor guidellm, for it has not {wanted}."
    )


def _cells_below(results: Path) -> Path:
    for folder in (results / "results" / "cells", results / "cells"):
        if folder.is_dir():
            return folder
    raise ExchangeError(f"{results}: has no cells/. Name a folder of results.")


def _trials(folder: Path) -> Iterator[tuple[Trial, Mapping[str, Any], dict[str, Any]]]:
    """Each trial with its record and its row of the table of cells, None for null."""
    found = {
        path: parquet.read_record(path) for path in sorted(folder.glob("*/*/*/requests.parquet"))
    }
    trials = [Trial.from_spec(record["spec"]) for record in found.values()]
    drift_checks = tables.gather([each for each in trials if each.drift_check], folder)
    drifts = tables.drift_by_allocation(drift_checks)
    measured = [each for each in trials if not each.drift_check]
    if not measured:
        raise ExchangeError(f"{folder}: has no trials.")
    rows = {row["spec_digest"]: row for row in _rows(tables.gather(measured, folder, drifts))}
    by_digest = {record["spec_digest"]: record for record in found.values()}
    for trial in measured:
        yield trial, by_digest[trial.digest], rows[trial.digest]


def _rows(cells: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for row in cells.to_dict("records"):
        yield {
            str(key): value if isinstance(value, list) or not pd.isna(value) else None
            for key, value in row.items()
        }


def _write(data: Any, path: Path) -> None:
    with parquet.written_whole(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
