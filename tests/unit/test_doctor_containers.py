"""`servegrid doctor`: the program, the image and the packages of a kind's container."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.doctoring import request, result
from servegrid.doctor.containers import check_container
from servegrid.doctor.report import Finding, Status
from servegrid.doctor.shell import CommandResult

PROBED = {"servegrid": "0.1.0", "submitit": "1.5.4", "snakemake": "9.27.1", "vllm": "0.32.0"}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.sif"
    path.touch()
    return path


class Host:
    """Scripted programs: apptainer answers the probe with `packages`, srun has `options`."""

    def __init__(self, packages: dict[str, str | None], options: str = "", has: str = "") -> None:
        self.packages, self.options, self.has = packages, options, has
        self.commands: list[Sequence[str]] = []

    def run(self, command: Sequence[str]) -> CommandResult:
        self.commands.append(command)
        if command[0] == "srun":
            return result(stdout=self.options)
        if not self.packages:
            return result(255, stderr="FATAL: stat /opt/env/bin/python: no such file")
        return result(stdout=json.dumps({"python": [3, 11, 2], "packages": self.packages}))

    def check(self, values: dict[str, Any], **kind: Any) -> list[Finding]:
        def which(name: str) -> str | None:
            return f"/usr/bin/{name}" if name == self.has else None

        kind_request = request(container=values, **kind)
        return list(check_container(kind_request, ["vllm"], "kinds.yaml", self.run, which))


def test_the_packages_are_looked_for_inside_the_image(image: Path) -> None:
    host = Host(PROBED, has="apptainer")
    found = host.check({"image": str(image)}, python="/opt/env/bin/python")
    assert [each.status for each in found] == [Status.OK] * 3
    assert "vllm 0.32.0" in found[-1].found
    (command,) = host.commands
    assert list(command[:5]) == [
        *("apptainer", "exec", "--pwd=/", str(image), "/opt/env/bin/python"),
    ]


def test_a_missing_package_is_a_failure(image: Path) -> None:
    missing = Host({**PROBED, "vllm": None}, has="apptainer").check({"image": str(image)})
    assert missing[-1].status is Status.FAIL
    assert "missing: vllm" in missing[-1].found
    assert "Build the image again" in missing[-1].remedy


def test_a_python_that_the_image_lacks_is_a_failure(image: Path) -> None:
    (*_, last) = Host({}, has="apptainer").check({"image": str(image)}, python="/no/python")
    assert last.status is Status.FAIL
    assert "no such file" in last.found
    assert "it is a path inside the image" in last.remedy


@pytest.mark.parametrize(("setup", "status"), [(None, Status.FAIL), (["module load x"], "SKIP")])
def test_a_program_that_is_not_here_may_be_loaded_on_the_node(
    image: Path, setup: list[str] | None, status: str
) -> None:
    kind = {"setup": setup} if setup else {}
    tool, image_found, last = Host(PROBED).check({"image": str(image)}, **kind)
    assert tool.status == status
    assert image_found.status is Status.OK
    assert last.status is Status.SKIP


def test_a_missing_image_is_a_failure(tmp_path: Path) -> None:
    _, image, last = Host(PROBED, has="apptainer").check({"image": str(tmp_path / "b.sif")})
    assert image.status is Status.FAIL
    assert "b.sif: does not exist" in image.found
    assert last.status is Status.SKIP


@pytest.mark.parametrize(
    ("options", "status"),
    [("  --container-image=[USER@][REGISTRY#]IMAGE\n", Status.OK), ("--chdir\n", Status.FAIL)],
)
def test_pyxis_is_an_option_of_srun(options: str, status: Status) -> None:
    tool, image, last = Host(PROBED, options).check({"image": "a/b:1", "runtime": "pyxis"})
    assert tool.status is status
    assert image.status is Status.WARN  # it is no file, so each job may download it
    assert last.status is Status.SKIP


def test_a_container_with_a_wrong_key_is_a_finding_of_the_profile_alone() -> None:
    assert Host(PROBED).check({"picture": "a.sif"}) == []
