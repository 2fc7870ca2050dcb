"""Wheels of the repository's distributions, installed into new environments."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build_wheel(distribution: Path, folder: Path) -> Path:
    """The wheel of the distribution whose pyproject.toml lies in that folder."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(distribution)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def new_environment(folder: Path, *wheels: Path, blocked: tuple[str, ...] = ()) -> Path:
    """The Python of an environment with these wheels and the packages of this one.

    What is installed here as editable, and the `blocked` packages, cannot be imported there.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    # A path in a .pth file is searched, but the .pth files in it are not read.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    lines = [f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"] if blocked else []
    (site / "blocked.pth").write_text("".join(lines))
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    command += ["--no-deps", "--ignore-installed", *map(str, wheels)]
    subprocess.run(command, check=True, capture_output=True)
    return python
