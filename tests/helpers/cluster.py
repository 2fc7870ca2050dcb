"""A private Slurm on this machine: real daemons and fake nodes that leave nothing behind.

It needs no root, no systemd and nothing outside its folder. A supervisor process owns every
daemon and, as a child subreaper, every job. So killing its descendants ends everything. This
module, run as a program, is the supervisor.
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
ACCOUNTING_DAEMONS = ("slurmdbd", "mariadbd", "mariadb-install-db")
CLIENTS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo", "sacct", "sacctmgr")
PR_SET_CHILD_SUBREAPER = 36
SCHEDULER_PARAMETERS = (
    "batch_sched_delay=0,sched_interval=1,bf_interval=1,bf_resolution=1,sched_min_interval=1000"
)


@dataclass(frozen=True)
class Node:
    name: str
    features: str
    gpu: str = ""
    gpus: int = 0
    cpus: int = 32
    memory_mb: int = 190_000
    slices: tuple[tuple[str, int], ...] = ()
    """MIG slices, or GPUs of a second type: their types and numbers."""

    @property
    def gres(self) -> list[tuple[str, int]]:
        return [*([(self.gpu, self.gpus)] if self.gpus else []), *self.slices]


PLAFRIM = (
    Node("bora001", "bora,intel"),
    Node("sirocco14", "sirocco,intel,v100", "v100", 2),
    Node("sirocco15", "sirocco,intel,v100", "v100", 2),
    Node("sirocco21", "sirocco,amd,a100", "a100", 2),
    Node("sirocco22", "sirocco,amd,a100", "a100", 2),
    Node("sirocco23", "sirocco,amd,a100", "a100", 2),
    Node("sirocco24", "sirocco,amd,a100", "a100", 2),
)
"""Features as on PlaFRIM: whole nodes with two GPUs, requested by feature."""


@dataclass(frozen=True)
class Options:
    """How the cluster behaves; times are seconds."""

    nodes: tuple[Node, ...] = PLAFRIM
    accounting: bool = False
    grace_s: int = 0
    preempt_mode: str = "REQUEUE"
    preempt_sends_user_signal: bool = False
    slurmd_timeout_s: int = 10
    min_job_age_s: int = 600
    parameters: dict[str, str] = field(default_factory=dict)
    partitions: tuple[str, ...] = ()
    """Lines of slurm.conf instead of the partitions `routage` and `preempt`."""


def missing(options: Options) -> list[str]:
    """The programs that the cluster needs and this machine lacks."""
    wanted = DAEMONS + (ACCOUNTING_DAEMONS if options.accounting else ())
    return [name for name in wanted if not program(name)]


UNPACKED = Path(os.environ["UNPACKED_SLURM"]) if "UNPACKED_SLURM" in os.environ else None
"""The folder of another version of Slurm, which unpack_slurm.sh has made, if that is tested."""


def program(name: str) -> str | None:
    first = f"{UNPACKED / 'wrap'}:" if UNPACKED else ""
    return shutil.which(name, path=f"{first}{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def plugin_settings() -> dict[str, object]:
    """Where the daemons of an unpacked Slurm find their plugins."""
    if UNPACKED is None:
        return {}
    return {"PluginDir": next(UNPACKED.glob("usr/lib/*/slurm-wlm"))}


class Cluster:
    """One private cluster. `env` is the environment of its users."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder = folder
        self.options = options
        # The path of a Unix socket has at most 107 characters, and slurmstepd creates one per step.
        self.short = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.conf = folder / "slurm.conf"
        self.munge_socket = self.short / "munge.socket"
        self.supervisor: subprocess.Popen[bytes] | None = None

    @property
    def env(self) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        path = f"{self.folder / 'bin'}:{clean.get('PATH', '')}"
        return clean | {"SLURM_CONF": str(self.conf), "PATH": path}

    def call(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command, env=self.env, check=check, text=True, capture_output=True, timeout=60
        )
        return done.stdout

    def up(self, limit_s: float = 60) -> None:
        write_configuration(self)
        plan = self.folder / "plan.json"
        plan.write_text(json.dumps(daemons(self)))
        with (self.folder / "supervisor.log").open("wb") as log:
            self.supervisor = subprocess.Popen(
                [sys.executable, __file__, str(plan)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self.env | {"SLURM_PRIVATE_CLUSTER": str(self.folder)},
            )
        wait_for(self.ready, limit_s, lambda: f"the private Slurm in {self.folder}: {self.log()}")

    def ready(self) -> bool:
        if self.supervisor is not None and self.supervisor.poll() is not None:
            raise RuntimeError(f"the supervisor ended: {self.log()}")
        with contextlib.suppress(subprocess.SubprocessError):
            lines = self.call("sinfo", "-h", "-N", "-o", "%N %T").splitlines()
            idle = {line.split()[0] for line in lines if line.endswith(" idle")}
            return len(idle) == len(self.options.nodes)
        return False

    def log(self) -> str:
        return (self.folder / "supervisor.log").read_text(errors="replace")[-2000:]

    def daemon(self, name: str) -> psutil.Process:
        pids = json.loads((self.folder / "pids.json").read_text())
        return psutil.Process(pids[name])

    def lose_node(self, name: str) -> None:
        """The node is lost at once, and Slurm knows it."""
        self.call("scontrol", "update", f"nodename={name}", "state=down", "reason=test")

    def spoil_node(self, name: str) -> None:
        """The node accepts jobs and fails to launch them because its prolog fails."""
        (self.folder / f"spoilt-{name}").touch()

    def lose_controller(self) -> None:
        """Kill the controller. `return_controller` starts it again."""
        self._lose("slurmctld")

    def return_controller(self) -> None:
        (self.folder / "no-slurmctld").unlink()
        wait_for(self._answers, 60, lambda: "the controller did not come back")

    def lose_database(self) -> None:
        """Kill slurmdbd. `return_database` starts it again."""
        self._lose("slurmdbd")

    def return_database(self) -> None:
        (self.folder / "no-slurmdbd").unlink()

    def _lose(self, daemon: str) -> None:
        (self.folder / f"no-{daemon}").touch()
        self.daemon(daemon).kill()

    def _answers(self) -> bool:
        with contextlib.suppress(subprocess.SubprocessError):
            return "UP" in self.call("scontrol", "ping")
        return False

    def resume_node(self, name: str) -> None:
        self.call("scontrol", "update", f"nodename={name}", "state=resume")

    def down(self) -> None:
        if self.supervisor is not None:
            self.supervisor.terminate()
            self.supervisor.wait(60)
        shutil.rmtree(self.short, ignore_errors=True)


@contextlib.contextmanager
def private_cluster(folder: Path, options: Options = Options()) -> Iterator[Cluster]:
    """A cluster that runs during the block."""
    cluster = Cluster(folder, options)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


def wait_for(test: Callable[[], bool], limit_s: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + limit_s
    while not test():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not ready after {limit_s} s: {what()}")
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below those that the kernel gives to clients.

    Otherwise, a connection could get the port before the daemon that it is for.
    """
    lowest = int(
        Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0]
    )
    found: list[int] = []
    while len(found) < count:
        port = 10_000 + secrets.randbelow(lowest - 10_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found += [port] * (port not in found)
    return found


def write_configuration(cluster: Cluster) -> None:
    options, folder = cluster.options, cluster.folder
    host, user = socket.gethostname().partition(".")[0], getpass.getuser()
    controller, database, *ports = free_ports(2 + len(options.nodes))
    spool = cluster.short / "spool"
    for sub in ("log", "state", "bin", "devices", "db"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    (folder / "munge").mkdir(mode=0o700)
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    settings = {
        "ClusterName": "private",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": controller,
        # Two clusters must not use the same job ids in one results folder.
        "FirstJobId": 1000 * secrets.randbelow(60_000) + 1,
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        # cred_expire is also how long a requeued job is held; the default is 120 s.
        "AuthInfo": f"socket={cluster.munge_socket},cred_expire=5",
        "StateSaveLocation": folder / "state",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmctldLogFile": folder / "log" / "slurmctld.log",
        "SlurmdSpoolDir": spool / "%n",
        "SlurmdPidFile": folder / "slurmd-%n.pid",
        "SlurmdLogFile": folder / "log" / "slurmd-%n.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "JobAcctGatherType": "jobacct_gather/none",
        "SlurmdParameters": "config_overrides",  # nodes claim more than the machine has
        "ReturnToService": 1,
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "GresTypes": "gpu",
        "DefMemPerCPU": 1000,
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": SCHEDULER_PARAMETERS,
        "PriorityType": "priority/basic",
        "JobRequeue": 1,
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "KillWait": 2,
        "MinJobAge": options.min_job_age_s,
        "SlurmdTimeout": options.slurmd_timeout_s,
        "SlurmctldTimeout": 30,
        "MessageTimeout": 10,
        "TCPTimeout": 2,
        "BatchStartTimeout": 10,
        "InactiveLimit": 0,
        "WaitTime": 0,
        "CompleteWait": 0,
        **plugin_settings(),
    }
    prolog = folder / "prolog"
    prolog.write_text(f'#!/bin/sh\ntest ! -e "{folder}/spoilt-$SLURMD_NODENAME"\n')
    prolog.chmod(0o755)
    settings["Prolog"] = prolog
    if options.preempt_sends_user_signal:
        settings["SlurmctldParameters"] = "preempt_send_user_signal"
    if options.accounting:
        settings |= {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": database,
            "AccountingStoragePass": cluster.munge_socket,
        }
    nodes, gres = [], ["AutoDetect=off"]
    for node, port in zip(options.nodes, ports, strict=True):
        line = (
            f"NodeName={node.name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={node.cpus} RealMemory={node.memory_mb} Feature={node.features} State=UNKNOWN"
        )
        if node.gres:
            types = (":".join(filter(None, ("gpu", kind, str(n)))) for kind, n in node.gres)
            line += f" Gres={','.join(types)}"
            devices = folder / "devices" / node.name
            devices.mkdir()
            first = 0
            for kind, count in node.gres:
                for index in range(first, first + count):
                    # Only with a character device does Slurm set CUDA_VISIBLE_DEVICES.
                    (devices / f"nvidia{index}").symlink_to("/dev/null")
                files = f"{devices}/nvidia[{first}-{first + count - 1}]"
                typed = f"Type={kind} " if kind else ""
                gres.append(f"NodeName={node.name} Name=gpu {typed}File={files}")
                first += count
        nodes.append(line)
        (spool / node.name).mkdir(parents=True)
    partitions = list(options.partitions) or [
        "PartitionName=routage Nodes=ALL Default=YES MaxTime=3-00:00:00 DefaultTime=01:00:00 "
        "PriorityTier=10 PreemptMode=OFF State=UP",
        "PartitionName=preempt Nodes=ALL Default=NO MaxTime=INFINITE DefaultTime=01:00:00 "
        f"PriorityTier=1 PreemptMode={options.preempt_mode} GraceTime={options.grace_s} State=UP",
    ]
    lines = [f"{key}={value}" for key, value in (settings | options.parameters).items()]
    cluster.conf.write_text("\n".join([*lines, *nodes, *partitions]) + "\n")
    (folder / "gres.conf").write_text("\n".join(gres) + "\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    write_database_configuration(cluster, host, user, database)
    for name in CLIENTS:  # Snakemake and submitit sometimes remove SLURM_* variables
        if found := program(name):
            wrapper = folder / "bin" / name
            wrapper.write_text(f'#!/bin/sh\nSLURM_CONF={cluster.conf} exec {found} "$@"\n')
            wrapper.chmod(0o755)


def write_database_configuration(cluster: Cluster, host: str, user: str, port: int) -> None:
    path = cluster.folder / "slurmdbd.conf"
    settings = {
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={cluster.munge_socket}",
        "DbdHost": host,
        "DbdAddr": "127.0.0.1",
        "DbdPort": port,
        "SlurmUser": user,
        "PidFile": cluster.folder / "slurmdbd.pid",
        "LogFile": cluster.folder / "log" / "slurmdbd.log",
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "localhost",
        "StorageUser": user,
        "StorageLoc": "slurm_acct_db",
        "CommitDelay": 0,
        **plugin_settings(),
    }
    path.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    path.chmod(0o600)


def daemons(cluster: Cluster) -> dict[str, object]:
    """What the supervisor starts, in this order: name, command, and the socket to wait for."""
    folder, short, user = cluster.folder, cluster.short, getpass.getuser()
    munge = folder / "munge"
    steps: list[tuple[str, Sequence[object], object]] = [
        (
            "munged",
            (
                *("munged", "-F", "--force", "--key-file", munge / "key"),
                *("--socket", cluster.munge_socket, "--pid-file", munge / "pid"),
                *("--log-file", munge / "log", "--seed-file", munge / "seed"),
            ),
            cluster.munge_socket,
        )
    ]
    prepare: list[list[str]] = []
    if cluster.options.accounting:
        data, database = folder / "db", short / "db.socket"
        prepare.append(
            [
                *("mariadb-install-db", "--no-defaults", f"--datadir={data}", f"--user={user}"),
                *("--auth-root-authentication-method=socket", "--skip-test-db"),
                f"--auth-root-socket-user={user}",
            ]
        )
        # slurmdbd 24.11 fails where it would have to create its database.
        prepare.append(["mkdir", "-p", str(data / "slurm_acct_db")])
        steps += [
            (
                "mariadbd",
                (
                    *("mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={database}"),
                    *("--skip-networking", f"--user={user}"),
                    *(f"--pid-file={folder / 'mariadbd.pid'}", "--innodb-buffer-pool-size=64M"),
                    "--innodb-lock-wait-timeout=900",
                ),
                database,
            ),
            ("slurmdbd", ("slurmdbd", "-D"), None),
            # The cluster must exist before the controller asks for it.
            ("once", ("sacctmgr", "-i", "add", "cluster", "private"), None),
            ("once", ("sacctmgr", "-i", "add", "account", "users", "Cluster=private"), None),
            (
                "once",
                ("sacctmgr", "-i", "add", "user", user, "Account=users", "DefaultAccount=users"),
                None,
            ),
        ]
    steps.append(("slurmctld", ("slurmctld", "-D", "-i", "-f", cluster.conf), None))
    steps += [
        (f"slurmd-{node.name}", ("slurmd", "-D", "-N", node.name, "-f", cluster.conf), None)
        for node in cluster.options.nodes
    ]
    return {
        "folder": str(folder),
        "env": {"MYSQL_UNIX_PORT": str(short / "db.socket")},
        "prepare": prepare,
        "steps": [
            (name, [str(word) for word in command], str(path) if path else None)
            for name, command, path in steps
        ],
    }


def supervise(plan_file: Path) -> None:
    """Start the daemons, reap their children, and kill every descendant on SIGTERM."""
    plan = json.loads(plan_file.read_text(encoding="utf-8"))
    folder = Path(plan["folder"])
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    env = os.environ | plan["env"]
    pids: dict[str, int] = {}
    restarted: dict[str, list[str]] = {}
    try:
        for command in plan["prepare"]:
            subprocess.run([program(command[0]) or command[0], *command[1:]], check=True, env=env)
        for name, command, path in plan["steps"]:
            words = [program(command[0]) or command[0], *command[1:]]
            if name == "once":
                retry(words, env)
                continue
            launch(name, words, folder, env, pids)
            if name in ("slurmctld", "slurmdbd"):
                restarted[name] = [word for word in words if word != "-i"]
            if path:
                wait_for(Path(path).exists, 30, lambda name=name: name)  # type: ignore[misc]
        while True:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            for name, words in restarted.items():
                if not psutil.pid_exists(pids[name]) and not (folder / f"no-{name}").exists():
                    launch(name, words, folder, env, pids)
            time.sleep(0.1)
    finally:
        kill_descendants()


def launch(
    name: str, words: Sequence[str], folder: Path, env: dict[str, str], pids: dict[str, int]
) -> None:
    with (folder / "log" / f"{name}.out").open("ab") as log:
        started = subprocess.Popen(
            words, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder
        )
    pids[name] = started.pid
    temporary = folder / "pids.json.new"
    temporary.write_text(json.dumps(pids))
    temporary.replace(folder / "pids.json")


def retry(command: Sequence[str], env: dict[str, str], limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while subprocess.run(command, env=env).returncode != 0:
        if time.monotonic() > deadline:
            raise TimeoutError(" ".join(command))
        time.sleep(0.3)


def kill_descendants() -> None:
    """Kill until no descendant is left. Nothing here needs a clean stop."""
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


if __name__ == "__main__":
    supervise(Path(sys.argv[1]))
