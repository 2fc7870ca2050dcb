"""The Python environments in which a profile's allocations will run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from servegrid.doctor.commands import Answer, ask
from servegrid.doctor.report import Finding, Group

LIMIT_S = 60.0  # a cold interpreter on a shared file system
OLDEST = (3, 11)
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
    """What an interpreter says of itself."""

    python: tuple[int, ...]
    packages: Mapping[str, str | None]


def environment_of(answer: Answer) -> Environment | None:
    """What the probe printed; None where it did not run."""
    try:
        text = json.loads(answer.stdout.splitlines()[-1])
        return Environment(tuple(text["python"]), text["packages"])
    except (IndexError, KeyError, TypeError, ValueError):
        return None


def judge_environment(
    kind: str, python: str, found: Environment, engines: Sequence[str]
) -> Finding:
    """Whether an environment has what an allocation needs; `engines` are packages."""
    version = ".".join(map(str, found.python))
    missing = [name for name in PACKAGES + tuple(engines) if found.packages.get(name) is None]
    text = [f"{name} {version}" for name, version in found.packages.items() if version]
    said = f"{python}: Python {version}, {', '.join(text) or 'none of the packages'}"
    if found.python < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return GROUP.fail(f"kind {kind}", said, f"It must be {oldest} or newer. {remedy(python)}")
    if missing:
        return GROUP.fail(
            f"kind {kind}",
            f"{said}; missing: {', '.join(missing)}",
            f"Make it anew. {remedy(python)}",
        )
    return GROUP.ok(f"kind {kind}", said)


def remedy(python: str) -> str:
    """How to come by the environment of an interpreter."""
    if found := re.search(r"\.venv-([\w-]+)/bin/", python):
        return f"Type `make env-{found[1]}` in the folder of servegrid."
    if python == sys.executable or ".venv/bin/" in python:
        return "Type `make .venv/.ready` in the folder of servegrid."
    return "Make an environment with servegrid in it, or correct `python` in the kinds file."


def examine_environments(
    pythons: Mapping[str, str | None], engines: Mapping[str, Sequence[str]]
) -> Iterator[Finding]:
    """The interpreter of each kind; without one of its own it is this one.

    A relative path starts, as for the executor, in the folder in which the command is typed.
    """
    probed: dict[str, Answer] = {}
    for kind, named in pythons.items():
        python = str(Path(named).expanduser()) if named else sys.executable
        if "/" in python and not Path(python).exists():
            yield GROUP.fail(f"kind {kind}", f"{python}: is not there", remedy(python))
            continue
        if python not in probed:
            names = (*PACKAGES, "vllm", "xllamacpp")
            probed[python] = ask([python, "-c", PROBE, *names], LIMIT_S)
        environment = environment_of(probed[python])
        if environment is None and "/" not in python:
            yield GROUP.skip(f"kind {kind}", f"{python}: is looked for on the node; not here")
        elif environment is None:
            yield GROUP.fail(
                f"kind {kind}",
                f"{python}: does not run here: {probed[python].complaint}",
                f"Make it anew on this machine. {remedy(python)}",
            )
        else:
            yield judge_environment(kind, python, environment, engines.get(kind, ()))
