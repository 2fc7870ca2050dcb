"""Checks the Python environments in which a profile's allocations will run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from servegrid.doctor.report import Finding, Group
from servegrid.doctor.shell import CommandResult, run_command
from servegrid.study.grid import Deployment
from servegrid.study.nodes import version_problem

TIMEOUT_S = 60.0  # the first start on a shared file system is slow
MIN_PYTHON = (3, 11)
PACKAGES = ("servegrid", "submitit", "snakemake")
PROBE = """
import json, sys
del sys.path[0]
from importlib import metadata, util
def version(name):
    if util.find_spec(name) is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        others = metadata.packages_distributions().get(name)
        return metadata.version(others[0]) if others else "of unknown version"
names = sys.argv[1:]
print(json.dumps({"python": sys.version_info[:3], "packages": {n: version(n) for n in names}}))
"""
GROUP = Group("environments")


@dataclass(frozen=True)
class Environment:
    """An interpreter's version, and the version of each package; None if it is missing."""

    python: tuple[int, ...]
    packages: Mapping[str, str | None]


def parse_environment(result: CommandResult) -> Environment | None:
    """The output of the probe; None if the probe did not run."""
    try:
        data = json.loads(result.stdout.splitlines()[-1])
        return Environment(tuple(data["python"]), data["packages"])
    except (IndexError, KeyError, TypeError, ValueError):
        return None


def check_environment(
    kind: str,
    python: str,
    environment: Environment,
    engines: Sequence[str],
    remedy: str | None = None,
) -> Finding:
    """Check that an environment has what an allocation needs; `engines` are packages.

    Without a `remedy`, the finding says how to create the environment of `python`.
    """
    version = ".".join(map(str, environment.python))
    packages = environment.packages
    missing = [name for name in PACKAGES + tuple(engines) if packages.get(name) is None]
    present = [f"{name} {version}" for name, version in packages.items() if version]
    found = f"{python}: Python {version}, {', '.join(present) or 'none of the packages'}"
    remedy = remedy or environment_remedy(python)
    if environment.python < MIN_PYTHON:
        oldest = ".".join(map(str, MIN_PYTHON))
        return GROUP.fail(f"kind {kind}", found, f"Python must be {oldest} or newer. {remedy}")
    if missing:
        return GROUP.fail(
            f"kind {kind}",
            f"{found}; missing: {', '.join(missing)}",
            f"Create the environment again. {remedy}",
        )
    return GROUP.ok(f"kind {kind}", found)


def check_start(
    kind: str, environment: Environment, on_nodes: Sequence[tuple[Deployment, int]], file: str
) -> Iterator[Finding]:
    """Check that the environment's vLLM can start deployments on several nodes and replicas."""
    version = environment.packages.get("vllm")
    for deployment, nodes in on_nodes:
        if problem := version_problem(deployment, nodes, version):
            remedy = f"Correct `python` of `{kind}` in {file}, or exclude the deployment."
            yield GROUP.fail(f"kind {kind}", problem.partition(". ")[0], remedy)
            return
    if on_nodes and version:
        what = (
            *(["on several nodes"] if any(nodes > 1 for _, nodes in on_nodes) else []),
            *(["several replicas"] if any(each.replicas > 1 for each, _ in on_nodes) else []),
        )
        yield GROUP.ok(f"kind {kind}", f"vLLM {version} can start {' and '.join(what)}")


def environment_remedy(python: str) -> str:
    """How to create the environment of an interpreter."""
    if found := re.search(r"\.venv-([\w-]+)/bin/", python):
        return f"Run `make env-{found[1]}` in the folder of servegrid."
    if python == sys.executable or ".venv/bin/" in python:
        return "Run `make .venv/.ready` in the folder of servegrid."
    return "Create an environment that contains servegrid, or correct `python` in the kinds file."


def check_main_python(python: str) -> Iterator[Finding]:
    """Check that Snakemake can run scripts: it puts this path into shell commands as it is."""
    if re.search(r"[^\w@%+=:,./-]", python):
        yield GROUP.fail(
            "main process",
            f"{python}: Snakemake cannot run scripts with a Python in such a path",
            "Create the environment in a folder whose path has no spaces and no quotes.",
        )


def check_environments(
    pythons: Mapping[str, str | None],
    engines: Mapping[str, Sequence[str]],
    on_nodes: Mapping[str, Sequence[tuple[Deployment, int]]] = {},
    file: str = "",
) -> Iterator[Finding]:
    """Check the interpreter of each kind. A kind without its own uses this interpreter.

    A relative path starts in the current folder, as it does for the executor. `on_nodes` has the
    deployments of each kind that not every vLLM can start, with their nodes; `file` describes the
    kinds.
    """
    yield from check_main_python(sys.executable)
    results: dict[str, CommandResult] = {}
    for kind, path in pythons.items():
        python = str(Path(path).expanduser()) if path else sys.executable
        if "/" in python and not Path(python).exists():
            yield GROUP.fail(
                f"kind {kind}", f"{python}: does not exist", environment_remedy(python)
            )
            continue
        if python not in results:
            names = (*PACKAGES, "vllm", "xllamacpp")
            results[python] = run_command([python, "-c", PROBE, *names], TIMEOUT_S)
        environment = parse_environment(results[python])
        if environment is None and "/" not in python:
            yield GROUP.skip(f"kind {kind}", f"{python}: not here; will be looked up on the node")
        elif environment is None:
            yield GROUP.fail(
                f"kind {kind}",
                f"{python}: does not run here: {results[python].message}",
                f"Create the environment again on this machine. {environment_remedy(python)}",
            )
        else:
            yield check_environment(kind, python, environment, engines.get(kind, ()))
            yield from check_start(kind, environment, on_nodes.get(kind, ()), file)
