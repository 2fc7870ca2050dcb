"""Checks the containers in which a profile's allocations will run: program, image and packages."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from servegrid.doctor.environments import (
    GROUP,
    PACKAGES,
    PROBE,
    check_environment,
    check_start,
    parse_environment,
)
from servegrid.doctor.report import Finding, Status
from servegrid.doctor.resources import ResourceRequest
from servegrid.doctor.shell import RunCommand
from servegrid.study.grid import Deployment

REBUILD = "Build the image again, as docs/administrators.md says."


def check_container(
    request: ResourceRequest,
    engines: Sequence[str],
    file: str,
    run: RunCommand,
    which: Callable[[str], str | None] = shutil.which,
    on_nodes: Sequence[tuple[Deployment, int]] = (),
) -> Iterator[Finding]:
    """Check the container of a kind of `file`; `engines` are packages that it must contain.

    `on_nodes` are the kind's deployments that not every vLLM can start, with their nodes.

    What only a node can show, such as a program that `setup` loads, is skipped.
    """
    try:
        from snakemake_executor_plugin_submitit import container as plugin
    except ImportError:
        yield GROUP.skip(f"container of {request.kind}", "the Snakemake plugin is not installed")
        return
    values = request.values["container"]
    if plugin.find_problem(values) is not None:
        return  # a finding of the profile
    container = plugin.Container.from_values(values)
    tool = _check_tool(request, container.runtime, file, run, which)
    yield tool
    image = _check_image(request, container.image, container.image_file, file)
    yield image
    is_inside_reachable = container.runtime != plugin.PYXIS and container.image_file is not None
    if not is_inside_reachable or {tool.status, image.status} != {Status.OK}:
        yield GROUP.skip(f"kind {request.kind}", "only a node can start this container")
        return
    python = str(request.values.get("python") or plugin.PYTHON)
    # Without binds: a folder that is missing here may exist on the nodes.
    start = plugin.Container(str(container.image_file), container.runtime)
    command = start.command(python, gpus=0, workdir="/")
    result = run([*command, "-c", PROBE, *PACKAGES, "vllm", "xllamacpp"])
    environment = parse_environment(result)
    subject = f"{python} in {container.image}"
    if environment is None:
        yield GROUP.fail(
            f"kind {request.kind}",
            f"{subject}: does not run here: {result.message}",
            f"Correct `python` of `{request.kind}` in {file}: it is a path inside the image. "
            + REBUILD,
        )
        return
    yield check_environment(request.kind, subject, environment, engines, REBUILD)
    yield from check_start(request.kind, environment, on_nodes, file)


def _check_tool(
    request: ResourceRequest,
    runtime: str,
    file: str,
    run: RunCommand,
    which: Callable[[str], str | None],
) -> Finding:
    subject = f"container of {request.kind}"
    if runtime == "pyxis":
        if "--container-image" in run(["srun", "--help"]).stdout:
            return GROUP.ok(subject, "srun has --container-image (pyxis)")
        return GROUP.fail(
            subject,
            "srun has no --container-image: the plugin pyxis is not installed in Slurm",
            f"Use `runtime: apptainer` for `{request.kind}` in {file}, or ask the administrators.",
        )
    if found := which(runtime):
        return GROUP.ok(subject, f"{runtime}: {found}")
    if request.values.get("setup"):
        return GROUP.skip(subject, f"{runtime} is not here; `setup` may load it on the node")
    return GROUP.fail(
        subject,
        f"{runtime} is not on the PATH",
        f'Install it, load it with `setup: ["module load {runtime}"]` of `{request.kind}` in '
        f"{file}, or use another `runtime`.",
    )


def _check_image(
    request: ResourceRequest, image: str, image_file: Path | None, file: str
) -> Finding:
    subject = f"image of {request.kind}"
    if image_file is None:
        return GROUP.warn(
            subject,
            f"{image} is not a file: each job looks it up, and may download it",
            f"Pull it once, and write the path of its file as `image` of `{request.kind}` in "
            f"{file}.",
        )
    if image_file.exists():
        return GROUP.ok(subject, str(image_file))
    return GROUP.fail(
        subject,
        f"{image_file}: does not exist",
        f"Correct `image` of `{request.kind}` in {file}, or build it, as docs/administrators.md "
        "says. The path is relative to the current folder.",
    )
