"""The study's lock file: the commit of each model of the Hugging Face Hub.

It lies beside the cells. An entry is made once, when the model is fetched or first found, and never
changed: all cells of a study are measured with the same weights.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from servegrid.errors import ModelError

LOCK = "models.lock.json"
_FORMAT = 1


def read_revisions(results: Path) -> dict[str, str]:
    """Commits by name, as the study writes it (`org/name`, `org/name@revision`).

    Empty if the folder has no lock file. Raises ModelError if the file is damaged.
    """
    file = results / LOCK
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        revisions = data["revisions"] if data["format"] == _FORMAT else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(revisions, dict) or not all(
        isinstance(each, str) for each in revisions.values()
    ):
        raise _damaged(file, f"expected format {_FORMAT} with a mapping `revisions`")
    return revisions


def add_revisions(results: Path, revisions: Mapping[str, str]) -> None:
    """Add entries to the lock file. Those that are there stay as they are.

    The file is written completely or not at all. Raises ModelError if that fails.
    """
    before = read_revisions(results)
    after = {**revisions, **before}
    if after == before:
        return
    text = json.dumps({"format": _FORMAT, "revisions": after}, indent=1, sort_keys=True)
    try:
        results.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{LOCK}.", dir=results)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"{text}\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(results / LOCK)
    except OSError as error:
        raise ModelError(
            f"{results / LOCK}: cannot be written ({error.strerror}). Correct the permissions of "
            "the folder, or free some space."
        ) from error


def _damaged(file: Path, problem: str) -> ModelError:
    return ModelError(
        f"{file}: is damaged ({problem}). Remove it: the commits of cells that are measured are "
        "taken from their records."
    )
