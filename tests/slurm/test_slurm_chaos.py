"""A campaign of random faults while the article's study is rehearsed on a real Slurm.

`make chaos SEED=1 FAULTS=500` runs it; `make test` runs a short one. After every fault and at the
end of every study the invariants of `Campaign` hold. A table shows the faults by kind, how many
there were, and the time without a finished cell after them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest

from servegrid.node.folders import remove_abandoned
from servegrid.records.verdict import was_served
from servegrid.reference.published import load_published
from servegrid.study.config import load_study
from slurm.conftest import Workspace, plafrim_kinds, with_options
from slurm.test_slurm_rehearsal import MEASURED, Rehearsal
from snakemake_executor_plugin_submitit.spool import JOB_FINISHED, Event, JournalReader, ticket_key

from helpers.cluster import Cluster, Options  # isort: skip
from helpers.faulty_folder import LATE_S, FaultyFolder, faulty_folder  # isort: skip
from helpers.stepped_clock import SteppedClock  # isort: skip

SEED = int(os.environ.get("SEED", "1"))
FAULTS = int(os.environ.get("FAULTS", "8"))
IS_SHORT = FAULTS <= 50
LIMIT_S = 60.0 * float(os.environ.get("MINUTES", "12"))
STUDY_LIMIT_S = 900.0
SILENCE_LIMIT_S = 240.0
"""The longest time without a finished cell. Slurm itself needs a minute to notice a lost node."""
SETTLED_S = 10.0
"""A cell counts as finished this long after its job has recorded so, if the record is on disk. The
main process reads that record; its own notes need a moment, too."""
EACH_KIND = 1
"""Each kind is injected this often first. After that, kinds that take less time come more often."""
DEPLOYED = ("model", "quantization", "gpu", "gpu_count", "concurrency", "input_len")
NOT_SERVED = {
    tuple(row[name] for name in DEPLOYED)
    for row in load_published("inria-2024").rows
    if math.isnan(row["seconds_per_100_tokens"])
}
"""The article's dashes: the emulated engine answers with an error there, as the real one did."""
UNLOCK = (sys.executable, "-m", "snakemake_executor_plugin_submitit", "unlock")

Fault = Callable[["Campaign"], bool]
"""Injects a fault. Returns False if that is not possible now."""
KINDS: dict[str, Fault] = {}


def fault(function: Fault) -> Fault:
    KINDS[function.__name__.replace("_", " ")] = function
    return function


class Journals:
    """What the allocations have recorded about each trial's job.

    A job that is killed after it wrote its files, and before that is recorded, runs again, as it
    must. So the files alone do not show that a cell is finished.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trials: dict[str, str] = {}
        self.events: dict[str, list[tuple[str, Event]]] = defaultdict(list)
        self._readers: dict[Path, JournalReader] = {}

    def read(self) -> None:
        for task in self.folder.glob("*/*/[td]o*/[!.]*"):
            if (key := ticket_key(task.name)) not in self.trials:
                with contextlib.suppress(FileNotFoundError):
                    log = Path(json.loads(task.read_bytes())["log"])
                    self.trials[key] = str(log.with_suffix("")).partition("/logs/cells/")[2]
        for path in self.folder.glob("*/*/journal.jsonl"):
            reader = self._readers.setdefault(path, JournalReader(path))
            for event in reader.read_new():
                if "ticket" in event.data:
                    key = ticket_key(event.data["ticket"])
                    self.events[key].append((path.parent.name, event))

    def finished(self) -> Counter[str]:
        """How often the job of each trial has succeeded."""
        return Counter(
            self.trials.get(key, key)
            for key, events in self.events.items()
            for _, event in events
            if event.kind == JOB_FINISHED and event.data["status"] == 0
        )

    def describe(self, trial: str) -> str:
        """The history of the trial's job."""
        return "\n".join(
            f"{event.data['time']:.1f} allocation {allocation}: {event.kind} {event.data}"
            for key, events in self.events.items()
            if self.trials.get(key) == trial
            for allocation, event in events
        )


class Study(Workspace):
    """A folder on a file system that can fail, and nodes whose clock can be stepped.

    The output goes to a terminal, so the log is on another file system.
    """

    def __init__(
        self, folder: Path, cluster: Cluster, clock: SteppedClock, faulty: FaultyFolder | None
    ) -> None:
        super().__init__(folder, cluster)
        self.clock, self.faulty = clock, faulty
        # Only what runs on the nodes gets the clock.
        sbatch = cluster.folder / "bin" / "sbatch"
        settings = " ".join(f"{name}={value}" for name, value in clock.env.items())
        sbatch.write_text(sbatch.read_text().replace("SLURM_CONF=", f"{settings} SLURM_CONF="))

    @property
    def log(self) -> Path:
        return self.folder.parent / "output.log"

    @property
    def stored(self) -> Path:
        """The same files without the faults of the file system, and without its overhead."""
        return self.folder if self.faulty is None else self.faulty.path.parent / "backing"

    def break_disk(self, fault: str, seconds: float) -> bool:
        """The file system has this fault for a while."""
        if self.faulty is None:
            return False
        with self.faulty.fault(fault):
            time.sleep(seconds)
        return True


@pytest.fixture
def study(cluster: Cluster, tmp_path: Path) -> Iterator[Study]:
    with contextlib.ExitStack() as stack:
        folder, faulty = tmp_path / "work", None
        try:
            faulty = stack.enter_context(faulty_folder(tmp_path / "disk"))
            folder = faulty.path
        except RuntimeError as error:
            print(f"The faults of the file system are left out. {error}")
        work = Study(folder, cluster, SteppedClock(tmp_path), faulty)
        stack.callback(work.close)
        yield work


class Campaign:
    """Runs one study after another and injects faults meanwhile.

    Invariants: a finished cell is never measured again and never changes; a damaged cell is in no
    table; the same command continues after every fault; each cell is in the tables exactly once;
    nothing is left at the end: no process, no job of Slurm, no temporary file or folder.
    """

    def __init__(self, work: Study) -> None:
        self.random = random.Random(SEED)
        self.work = work
        self.cluster = work.cluster
        self.rehearsal = Rehearsal(work, full=not IS_SHORT, concurrency=(1, 2, 4, 8, 16, 32, 64))
        kinds = plafrim_kinds()
        work.kinds(**{name: kind | {"slurm_partition": "preempt"} for name, kind in kinds.items()})
        self.trials = {each.id for each in load_study(work.folder / "study.yaml").all_trials}
        self.temporary = self.list_temporary()
        self.cleanup: list[Callable[[], object]] = []
        self.lost_s: dict[str, list[float]] = defaultdict(list)
        self.took_s: dict[str, list[float]] = defaultdict(list)
        self.digests: dict[str, str] = {}
        self.journals = self.new_journals()
        self.known: Counter[str] = Counter()
        self.recorded: dict[str, float] = {}
        self.planted: set[str] = set()
        self.damaged: dict[str, str] = {}
        self.asked_again = False
        self.studies = 0
        self.main: subprocess.Popen[bytes] | None = None

    # the study

    def run(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        gaps = [0.3]
        while self.injected() < FAULTS:
            assert time.monotonic() < deadline, f"only {self.injected()} faults in {LIMIT_S:g} s"
            self.wait_for_cells(self.random.randint(0, 2))
            chosen = time.monotonic()
            kind = self.choose()
            if kind is None:
                continue
            before, began = self.measured(), time.monotonic()
            done = self.wait_for_cells(1)
            self.restore()
            gap = time.monotonic() - began
            self.lost_s[kind].append(max(0.0, gap - statistics.median(gaps)))
            self.took_s[kind].append(time.monotonic() - chosen)
            print(f"{self.injected()} {kind}: {self.took_s[kind][-1]:.1f} s", flush=True)
            if done and self.measured() > before:
                gaps.append(min(gap, 2.0))
        while self.main is not None:
            self.wait_for_cells(10**6)

    def start(self) -> subprocess.Popen[bytes]:
        return self.rehearsal.start(target=MEASURED)

    def injected(self) -> int:
        return sum(map(len, self.lost_s.values()))

    def choose(self) -> str | None:
        """Inject a fault: each kind a few times first, then the quick kinds more often."""

        def rank(kind: str) -> tuple[int, float]:
            times = len(self.lost_s[kind])
            cost_s = 2 + statistics.median(self.took_s[kind] or [0.0])
            return min(times, EACH_KIND), -(self.random.random() ** cost_s)

        for kind in sorted(KINDS, key=rank)[:8]:
            with contextlib.suppress(psutil.Error, subprocess.SubprocessError, OSError):
                if KINDS[kind](self):
                    return kind
        return None

    def measured(self) -> int:
        """The number of cells whose files are there. Checks the finished ones."""
        self.finished()
        root = self.work.stored / "results" / "cells"
        return sum((root / trial / "requests.parquet").exists() for trial in self.trials)

    def wait_for_cells(self, count: int) -> bool:
        """Until `count` more cells are measured. False if the study ended before."""
        wanted = self.measured() + count
        silent_since, known = time.monotonic(), self.measured()
        while (now := self.measured()) < wanted:
            if now != known or now == len(self.trials):  # then the tables and figures are made
                silent_since, known = time.monotonic(), now
            silence = time.monotonic() - silent_since
            assert silence < SILENCE_LIMIT_S, f"no cell for {silence:.0f} s: {self.output()}"
            if not self.continue_study():
                return False
            time.sleep(0.2)
        return True

    def continue_study(self) -> bool:
        """Start the same command again if it has ended. False if the study is complete."""
        if self.main is None:
            self.main = self.start()
        status = self.main.poll()
        if status is None:
            return True
        self.restore()
        if status == 0 and self.unnoticed() and not self.asked_again:
            # Damaged after the tables were made. The next run must notice it.
            self.asked_again = True
            self.main = self.start()
            return True
        if status == 0:
            self.check_complete()
            self.main = None
            return False
        damaged = " ".join(re.findall(r"rm -r (.+)", self.output())).split()
        for trial in {path.removeprefix("results/cells/") for path in damaged} - {"…"}:
            # What the message says about a damaged cell.
            assert trial in self.damaged and trial not in self.finished(), trial
            shutil.rmtree(self.work.folder / "results/cells" / trial)
        subprocess.run(UNLOCK, cwd=self.work.folder, env=self.cluster.env, capture_output=True)
        self.main = self.start()
        return True

    def new_journals(self) -> Journals:
        return Journals(self.work.stored / ".snakemake" / "submitit")

    def finished(self) -> set[str]:
        """The finished cells: their jobs have recorded so since the cell was damaged, if it was."""
        self.journals.read()
        for trial, count in self.journals.finished().items():
            if trial in self.digests or count <= self.known[trial]:
                continue
            recorded = self.recorded.setdefault(trial, time.monotonic())
            with contextlib.suppress(FileNotFoundError):
                digest = self.digest(trial)
                is_settled = time.monotonic() > recorded + SETTLED_S
                if is_settled and digest != self.damaged.get(trial):
                    self.digests[trial] = digest
        return set(self.digests)

    def digest(self, trial: str) -> str:
        root = self.work.stored / "results" / "cells" / trial
        data = b"".join(
            (root / f"{name}.parquet").read_bytes() for name in ("requests", "telemetry")
        )
        return hashlib.sha256(data).hexdigest()

    def unnoticed(self) -> list[str]:
        """The damaged cells that have not been measured again."""
        return [trial for trial, digest in self.damaged.items() if self.digest(trial) == digest]

    def check_complete(self) -> None:
        cells = pd.read_parquet(self.work.folder / "results/tables/cells.parquet")
        drift_checks = pd.read_csv(self.work.folder / "results/tables/drift_checks.csv")
        assert len(cells) + len(drift_checks) == len(self.trials)
        assert not cells["spec_digest"].duplicated().any()
        served = [key not in NOT_SERVED for key in cells[list(DEPLOYED)].itertuples(index=False)]
        assert [was_served(verdict) for verdict in cells["verdict"]] == served
        # With `prune`, a dash above another one is not tried.
        assert set(cells["verdict"]) <= {"ok", "http_error", "not_run"}
        assert not self.unnoticed(), f"{self.unnoticed()} are damaged and were accepted"
        for trial, digest in self.digests.items():
            problem = f"{trial} was measured again or changed"
            assert self.digest(trial) == digest, f"{problem}:\n{self.journals.describe(trial)}"
        self.wait_until(lambda: not self.work.queue_alive(), "a job is left")
        self.wait_until(lambda: not self.processes(""), "a process is left")
        hidden = [
            path
            for path in (self.work.folder / "results").rglob(".*")
            if path.name not in self.planted and ".snakemake_timestamp" not in path.name
        ]
        assert not hidden, hidden
        # What Slurm killed at once, the next process of the same user on the node removes.
        remove_abandoned()
        self.wait_until(lambda: self.list_temporary() <= self.temporary, "a temporary file is left")
        self.studies += 1
        self.digests.clear()
        self.journals = self.new_journals()
        self.known.clear()
        self.recorded.clear()
        self.planted.clear()
        self.damaged.clear()
        self.asked_again = False
        for name in ("results", ".snakemake"):
            shutil.rmtree(self.work.folder / name)

    def wait_until(self, test: Callable[[], object], problem: str, limit_s: float = 60) -> None:
        deadline = time.monotonic() + limit_s
        while not test():
            found = [each.cmdline() for each in self.processes("")]
            left = self.list_temporary() - self.temporary
            assert time.monotonic() < deadline, f"{problem}: {found} {left} {self.work.queue()}"
            time.sleep(0.2)

    def restore(self) -> None:
        while self.cleanup:
            self.cleanup.pop()()

    def output(self) -> str:
        return self.work.log.read_text()

    @staticmethod
    def list_temporary() -> set[str]:
        names = ("servegrid", "tmp", "torchinductor", "submitit")
        found = [*os.listdir("/tmp"), *(f"shm/{name}" for name in os.listdir("/dev/shm"))]
        return {name for name in found if name.startswith((*names, "shm/"))}

    # processes

    def processes(self, part: str) -> list[psutil.Process]:
        """The processes of this campaign, on all nodes, with `part` in their command."""
        own = {os.getpid(), *(each.pid for each in psutil.Process().parents())}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline())
                folder = str(self.work.folder)
                is_ours = folder in command or process.cwd() == folder
                is_other = process.pid in own or part not in command
                is_other |= "slurmstepd" in command or "faulty_folder" in command
                if is_ours and not is_other and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def signal_one(self, part: str, number: signal.Signals) -> bool:
        found = self.processes(part)
        if not found:
            return False
        self.random.choice(found).send_signal(number)
        return True

    def signal_main(self, number: signal.Signals) -> bool:
        if self.main is None or self.main.poll() is not None or not self.digests:
            return False
        os.killpg(self.main.pid, number)
        return True

    def running_job(self) -> str | None:
        jobs = [job for job, state, _ in self.work.queue() if state == "RUNNING"]
        return self.random.choice(jobs) if jobs else None

    def busy_node(self) -> str | None:
        """The node of a running job that has one node."""
        queue = self.work.queue()
        nodes = [node for _, state, node in queue if state == "RUNNING" and "[" not in node]
        return self.random.choice(nodes) if nodes else None

    def pause_job(self, stop: str, resume: str, seconds: float) -> bool:
        """Stop a running job with one command of scontrol and continue it with another."""
        job = self.running_job()
        if job is None:
            return False
        self.cluster.call("scontrol", stop, job)
        time.sleep(seconds)
        self.cluster.call("scontrol", resume, job, check=False)
        return True

    def scontrol(self, *words: str) -> bool:
        job = self.running_job()
        if job is None:
            return False
        self.cluster.call("scontrol", *(word.replace("JOB", job) for word in words))
        return True

    def break_command(self, name: str, seconds: float) -> bool:
        """A command of Slurm fails for a while, as if the controller did not answer."""
        path = self.cluster.folder / "bin" / name
        text = path.read_text()
        path.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
        time.sleep(seconds)
        path.write_text(text)
        return True

    def damage(self, change: Callable[[Path], object]) -> bool:
        """Damage a file of a finished cell. The cell must then be measured again."""
        if len(self.digests) < 2:
            return False
        trial = self.random.choice(sorted(self.digests))
        name = self.random.choice(["requests", "telemetry"])
        del self.digests[trial]
        self.known[trial] = self.journals.finished()[trial]
        self.recorded.pop(trial, None)
        change(self.work.folder / "results" / "cells" / trial / f"{name}.parquet")
        with contextlib.suppress(FileNotFoundError):
            self.damaged[trial] = self.digest(trial)
        return True


# the main process


@fault
def main_killed(campaign: Campaign) -> bool:
    return campaign.signal_main(signal.SIGKILL)


@fault
def main_terminated(campaign: Campaign) -> bool:
    return campaign.signal_main(signal.SIGTERM)


@fault
def main_interrupted(campaign: Campaign) -> bool:
    return campaign.signal_main(signal.SIGINT)


@fault
def main_stopped_for_a_while(campaign: Campaign) -> bool:
    if not campaign.signal_main(signal.SIGSTOP):
        return False
    time.sleep(3)
    return campaign.signal_main(signal.SIGCONT)


@fault
def second_main_process(campaign: Campaign) -> bool:
    """It must end at once, because the folder is locked, and disturb nothing."""
    if campaign.main is None or campaign.main.poll() is not None or not campaign.digests:
        return False
    log = campaign.work.log
    first = log.with_suffix(".first")
    log.rename(first)  # the first process keeps writing to it
    second = campaign.start()
    status = second.wait(timeout=60)
    text = log.read_text()
    first.rename(log)
    assert status != 0 or campaign.main.poll() is not None, text
    return True


# processes on the nodes


@fault
def allocation_killed(campaign: Campaign) -> bool:
    return campaign.signal_one("submitit.core._submit", signal.SIGKILL)


@fault
def allocation_terminated(campaign: Campaign) -> bool:
    return campaign.signal_one("submitit.core._submit", signal.SIGTERM)


@fault
def allocation_stopped_for_a_while(campaign: Campaign) -> bool:
    found = campaign.processes("submitit.core._submit")
    if not found:
        return False
    process = campaign.random.choice(found)
    process.suspend()
    time.sleep(3)
    process.resume()
    return True


@fault
def runner_killed(campaign: Campaign) -> bool:
    return campaign.signal_one("runner.main()", signal.SIGKILL)


def jobs_of_runners(campaign: Campaign) -> list[psutil.Process]:
    return [child for runner in campaign.processes("runner.main()") for child in runner.children()]


def signal_job(campaign: Campaign, number: signal.Signals) -> bool:
    found = jobs_of_runners(campaign)
    if not found:
        return False
    campaign.random.choice(found).send_signal(number)
    return True


@fault
def client_killed(campaign: Campaign) -> bool:
    return signal_job(campaign, signal.SIGKILL)


@fault
def client_terminated(campaign: Campaign) -> bool:
    return signal_job(campaign, signal.SIGTERM)


@fault
def client_interrupted(campaign: Campaign) -> bool:
    return signal_job(campaign, signal.SIGINT)


@fault
def sampler_killed(campaign: Campaign) -> bool:
    return campaign.signal_one("servegrid.telemetry.sampler", signal.SIGKILL)


@fault
def reaper_killed(campaign: Campaign) -> bool:
    return campaign.signal_one("servegrid.node.reaper", signal.SIGKILL)


@fault
def mock_server_killed(campaign: Campaign) -> bool:
    return campaign.signal_one("servegrid.mock_server", signal.SIGKILL)


# Slurm


@fault
def job_cancelled(campaign: Campaign) -> bool:
    job = campaign.running_job()
    return job is not None and campaign.cluster.call("scancel", job) is not None


@fault
def job_killed_by_slurm(campaign: Campaign) -> bool:
    job = campaign.running_job()
    return job is not None and campaign.cluster.call("scancel", "-s", "KILL", "-f", job) is not None


@fault
def job_requeued(campaign: Campaign) -> bool:
    return campaign.scontrol("requeue", "JOB")


@fault
def job_requeued_and_held(campaign: Campaign) -> bool:
    return campaign.pause_job("requeuehold", "release", 4)


@fault
def job_suspended_for_a_while(campaign: Campaign) -> bool:
    return campaign.pause_job("suspend", "resume", 3)


@fault
def time_limit_reached(campaign: Campaign) -> bool:
    return campaign.scontrol("update", "JobId=JOB", "TimeLimit=1")


@fault
def job_preempted(campaign: Campaign) -> bool:
    node = campaign.busy_node()
    if node is None:
        return False
    campaign.cluster.call(
        *("sbatch", "--partition=routage", f"--nodelist={node}"),
        *("--exclusive", "--mem=0", "--output=/dev/null", "--time=1", "--wrap=sleep 2"),
    )
    return True


@fault
def node_lost(campaign: Campaign) -> bool:
    node = campaign.busy_node()
    if node is None:
        return False
    campaign.cluster.lose_node(node)
    time.sleep(2)
    campaign.cluster.resume_node(node)
    return True


@fault
def launch_fails(campaign: Campaign) -> bool:
    """The prolog of a node fails, so Slurm holds the job that it sends there."""
    node = campaign.random.choice(["sirocco14", "sirocco15", "sirocco21", "sirocco22"])
    campaign.cluster.spoil_node(node)
    job = campaign.running_job()
    if job is not None:
        campaign.cluster.call("scancel", job, check=False)
    time.sleep(5)
    (campaign.cluster.folder / f"spoilt-{node}").unlink()
    campaign.cluster.call("scontrol", "update", f"nodename={node}", "state=resume", check=False)
    return True


@fault
def controller_restarted(campaign: Campaign) -> bool:
    campaign.cluster.lose_controller()
    time.sleep(3)
    campaign.cluster.return_controller()
    return True


@fault
def database_lost(campaign: Campaign) -> bool:
    campaign.cluster.lose_database()
    time.sleep(3)
    campaign.cluster.return_database()
    return True


def break_command(command: str, seconds: float) -> Fault:
    return lambda campaign: campaign.break_command(command, seconds)


for command, seconds in {
    "squeue": 10,
    "sbatch": 6,
    "scontrol": 6,
    "scancel": 6,
    "sacct": 6,
}.items():
    KINDS[f"{command} fails"] = break_command(command, seconds)


# users and clocks


@fault
def second_user(campaign: Campaign) -> bool:
    """Another user, who may read everything, starts the same command. It must disturb nothing."""
    if not campaign.digests or os.geteuid() != 0:
        return False
    another = ("setpriv", "--reuid=12345", "--clear-groups", "--no-new-privs")
    read = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    with tempfile.TemporaryDirectory() as home:
        os.chown(home, 12345, 0)
        done = subprocess.run(
            [*another, *read, *campaign.work.command(*campaign.rehearsal.arguments())],
            cwd=campaign.work.folder,
            env=campaign.cluster.env | {"HOME": home, "XDG_CACHE_HOME": home},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode != 0
    assert "ermission" in done.stdout + done.stderr, done.stdout + done.stderr
    return True


@fault
def clock_stepped(campaign: Campaign) -> bool:
    """The clock of all nodes is stepped, stays wrong for a while and comes back."""
    campaign.work.clock.step(campaign.random.choice([-90.0, -2.0, 2.0, 90.0]))
    campaign.cleanup.append(lambda: campaign.work.clock.step(0.0))
    return True


# files and file systems


def break_disk(disk_fault: str, seconds: float) -> Fault:
    return lambda campaign: campaign.work.break_disk(disk_fault, seconds)


KINDS |= {
    "disk full for a while": break_disk("full", 4),
    "disk read only for a while": break_disk("read-only", 4),
    "disk slow for a while": break_disk("slow", 6),
    "new files seen late": break_disk("late", 3 * LATE_S),
}


@fault
def socket_left(campaign: Campaign) -> bool:
    """A killed process leaves its temporary folder with a socket. The next one removes it."""
    script = (
        "import os, socket; from servegrid.node.folders import temporary_folder\n"
        "with temporary_folder() as folder:\n"
        "    socket.socket(socket.AF_UNIX).bind(f'{folder}/s')\n"
        "    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script], timeout=60)
    return True


@fault
def record_truncated(campaign: Campaign) -> bool:
    return campaign.damage(lambda path: os.truncate(path, path.stat().st_size // 2))


@fault
def record_emptied(campaign: Campaign) -> bool:
    return campaign.damage(lambda path: os.truncate(path, 0))


@fault
def record_bit_flipped(campaign: Campaign) -> bool:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[campaign.random.randrange(4, len(data) // 4)] ^= 1 << campaign.random.randrange(8)
        path.write_bytes(data)

    return campaign.damage(flip)


@fault
def record_deleted(campaign: Campaign) -> bool:
    return campaign.damage(Path.unlink)


@fault
def half_written_record_left(campaign: Campaign) -> bool:
    """As a killed job leaves it. It must disturb nothing."""
    if not campaign.digests:
        return False
    trial = campaign.random.choice(sorted(campaign.digests))
    name = f".requests.parquet.{campaign.random.randrange(10**6)}"
    (campaign.work.folder / "results/cells" / trial / name).write_bytes(b"PAR1half")
    campaign.planted.add(name)
    return True


@fault
def journal_damaged(campaign: Campaign) -> bool:
    journals = sorted(campaign.work.folder.glob(".snakemake/submitit/*/*/journal.jsonl"))
    if not journals:
        return False
    with campaign.random.choice(journals).open("ab") as file:
        file.write(b'{"event": "job_fin\n\xff\xfe[]\nnull\n')
    return True


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + STUDY_LIMIT_S)
@with_options(Options(slurmd_timeout_s=20, accounting=True))
def test_a_campaign_of_faults_loses_nothing(study: Study) -> None:
    campaign = Campaign(study)
    began = time.monotonic()
    try:
        campaign.run()
    finally:
        campaign.restore()
        print(f"\n{report(campaign, time.monotonic() - began)}")


def report(campaign: Campaign, seconds: float) -> str:
    rows = [
        f"| {kind} | {len(lost)} | {statistics.median(lost):.1f} | {max(lost):.1f} |"
        for kind, lost in campaign.lost_s.items()
        if lost
    ]
    return "\n".join(
        [
            f"seed {SEED}: {campaign.injected()} faults of {len(rows)} kinds in {seconds / 60:.0f} "
            f"min, {campaign.studies} studies of {len(campaign.trials)} cells",
            "",
            "| fault | times | median s without a cell | longest |",
            "|---|---:|---:|---:|",
            *sorted(rows),
        ]
    )
