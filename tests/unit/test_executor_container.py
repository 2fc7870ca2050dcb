"""A kind's container: the rendered commands, what it sees of the host, and what is refused."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from snakemake_interface_common.exceptions import WorkflowError

from snakemake_executor_plugin_submitit.container import (
    Container,
    ContainerError,
    find_problem,
    resolve,
)
from snakemake_executor_plugin_submitit.kinds import validate_kind
from snakemake_executor_plugin_submitit.submission import Parameters, resolve_python

CONTAINER = {"image": "/images/a b.sif", "binds": ["/project", "/data/models"]}


def parameters(cluster: str = "slurm", gpus: int = 2, **kind: Any) -> Parameters:
    return Parameters.build(cluster, {"runtime": 60, "_cores": 4, "gpus": gpus}, kind)


@pytest.mark.parametrize("runtime", ["apptainer", "singularity"])
def test_the_python_runs_inside_the_image_with_gpus_and_binds(runtime: str) -> None:
    found = parameters(container=CONTAINER | {"runtime": runtime}, python="/opt/env/bin/python")
    assert found.python_command(Path("/project/study")) == (
        f"{runtime} exec --nv --bind=/project --bind=/data/models --pwd=/project/study "
        "'/images/a b.sif' /opt/env/bin/python -P"
    )
    assert found.for_slurm()["srun_args"] == ["--nodes=1", "--ntasks=1", "--cpus-per-task=4"]


def test_without_gpus_there_is_no_nv() -> None:
    command = parameters(gpus=0, container=CONTAINER).python_command(Path("/project"))
    assert shlex.split(command)[:3] == ["apptainer", "exec", "--bind=/project"]
    assert shlex.split(command)[-2:] == ["python3", "-P"]


def test_gpus_of_a_whole_node_that_slurm_does_not_manage_are_visible() -> None:
    found = parameters(container=CONTAINER, gpus_per_node=0, gpus_of_node=2)
    assert " --nv " in found.python_command(Path("/project"))


def test_srun_starts_the_container_of_pyxis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    container = CONTAINER | {"runtime": "pyxis", "image": "nvcr.io#nvidia/vllm:25.09"}
    found = parameters(container=container, srun_args=["--mpi=none"])
    assert found.python_command(tmp_path) == "python3 -P"
    assert found.for_slurm()["srun_args"] == [
        *("--nodes=1", "--ntasks=1", "--cpus-per-task=4"),
        "--container-image=nvcr.io#nvidia/vllm:25.09",
        "--container-mounts=/project:/project,/data/models:/data/models",
        f"--container-workdir={tmp_path}",
        "--mpi=none",
    ]


def test_pyxis_needs_slurm() -> None:
    with pytest.raises(WorkflowError, match="pyxis is a part of Slurm"):
        parameters("local", container={"image": "x", "runtime": "pyxis"})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "has no `image`"),
        ({"image": ""}, "has no `image`"),
        ({"image": 3}, "has no `image`"),
        ({"image": "a.sif", "runtime": "docker"}, "runtime 'docker' is unknown"),
        ({"image": "a.sif", "binds": "/data"}, "binds '/data' is not a list of folders"),
        ({"image": "a.sif", "binds": [3]}, "is not a list of folders"),
        ({"image": "a.sif", "bind": []}, "unknown key `bind`"),
    ],
)
def test_a_wrong_container_is_a_problem_of_the_kind(value: dict[str, Any], words: str) -> None:
    (problem,) = validate_kind({"container": value})
    assert problem.key == "container"
    assert words in problem.problem
    assert problem.remedy


def test_a_complete_container_is_valid() -> None:
    for runtime in ("apptainer", "singularity", "pyxis"):
        assert find_problem(CONTAINER | {"runtime": runtime}) is None
    (problem,) = validate_kind({"container": "a.sif"})
    assert problem.problem == "'a.sif' is not a mapping"


def test_a_container_sees_the_workflow_the_caches_and_the_binds(tmp_path: Path) -> None:
    for name in ("home/.cache", "launch/images", "study/.snakemake/submitit", "models", "hf"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "launch/images/a.sif").touch()
    kind = {"image": "images/a.sif", "binds": ["$MODELS", "${SCRATCH}/x", "../models"]}
    environ = {"MODELS": str(tmp_path / "models"), "HF_HOME": str(tmp_path / "hf")}
    folders = [tmp_path / "launch", tmp_path / "study", tmp_path / "study/.snakemake/submitit"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path / "home"))
        found = resolve(kind, tmp_path / "launch", folders, environ)
    assert found == {
        "image": f"{tmp_path}/launch/images/a.sif",
        "runtime": "apptainer",
        "binds": [
            f"{tmp_path}/launch",
            f"{tmp_path}/study",
            f"{tmp_path}/models",
            f"{tmp_path}/home/.cache",
            f"{tmp_path}/hf",
        ],
    }


@pytest.mark.parametrize(
    ("kind", "folder", "words"),
    [
        ({"image": "none.sif"}, "a", "none.sif does not exist"),
        ({"image": "docker://x", "binds": ["/no/such/folder"]}, "a", "is not a folder"),
        ({"image": "docker://x"}, "a,b", "contains a comma or a colon"),
    ],
)
def test_a_container_that_cannot_work_is_refused(
    tmp_path: Path, kind: dict[str, Any], folder: str, words: str
) -> None:
    with pytest.raises(ContainerError, match=words):
        resolve(kind, tmp_path, [tmp_path / folder], {})


@pytest.mark.parametrize(
    ("image", "is_file"),
    [
        ("images/a.sif", True),
        ("/images/sandbox", True),
        ("~/a.sqsh", True),
        ("docker://vllm/vllm-openai:v0.12", False),
        ("nvcr.io#nvidia/vllm:25.09", False),
        ("vllm/vllm-openai", False),
    ],
)
def test_files_and_names_of_images_are_told_apart(image: str, is_file: bool) -> None:
    assert (Container(image).image_file is not None) is is_file


def test_the_python_of_a_container_is_not_looked_for_on_the_host(tmp_path: Path) -> None:
    kind = {"container": CONTAINER, "python": "/opt/env/bin/python"}
    assert resolve_python(kind, {}, tmp_path, "k") == {"python": "/opt/env/bin/python"}
    assert resolve_python(kind, {"environment": "main"}, tmp_path, "k") == {}
