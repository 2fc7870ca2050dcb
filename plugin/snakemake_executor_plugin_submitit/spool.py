"""The folder through which the main process and an allocation communicate.

    allocation.json      what was submitted; the main process writes it once
    todo/TICKET          a queued task; the main process writes it, the allocation takes it
    doing/TICKET         the task that runs
    journal.jsonl        events, one per line; only the allocation writes
    closed               no more tasks will come

An allocation claims a task by moving its file from todo/ to doing/. Whoever removes a file from
todo/ owns the task, so the main process can take back tasks that have not started. Only the
journal says which tasks have finished. It survives both sides, and an allocation that Slurm
restarts continues from it.
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

    `key` is the same for the same job in every run of the workflow. The job's output ends up in
    `log` (an absolute path; None: it stays in the spool). The waiting task with the lowest
    `order` starts first.
    """

    key: str
    argv: tuple[str, ...]
    cwd: str
    log: str | None
    order: int = 0


@dataclass(frozen=True)
class Event:
    """One line of a journal. `kind` is one of the constants below; `data` depends on it."""

    kind: str
    data: Mapping[str, Any]


STARTED = "started"
"""The allocation's process started; data: pid, start_ticks (see liveness), host."""
SERVICE_STARTED = "service_started"
"""data: seconds that the service took to start."""
JOB_STARTED = "job_started"
"""data: ticket."""
JOB_FINISHED = "job_finished"
"""data: ticket, status (negative: killed by this signal), work_span (start and end, or null)."""
STOPPED = "stopped"
"""The allocation was stopped; Slurm may start it again; data: reason."""
ENDED = "ended"
"""The allocation ended for good; data: reason, detail."""


class Spool:
    """The folder of one allocation. Each side uses its own half of the methods."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._todo, self._doing = root / "todo", root / "doing"
        self._listed: deque[str] = deque()
        self._sequence = 0

    @classmethod
    def create(cls, root: Path) -> Spool:
        """A new, empty spool. Raises FileExistsError if the folder exists."""
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700)
        for name in ("todo", "doing", "logs"):
            (root / name).mkdir()
        return cls(root)

    @property
    def closed(self) -> bool:
        return (self.root / "closed").exists()

    def close(self) -> None:
        """Announce that no more tasks will come."""
        (self.root / "closed").touch()

    def task_log(self, ticket: str) -> Path:
        """The file that receives the output of a task."""
        return self.root / "logs" / f"{ticket}.log"

    # the main process

    def put(self, task: Task) -> str:
        """Queue a task behind all others with the same order. Returns its ticket."""
        self._sequence = max(time.time_ns(), self._sequence + 1)
        ticket = f"{task.order:06d}.{self._sequence:020d}-{task.key}"
        write_atomically(self._todo / ticket, json.dumps(asdict(task)))
        return ticket

    def clear(self) -> None:
        """Take back all tasks that have not started."""
        for path in self._todo.iterdir():
            path.unlink(missing_ok=True)

    def running(self) -> dict[str, str]:
        """The tickets of tasks that have started and not finished, by key."""
        tickets = (path.name for path in self._doing.iterdir())
        return {ticket_key(ticket): ticket for ticket in tickets}

    def finished_since(self, when: float) -> set[str]:
        """The keys of the tasks that succeeded after `when` (seconds since the epoch)."""
        return {
            ticket_key(event.data["ticket"])
            for event in self.journal().read_new()
            if event.kind == JOB_FINISHED
            and event.data["status"] == 0
            and event.data["time"] > when
        }

    def journal(self) -> JournalReader:
        return JournalReader(self.root / "journal.jsonl")

    # the allocation

    def has_tasks(self) -> bool:
        """Whether a task waits."""
        if not self._listed:
            # Network file systems show new files of other nodes at once only after a change here.
            os.utime(self._todo)
            # One listing is sorted once, not once per task.
            names = (path.name for path in self._todo.iterdir())
            self._listed.extend(sorted(name for name in names if not name.startswith(".")))
        return bool(self._listed)

    def orders(self) -> list[int]:
        """The orders of the tasks that wait, ascending."""
        self.has_tasks()
        return [ticket_order(ticket) for ticket in self._listed]

    def prefer(self, order: int) -> None:
        """Take the first waiting task with this order next, if there is one."""
        for ticket in self._listed:
            if ticket_order(ticket) == order:
                self._listed.remove(ticket)
                self._listed.appendleft(ticket)
                return

    def take(self) -> tuple[str, Task] | None:
        """Claim the next task; None if no task waits. A damaged task counts as failed."""
        while self.has_tasks():
            ticket = self._listed.popleft()
            with contextlib.suppress(FileNotFoundError):
                claimed = (self._todo / ticket).rename(self._doing / ticket)
                try:
                    data = json.loads(claimed.read_text(encoding="utf-8"))
                    return ticket, Task(**data | {"argv": tuple(data["argv"])})
                except (ValueError, KeyError, TypeError, RecursionError):
                    self.finish(ticket, status=1)  # the file is damaged: report it as failed
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

    def finish(self, ticket: str, status: int, work_span: list[float] | None = None) -> None:
        """Record that a claimed task has finished, and release it."""
        self.record(JOB_FINISHED, ticket=ticket, status=status, work_span=work_span)
        (self._doing / ticket).unlink(missing_ok=True)

    def count_stops(self) -> int:
        """How often the allocation was stopped since the last job that finished."""
        stops = 0
        for event in self.journal().read_new():
            if event.kind == JOB_FINISHED:
                stops = 0
            stops += event.kind == STOPPED
        return stops

    def restore(self) -> bool:
        """Queue the tasks again that ran when this allocation was stopped.

        Returns False if the allocation has ended for good and must not continue.
        """
        events = self.journal().read_new()
        finished = {event.data["ticket"] for event in events if event.kind == JOB_FINISHED}
        for path in self._doing.iterdir():
            if path.name in finished:
                path.unlink()
            else:
                path.rename(self._todo / path.name)
        with (self.root / "journal.jsonl").open("a", encoding="utf-8") as file:
            if file.tell():
                file.write("\n")  # an incomplete last line must not spoil the next one
        return not any(event.kind == ENDED for event in events)


class JournalReader:
    """Reads a journal step by step."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read_new(self) -> list[Event]:
        """The events since the last call. An incomplete last line is left for the next call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        return list(_parse_events(complete))


def _parse_events(text: bytes) -> Iterator[Event]:
    for line in text.splitlines():
        # A line is incomplete if the writer was killed, or the disk was full.
        with contextlib.suppress(ValueError, RecursionError):
            data = json.loads(line)
            if isinstance(data, dict) and isinstance(data.get("event"), str):
                yield Event(data.pop("event"), data)


def ticket_key(ticket: str) -> str:
    """The key of the ticket's task."""
    return ticket.partition("-")[2]


def ticket_order(ticket: str) -> int:
    """The order of the ticket's task."""
    return int(ticket.partition(".")[0])


def write_atomically(path: Path, text: str, mode: int = 0o666) -> None:
    """Readers see the complete text or no file. The umask applies to its `mode`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)
