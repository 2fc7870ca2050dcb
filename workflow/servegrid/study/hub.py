"""Models of the Hugging Face Hub: their names, the user's cache, and what is fetched into it.

The cache, the token and the address of the Hub (`HF_ENDPOINT`) are those of `huggingface_hub`.
Only `plan_download` and `download` use the network.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from servegrid.errors import ModelError

_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>[A-Za-z0-9_][\w./-]*))?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_INDEX = ".safetensors.index.json"
_OTHER_WEIGHTS = frozenset(
    {
        *(".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".mlmodel", ".nemo", ".npz", ".onnx"),
        *(".onnx_data", ".ot", ".pb", ".pdparams", ".pt", ".pth", ".safetensors", ".tflite"),
    }
)
_DOCUMENTS = frozenset({".gif", ".jpeg", ".jpg", ".md", ".mp4", ".pdf", ".png", ".svg", ".webp"})
_OF_SUBFOLDERS = frozenset({".jinja", ".json", ".py"})
_OTHER_FORMATS = frozenset({"coreml", "flax", "metal", "onnx", "openvino", "original", "tf"})
"""Folders with the same model for other programs."""
_SPARE_BYTES = 1 << 30
"""What must stay free on the disk after a download."""

Report = Callable[[int, int], None]
"""Gets the bytes that are here and all bytes."""


@dataclass(frozen=True)
class HubName:
    """A name as studies have it: `org/name`, or `org/name@revision` (a branch, tag or commit)."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """None if `text` is no such name."""
        found = _NAME.fullmatch(text)
        if found is None or ".." in text:
            return None
        return cls(found["repo"], found["revision"])

    @property
    def commit(self) -> str | None:
        """The revision if it is a commit, which never changes."""
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None


def find_commit(name: HubName) -> str | None:
    """The commit that the cache has for the name's revision, or for `main`; None if none."""
    if name.commit:
        return name.commit
    ref = _folder(name) / "refs" / (name.revision or "main")
    try:
        return ref.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def find_snapshot(name: HubName, commit: str) -> Path | None:
    """The folder of a commit in the cache; None if there is none."""
    folder = _folder(name) / "snapshots" / commit
    return folder if folder.is_dir() else None


def check_weights(folder: Path) -> None:
    """Raise ModelError if a folder of the cache has no weights, or not all of them."""
    files = sorted(folder.iterdir())
    gone = [file.name for file in files if not file.exists()]  # links to blobs
    for index in (file for file in files if file.name.endswith(_INDEX) and file.exists()):
        gone += sorted(name for name in _listed(index) if not (folder / name).exists())
    weights = [file for file in files if file.suffix in {".safetensors", ".bin", ".pt", ".gguf"}]
    if gone or not weights:
        missing = f"{gone[0]} is missing" if gone else "it has no weights"
        raise ModelError(
            f"{folder}: this download is not complete: {missing}. Continue it with "
            "`servegrid fetch --configfile STUDY`."
        )


@dataclass(frozen=True)
class Download:
    """The files of one commit that an engine needs, with their sizes in bytes."""

    name: HubName
    commit: str
    sizes: Mapping[str, int]
    missing: tuple[str, ...]
    """Those that are not in the cache yet."""

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def missing_bytes(self) -> int:
        return sum(self.sizes[name] for name in self.missing)


def plan_download(name: HubName, commit: str | None, weights: bool) -> Download:
    """What to fetch of `commit`, or of the name's revision; without weights for a tokenizer.

    Raises ModelError, with the remedy, if the Hub does not give it.
    """
    from huggingface_hub import (
        HfApi,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.hf_api import RepoFile

    try:
        api = HfApi()
        commit = commit or api.model_info(name.repo, revision=name.revision).sha
        assert commit
        tree = api.list_repo_tree(name.repo, recursive=True, revision=commit)
        sizes = {each.path: each.size for each in tree if isinstance(each, RepoFile)}
        shards = None
        index = next((path for path in sorted(sizes) if path.endswith(_INDEX)), None)
        if weights and index and "/" not in index:
            shards = _listed(Path(hf_hub_download(name.repo, index, revision=commit)))
        files = select_files(sizes, weights, shards)
        cached = {
            file: isinstance(try_to_load_from_cache(name.repo, file, revision=commit), str)
            for file in files
        }
        missing = tuple(file for file in files if not cached[file])
        if missing:  # A gated model lists its files, but gives none. Tell it before the others.
            get_hf_file_metadata(hf_hub_url(name.repo, missing[0], revision=commit))
    except Exception as error:
        raise _explain(name, error) from error
    if weights and not any(PurePosixPath(file).suffix in _OTHER_WEIGHTS for file in files):
        raise ModelError(
            f"`{name.repo}` has no weights that an engine of servegrid loads (safetensors, .bin, "
            "or one GGUF file). If it has several GGUF files, download one with "
            f"`hf download {name.repo} FILE` and set `checkpoint` to its path."
        )
    return Download(name, commit, {file: sizes[file] for file in files}, missing)


def newest_commit(name: HubName) -> str | None:
    """The commit that the Hub has now for the name's revision; None if it does not say."""
    from huggingface_hub import HfApi

    if name.commit:
        return name.commit
    try:
        return HfApi().model_info(name.repo, revision=name.revision).sha
    except Exception:  # Only a note depends on it.
        return None


def select_files(
    files: Iterable[str], weights: bool, shards: Iterable[str] | None = None
) -> list[str]:
    """The files of a model that an engine needs, sorted.

    Without `weights`: configuration, tokenizer and code. With them also the safetensors; those of
    the index, `shards`, if there is one, and Mistral's `consolidated` only if there are no others.
    `.bin` files are taken only without safetensors, and a GGUF file only if it is the only weights.
    """
    paths = [PurePosixPath(file) for file in sorted(files)]
    top = [path.name for path in paths if len(path.parts) == 1]
    chosen = [str(path) for path in paths if _is_small_file(path)]
    if not weights:
        return [file for file in chosen if not file.endswith(".index.json")]
    safetensors = [name for name in top if name.endswith(".safetensors")]
    if shards is not None:
        wanted = set(shards)
        safetensors = [str(path) for path in paths if str(path) in wanted]
    usual = [name for name in safetensors if not name.startswith("consolidated")]
    bins = [name for name in top if re.fullmatch(r"(pytorch_)?model.*\.bin", name)]
    ggufs = [name for name in top if name.endswith(".gguf")]
    found = usual or safetensors or bins or (ggufs if len(ggufs) == 1 else [])
    unused = () if found == bins else (".bin.index.json",)
    return sorted({*found, *(file for file in chosen if not file.endswith(unused))})


def check_disk_space(downloads: Iterable[Download]) -> None:
    """Raise ModelError if the disk of the cache is too small for what is missing."""
    cache = _cache()
    cache.mkdir(parents=True, exist_ok=True)
    needed = sum(each.missing_bytes for each in downloads)
    free = shutil.disk_usage(cache).free
    if needed and needed + _SPARE_BYTES > free:
        raise ModelError(
            f"{cache}: the download needs {format_bytes(needed)}, but only "
            f"{format_bytes(free)} are free. Free some space, or set HF_HOME to a folder on a "
            "larger disk, for this command and for the run."
        )


def download(wanted: Download, report: Report) -> Path:
    """Fetch the missing files, and return the folder of the commit.

    Files that are complete stay, so a repeated call continues. A dropped connection is resumed
    within a file. Raises ModelError with the remedy.
    """
    from huggingface_hub import snapshot_download

    name = wanted.name
    try:
        folder = Path(
            snapshot_download(
                name.repo,
                revision=wanted.commit,
                allow_patterns=[_escape(file) for file in wanted.sizes],
                tqdm_class=_progress_class(wanted.missing_bytes, report),
            )
        )
    except Exception as error:
        raise _explain(name, error) from error
    # If the Hub stops answering, snapshot_download returns a folder that is not complete.
    if gone := [file for file in wanted.sizes if not (folder / file).exists()]:
        raise ModelError(
            f"`{name.repo}`: {gone[0]} was not fetched, because the Hub stopped answering. Run "
            "the same command again: it continues."
        )
    return folder


def format_bytes(number: int) -> str:
    """The number with a unit of 1000.

    >>> format_bytes(1_234_000_000)
    '1.2 GB'
    """
    value = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.1f} {unit}" if unit != "B" else f"{number} B"
        value /= 1000
    return f"{value:.1f} TB"


def _is_small_file(path: PurePosixPath) -> bool:
    """Whether it is configuration, tokenizer or code, not weights or a document."""
    if any(part.startswith(".") for part in path.parts):
        return False
    if path.suffix in _OTHER_WEIGHTS | _DOCUMENTS:
        return False
    if len(path.parts) == 1:
        return True
    return path.suffix in _OF_SUBFOLDERS and path.parts[0] not in _OTHER_FORMATS


def _listed(index: Path) -> set[str]:
    """The files that an index of safetensors lists; empty if it has another form."""
    try:
        return {
            str(name)
            for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()


def _progress_class(total: int, report: Report) -> type:
    """A class that stands for tqdm's in `huggingface_hub`, shows nothing, and reports bytes."""
    from tqdm.auto import tqdm

    bars: list[Any] = []

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts_bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "disable": True})
            bars.append(self)

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self._counts_bytes:
                done = max(bar.n for bar in bars if bar._counts_bytes)
                report(min(int(done), total), total)

    return Bar


def _explain(name: HubName, error: Exception) -> ModelError:
    """What an error of `huggingface_hub` means, and the remedy."""
    from huggingface_hub import constants, errors

    if isinstance(error, ModelError):
        return error
    repo, page = name.repo, f"{constants.ENDPOINT}/{name.repo}"
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            f"`{repo}` is gated. Ask for access at {page}, {log_in} with that account, and run the "
            "same command again."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(
            f"`{repo}` has no revision `{name.revision or 'main'}`. Correct it; {page}/tree/main "
            "lists branches, tags and commits."
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    # The Hub answers 401 for what does not exist as well, so that nobody learns of private models.
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return ModelError(
            f"{page} does not exist, or is private, or the token is not valid. Correct the name, "
            f"or {log_in} with an account that may read it."
        )
    if status == 403:
        return ModelError(
            f"{page}: the token may not read this model ({first}). Give it read access to the "
            f"model on {constants.ENDPOINT}/settings/tokens, or {log_in} with another one."
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ModelError(
            f"`{repo}` cannot be fetched: HF_HUB_OFFLINE forbids it. Unset this variable for "
            "`servegrid fetch`; jobs are offline anyway."
        )
    return ModelError(
        f"`{repo}` cannot be fetched from {constants.ENDPOINT} ({type(error).__name__}: {first}). "
        "Check the network (https_proxy, or HF_ENDPOINT for a mirror), and run the same command "
        "again: it continues."
    )


def _escape(file: str) -> str:
    """A pattern that matches only this file."""
    return re.sub(r"([*?\[])", r"[\1]", file)


def _folder(name: HubName) -> Path:
    return _cache() / f"models--{name.repo.replace('/', '--')}"


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()
