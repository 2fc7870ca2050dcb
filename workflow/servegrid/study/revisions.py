"""The study's lock file: the commit of each model of the Hugging Face Hub.

It lies beside the cells. An entry is made once, when the model is fetched or first found, and never
changed: all cells of a study are measured with the same weights. One process at a time writes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from servegrid.errors import ModelError
from servegrid.study.hub import HubName

LOCK = "models.lock.json"
_FORMAT = 1
_WRITERS = f".{LOCK}.lock"
"""Its lock, not that of the file itself, which every writer replaces."""
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
"""Lustre can be mounted without locks. The file is then still written completely or not at all."""


def read_revisions(results: Path) -> dict[str, str]:
    """Commits by name, as the study writes it (`org/name`, `org/name@revision`).

    Empty if the folder has no lock file. Raises ModelError if the file is damaged.
    """
    file = results / LOCK
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        revisions = data["revisions"] if data["format"] == _FORMAT else None
    except PermissionError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror}). Make it readable.") from error
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(revisions, dict) or not all(
        isinstance(each, str) for each in revisions.values()
    ):
        raise _damaged(file, f"expected format {_FORMAT} with a mapping `revisions`")
    for name, commit in revisions.items():
        parsed = HubName.parse(name)
        if parsed and parsed.commit not in (None, commit):
            raise _damaged(file, f"`{name}` has the other revision {commit}")
    return revisions


def add_revisions(results: Path, revisions: Mapping[str, str]) -> None:
    """Add entries to the lock file. Those that are there stay as they are.

    The file is written completely or not at all, by one process at a time. Raises ModelError if
    that fails, or if the file has another commit for a name: another process has pinned it.
    """
    if not revisions or revisions.items() <= read_revisions(results).items():
        return
    try:
        results.mkdir(parents=True, exist_ok=True)
        with _only_writer(results):
            before = read_revisions(results)
            _check_unchanged(results, before, revisions)
            _write(results, {**before, **revisions})
    except OSError as error:
        raise ModelError(
            f"{results / LOCK}: cannot be written ({error.strerror}). Correct the permissions of "
            "the folder, or free some space."
        ) from error


def _check_unchanged(results: Path, before: Mapping[str, str], after: Mapping[str, str]) -> None:
    for name, commit in after.items():
        if before.get(name, commit) != commit:
            raise ModelError(
                f"{results / LOCK}: `{name}` has revision {before[name]}, not {commit}: another "
                "process has pinned it. Run the same command again: it uses this revision."
            )


def _write(results: Path, revisions: Mapping[str, str]) -> None:
    text = json.dumps({"format": _FORMAT, "revisions": revisions}, indent=1, sort_keys=True)
    handle, name = tempfile.mkstemp(prefix=f".{LOCK}.", dir=results)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"{text}\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(results / LOCK)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _only_writer(results: Path) -> Iterator[None]:
    """Wait until no other process writes the lock file of `results`."""
    with (results / _WRITERS).open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield


def _damaged(file: Path, problem: str) -> ModelError:
    return ModelError(
        f"{file}: is damaged ({problem}). Remove it: the commits of cells that are measured are "
        "taken from their records."
    )
