"""The files of the demo's model, as the fixture `demo_model` gives them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class DemoModel(NamedTuple):
    """The demo's model: its cache folder, the folder of safetensors, and the GGUF file."""

    models: Path
    folder: Path
    gguf: Path
