"""The plugin is a distribution of its own: its wheel runs its example without servegrid."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.crowded]

PLUGIN = Path(__file__).parents[2] / "plugin"
PACKAGES = sysconfig.get_path("purelib")


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(  # type: ignore[call-overload]
        [*map(str, command)], capture_output=True, text=True, timeout=200, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter with the wheel and the packages of this one, but without its checkout."""
    # A copy, because a build leaves files in the source folder.
    source = shutil.copytree(
        PLUGIN, tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.egg-info")
    )
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", tmp_path / "wheels", source),
    )
    (wheel,) = (tmp_path / "wheels").iterdir()
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site_packages = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
    ).stdout.strip()
    # Python does not read the .pth files in a folder that a .pth file adds. They contain the
    # editable installations.
    Path(site_packages, "packages.pth").write_text(f"{PACKAGES}\n", encoding="utf-8")
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install"),
        *("--no-deps", "--no-index", "--ignore-installed", wheel),
    )
    return python


def test_the_example_runs_without_servegrid(python: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(PLUGIN / "example", tmp_path / "example")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["HOME"] = str(tmp_path)
    missing = subprocess.run(
        [python, "-c", "import servegrid"], cwd=folder, env=env, capture_output=True, text=True
    )
    assert "No module named 'servegrid'" in missing.stderr
    program = "import snakemake_executor_plugin_submitit as plugin; print(plugin.__file__)"
    assert str(tmp_path / "venv") in run(python, "-c", program, cwd=folder, env=env).stdout

    # The command of plugin/README.md.
    done = run(
        *(python, "-m", "snakemake", "--executor", "submitit", "--submitit-cluster", "local"),
        *("--submitit-service", "service:serve", "--jobs", "10"),
        cwd=folder,
        env=env,
    )
    # One server counted the requests of all three jobs, in their order.
    assert [(folder / f"count-{job}.txt").read_text() for job in (1, 2, 3)] == ["1", "2", "3"]
    assert "3 of 3 jobs done, 1 service start in 1 allocation" in done.stderr
