"""The wheel works without a checkout, without Snakemake and without an engine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from helpers.bundling import make_bundle, write_results
from helpers.faulty_server import MODEL, FaultScript, start_faulty_server

pytestmark = [pytest.mark.slow, pytest.mark.crowded]

ROOT = Path(__file__).parents[2]
NOT_REQUIRED = ("aiohttp", "pynvml", "snakemake", "submitit", "torch", "transformers", "vllm")
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "workflow")
Command = Callable[..., subprocess.CompletedProcess[str]]


def required_distributions() -> set[str]:
    """The declared dependencies, with everything that they require in turn."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(text) for text in project["dependencies"]]
    names: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        extras = ["", *requirement.extras]
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if requirement.name not in names:
            names.add(requirement.name)
            waiting += map(Requirement, metadata.requires(requirement.name) or ())
    return names


def link_distribution(name: str, site_packages: Path) -> None:
    files = metadata.files(name)
    assert files is not None, name
    for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
        link = site_packages / top
        if not link.exists():
            link.symlink_to(Path(str(metadata.distribution(name).locate_file(top))))


def run(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with servegrid's wheel and its declared dependencies only."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("*.egg-info", "__pycache__")
    for name in BUILT_FROM:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=ignore, symlinks=True)
        else:
            shutil.copy(path, source)
    (source / "config").mkdir()
    shutil.copy(ROOT / "config" / "hardware.yaml", source / "config")

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    wheel = (*pip, "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(*wheel, "--wheel-dir", folder / "dist", source)
    shutil.rmtree(source)

    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    (site_packages,) = folder.glob("venv/lib/python3*/site-packages")
    for name in required_distributions():
        link_distribution(name, site_packages)
    (built,) = (folder / "dist").iterdir()
    install = (*pip, "--python", folder / "venv/bin/python", "install", "--no-index")
    run(*install, "--quiet", "--no-deps", built)
    return folder / "venv" / "bin"


@pytest.fixture
def servegrid(environment: Path, tmp_path: Path) -> Iterator[Command]:
    """Runs the installed command in an empty folder, in which it must leave nothing."""
    folder, home = tmp_path / "empty", tmp_path / "home"
    folder.mkdir()
    home.mkdir()

    def run_command(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [environment / "servegrid", *map(str, arguments)],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    yield run_command
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_results(folder)
    return make_bundle(folder)


def test_the_environment_has_no_engine_and_no_snakemake(environment: Path, tmp_path: Path) -> None:
    code = f"import importlib.util as u; print([n for n in {NOT_REQUIRED} if u.find_spec(n)])"
    assert run(environment / "python", "-c", code, cwd=tmp_path).stdout == "[]\n"
    location = "import servegrid; print(servegrid.__file__)"
    assert str(ROOT) not in run(environment / "python", "-c", location, cwd=tmp_path).stdout
    assert all(importlib.util.find_spec(name) for name in ("snakemake", "vllm")), "here they are"


def test_help_lists_all_commands(servegrid: Command) -> None:
    text = servegrid("--help").stdout
    for name in ("plan", "load", "capacity", "report", "compare", "verify", "unpack", "doctor"):
        assert f"\n    {name} " in text
        assert servegrid(name, "--help").stdout.startswith(f"usage: servegrid {name} ")


def test_a_bundle_is_verified_compared_and_unpacked(
    servegrid: Command, bundle: Path, tmp_path: Path
) -> None:
    lines = servegrid("verify", bundle).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["PASS"] * 6
    assert "not tested" in servegrid("compare", bundle, bundle).stdout
    assert "PATH-OF-SERVEGRID/Snakefile" in servegrid("unpack", bundle, tmp_path / "study").stdout


def test_replication_names_what_is_missing(servegrid: Command, bundle: Path) -> None:
    done = servegrid("verify", bundle, "--replicate", "1", "--profile", "p", status=2)
    assert done.stdout == ""
    assert "has no workflow. Clone" in done.stderr


def test_capacity_has_prices_without_a_checkout(servegrid: Command) -> None:
    plan = servegrid("capacity", "--published", "inria-2024", "--input-len", "119").stdout
    (row,) = [line for line in plan.splitlines() if line.startswith("| mixtral-8x7b_awq")]
    assert "17,000" in row


def test_the_page_of_published_data_is_written(servegrid: Command, tmp_path: Path) -> None:
    servegrid("report", "--published", "inria-2024", "--output", tmp_path / "page.html")
    assert "</html>" in (tmp_path / "page.html").read_text()


def test_doctor_checks_a_profile(servegrid: Command, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "profiles" / "local", tmp_path / "profile")
    text = servegrid("doctor", "--profile", tmp_path / "profile", "--directory", tmp_path).stdout
    assert "executor submitit, cluster local" in text


def test_load_measures_a_server(servegrid: Command, tmp_path: Path) -> None:
    with start_faulty_server(FaultScript(ttft_s=0.01, itl_s=0.002)) as server:
        done = servegrid(
            *("load", "--url", server.endpoint.base_url, "--model", MODEL, "--protocol", "burst"),
            *("--concurrency", "2", "--requests", "4", "--input-len", "9", "--output-len", "5"),
            *("--output", tmp_path / "cell.parquet"),
        )
    assert "failed         0" in done.stdout
    assert done.stderr == ""
    assert (tmp_path / "cell.parquet").exists()
