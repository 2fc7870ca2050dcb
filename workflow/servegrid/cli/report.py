"""`servegrid report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_report(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "report",
        help="write the HTML page of published data",
        description="Write one HTML page with curves, heat maps, the frontier and the capacity "
        "plan of published data. It opens without a network. The page of a study is "
        "results/report/index.html, which snakemake writes.",
    )
    add = parser.add_argument
    add(
        "--published",
        required=True,
        metavar="NAME",
        help="inria-2024, or the path of a CSV file with the same columns",
    )
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="the file to write; default: NAME.html in the working directory",
    )
    add("--configfile", type=Path, metavar="FILE", help="a study; its slo and capacity are used")
    add(
        "--hardware",
        type=Path,
        metavar="FILE",
        help="prices; default: config/hardware.yaml if it exists, else those of this package",
    )
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from servegrid.reference.hardware import find_hardware_file
    from servegrid.report.write import write_published_page
    from servegrid.study import config

    study = config.load_settings(options.configfile)
    page = options.output or Path(f"{Path(options.published).name.removesuffix('.csv')}.html")
    write_published_page(study, options.published, options.hardware or find_hardware_file(), page)
    print(page)
    return 0
