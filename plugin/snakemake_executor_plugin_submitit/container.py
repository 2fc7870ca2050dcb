"""Runs the Python of an allocation inside a container. Pure, except for `resolve`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXECUTABLES = ("apptainer", "singularity")
PYXIS = "pyxis"
"""A plugin of Slurm, with which srun has the option --container-image."""
RUNTIMES = (*EXECUTABLES, PYXIS)
KEYS = ("image", "runtime", "binds")
CACHES = ("~/.cache", "$HF_HOME", "$HF_HUB_CACHE")
"""Where models are, besides the `binds` of a kind."""
PYTHON = "python3"
"""The interpreter inside the image, if the kind has no `python`."""


class ContainerError(Exception):
    """A container cannot be used. The text names the remedy."""


@dataclass(frozen=True)
class Container:
    """An image, the program that runs it, and the folders of the host that it sees."""

    image: str
    runtime: str = EXECUTABLES[0]
    binds: tuple[str, ...] = ()

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Container:
        """The container of a kind. The kind must be valid."""
        runtime = values.get("runtime", EXECUTABLES[0])
        return cls(values["image"], runtime, tuple(values.get("binds", ())))

    @property
    def image_file(self) -> Path | None:
        """The image's file; None if the runtime looks it up elsewhere, as in docker://name."""
        is_file = self.image.startswith(("/", "./", "../", "~")) or self.image.endswith(
            (".sif", ".img", ".simg", ".sqsh")
        )
        return Path(self.image).expanduser() if is_file and "://" not in self.image else None

    def command(self, python: str, gpus: int, workdir: str) -> list[str]:
        """The words that start the Python, inside the image unless srun does that.

        `--nv` makes the GPUs of the host and its driver visible.
        """
        if self.runtime == PYXIS:
            return [python]
        return [
            *(self.runtime, "exec"),
            *(["--nv"] if gpus else []),
            *(f"--bind={folder}" for folder in self.binds),
            *(f"--pwd={workdir}", self.image, python),
        ]

    def srun_args(self, workdir: str) -> list[str]:
        """The options with which srun starts the container. Pyxis shows the allocation's GPUs."""
        if self.runtime != PYXIS:
            return []
        mounts = ",".join(f"{folder}:{folder}" for folder in self.binds)
        return [
            f"--container-image={self.image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={workdir}",
        ]


def find_problem(values: Mapping[Any, Any]) -> tuple[str, str] | None:
    """The first problem of the value of `container`, with its remedy; None if it is valid."""
    for key in values:
        if key not in KEYS:
            return f"unknown key `{key}`", f"Valid keys: {', '.join(KEYS)}."
    if not isinstance(values.get("image"), str) or not values["image"]:
        return "has no `image`", "Write `image: PATH.sif`, or an image that the runtime finds."
    if values.get("runtime", RUNTIMES[0]) not in RUNTIMES:
        return f"runtime {values['runtime']!r} is unknown", f"Use one of: {', '.join(RUNTIMES)}."
    binds = values.get("binds", [])
    if not isinstance(binds, list) or not all(isinstance(each, str) for each in binds):
        return f"binds {binds!r} is not a list of folders", "Write `binds: [/data/models]`."
    return None


def resolve(
    values: Mapping[str, Any], start: Path, folders: Iterable[Path], environ: Mapping[str, str]
) -> dict[str, Any]:
    """The container with absolute paths, and with `folders` and the caches among its binds.

    A relative path starts in `start`. A bind can contain variables; it is left out if one is not
    set. Raises ContainerError if the image or a bind does not exist, or if its path has characters
    that the runtimes interpret.
    """
    container = Container.from_values(values)
    image = container.image
    if (file := container.image_file) is not None:
        if not (start / file).exists():
            raise ContainerError(
                f"image: {start / file} does not exist. Build it, or correct the path."
            )
        image = str(start / file)
    named = [_expand(bind, start, environ) for bind in container.binds]
    caches = [_expand(bind, start, environ) for bind in CACHES]
    for path in filter(None, named):
        if not path.is_dir():
            raise ContainerError(f"binds: {path} is not a folder. Create it, or correct the path.")
    present = [path for path in caches if path is not None and path.is_dir()]
    binds = _outermost([*folders, *filter(None, named), *present])
    for path in binds:
        if any(character in str(path) for character in ",:"):
            raise ContainerError(
                f"binds: {path} contains a comma or a colon, with which the runtimes separate "
                "folders. Use another folder."
            )
    return {"image": image, "runtime": container.runtime, "binds": [str(path) for path in binds]}


def _expand(text: str, start: Path, environ: Mapping[str, str]) -> Path | None:
    """The absolute path; None if it contains a variable that is not set."""
    for name in sorted(environ, key=len, reverse=True):
        text = text.replace(f"${{{name}}}", environ[name]).replace(f"${name}", environ[name])
    return None if "$" in text or not text else start / Path(text).expanduser()


def _outermost(paths: Iterable[Path]) -> list[Path]:
    """The paths without those inside another one; each is visible under its own name."""
    unique = list(dict.fromkeys(Path(os.path.normpath(path)) for path in paths))
    return [
        path
        for path in unique
        if not any(path != other and path.is_relative_to(other) for other in unique)
    ]
