"""The folder through which the main process and an allocation speak to each other.

    allocation.json      what was submitted, by whom; written once by the main process
    todo/TICKET          a queued task; the main process puts it, the allocation takes it
    doing/TICKET         the task under way
    journal.jsonl        what happened, one event a line; only the allocation writes
    closed               no more tasks will come

Moving a file from todo/ to doing/ is the claim: whoever removes it from todo/ owns the task, so
the main process can take back what has not been started. The journal alone tells what has been
finished. It survives either side, and an allocation that Slurm starts again goes on from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """One Snakemake job as an allocation runs it.

    `key` is the same for the same job in every run of the workflow. `log` is where the output
    of the job goes in the end (absolute; None: it stays in the spool). Of several that wait, the
    one with the lowest `order` is begun first.
    """

    key: str
    argv: tuple[str, ...]
    cwd: str
    log: str | None
    order: int = 0


@dataclass(frozen=True)
class Event:
    """One line of a journal: `kind` is one of the constants below, `data` depends on it."""

    kind: str
    data: Mapping[str, Any]


STARTED = "started"  # pid, start_ticks (see liveness), host
UP = "up"  # seconds
BEGAN = "began"  # ticket
DONE = "done"  # ticket, status (negative: killed by that signal), at_work (two times or null)
STOPPED = "stopped"  # reason; Slurm may start this allocation again
ENDED = "ended"  # reason, detail; it will not go on


class Spool:
    """One allocation's folder; each side uses its own half of the methods."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._todo, self._doing = root / "todo", root / "doing"
        self._known: deque[str] = deque()
        self._sequence = 0

    @classmethod
    def create(cls, root: Path) -> Spool:
        """A new, empty one. Raises FileExistsError where the folder already exists."""
        root.mkdir(parents=True)
        for name in ("todo", "doing", "logs"):
            (root / name).mkdir()
        return cls(root)

    @property
    def closed(self) -> bool:
        return (self.root / "closed").exists()

    def close(self) -> None:
        """Promise that no more tasks will come."""
        (self.root / "closed").touch()

    def log_of(self, ticket: str) -> Path:
        """Where the output of a task is caught."""
        return self.root / "logs" / f"{ticket}.log"

    # the main process

    def put(self, task: Task) -> str:
        """Queue a task behind all others of its order and return its ticket."""
        self._sequence = max(time.time_ns(), self._sequence + 1)
        ticket = f"{task.order:06d}.{self._sequence:020d}-{task.key}"
        write_atomically(self._todo / ticket, json.dumps(asdict(task)))
        return ticket

    def clear(self) -> None:
        """Take back everything that has not been started."""
        for path in self._todo.iterdir():
            path.unlink(missing_ok=True)

    def under_way(self) -> dict[str, str]:
        """The tickets of what has been started and not yet finished, by key."""
        tickets = (path.name for path in self._doing.iterdir())
        return {key_of(ticket): ticket for ticket in tickets}

    def done_since(self, when: float) -> set[str]:
        """The keys of the tasks that ended well after `when` (seconds since the epoch)."""
        return {
            key_of(event.data["ticket"])
            for event in self.journal().new()
            if event.kind == DONE and event.data["status"] == 0 and event.data["time"] > when
        }

    def journal(self) -> JournalReader:
        return JournalReader(self.root / "journal.jsonl")

    # the allocation

    def waiting(self) -> bool:
        """Whether there is something to take."""
        if not self._known:
            # What others have put appears at once on network file systems only after a change.
            os.utime(self._todo)
            # A listing is sorted once for all it contains, not once for each task.
            names = (path.name for path in self._todo.iterdir())
            self._known.extend(sorted(name for name in names if not name.startswith(".")))
        return bool(self._known)

    def take(self) -> tuple[str, Task] | None:
        """Claim the next task in order, or None where the queue is empty."""
        while self.waiting():
            ticket = self._known.popleft()
            with contextlib.suppress(FileNotFoundError):
                claimed = (self._todo / ticket).rename(self._doing / ticket)
                data = json.loads(claimed.read_text())
                return ticket, Task(**data | {"argv": tuple(data["argv"])})
        return None

    def record(self, kind: str, **data: Any) -> None:
        """Append an event to the journal."""
        line = json.dumps({"event": kind, "time": time.time(), **data}) + "\n"
        path = self.root / "journal.jsonl"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def finish(self, ticket: str, status: int, at_work: list[float] | None = None) -> None:
        self.record(DONE, ticket=ticket, status=status, at_work=at_work)
        (self._doing / ticket).unlink(missing_ok=True)

    def restore(self) -> bool:
        """Queue again what was under way when this allocation was stopped.

        Returns False where it has ended for good and must not go on.
        """
        events = self.journal().new()
        done = {event.data["ticket"] for event in events if event.kind == DONE}
        for path in self._doing.iterdir():
            if path.name in done:
                path.unlink()
            else:
                path.rename(self._todo / path.name)
        with (self.root / "journal.jsonl").open("a") as file:
            if file.tell():
                file.write("\n")  # a line that was cut off must not swallow the next one
        return not any(event.kind == ENDED for event in events)


class JournalReader:
    """Reads a journal from where it was left the last time."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def new(self) -> list[Event]:
        """The events since the last call; a line that is still being written waits."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        return list(_events(complete))


def _events(text: bytes) -> Iterator[Event]:
    for line in text.splitlines():
        # Only the line at which the writer was killed can be incomplete.
        with contextlib.suppress(ValueError):
            data = json.loads(line)
            yield Event(data.pop("event"), data)


def key_of(ticket: str) -> str:
    return ticket.partition("-")[2]


def write_atomically(path: Path, text: str) -> None:
    """Readers see the whole text or no file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
