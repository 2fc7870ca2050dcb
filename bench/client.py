"""Measures the load client's timing error: `make bench`.

The client sends workloads to a mock server on this machine. The server logs when it read each
request and when it sent each piece of the response. With `--peers`, other clients are measured too.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from servegrid import __version__
from servegrid.client import measure
from servegrid.client.timing_error import TimingError, measure_timing_error
from servegrid.mock_server.process import start_mock_server
from servegrid.mock_server.responses import ResponseScript
from servegrid.node import environment
from servegrid.run import cores
from servegrid.study.grid import Workload

SCRIPT = ResponseScript(ttft_s=0.1, itl_s=0.02)
PROMPT_TOKENS, TOKENS = 8, 100
WAVES = {16: 10, 128: 4, 512: 3, 2048: 3}
"""Waves at each concurrency, chosen so that all take a minute. One pause of a busy machine spoils
1% of a wave, so there are several waves."""
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Figure:
    """One column of the table: a value of the timing error, and its upper bound by concurrency."""

    title: str
    unit: str
    value: Callable[[TimingError], float]
    digits: int
    bounds: Mapping[int, float]

    def format(self, concurrency: int, error: TimingError) -> str:
        """The value, and whether it meets its bound, if there is one."""
        text = f"{self.value(error):.{self.digits}f}"
        bound = self.bounds.get(concurrency)
        return text if bound is None else f"{text} ({self.verdict(concurrency, error)} {bound:g})"

    def verdict(self, concurrency: int, error: TimingError) -> str | None:
        if concurrency not in self.bounds:
            return None
        return "met" if self.value(error) <= self.bounds[concurrency] else "missed"


@dataclass(frozen=True)
class Result:
    """The timing error at one concurrency, and the cores that other processes used meanwhile."""

    concurrency: int
    error: TimingError
    others_cores: float


def _ms(name: str) -> Callable[[TimingError], float]:
    return lambda error: 1e3 * float(getattr(error, name))


FIGURES = (
    Figure("arrival, median", "ms", _ms("arrival_error_s_p50"), 3, dict.fromkeys(WAVES, 0.03)),
    Figure("arrival, p99", "ms", _ms("arrival_error_s_p99"), 3, dict.fromkeys(WAVES, 0.15)),
    Figure("ITL, p99", "ms", _ms("itl_error_s_p99"), 3, {16: 0.1, 128: 0.1, 512: 0.1}),
    Figure("TTFT, median", "ms", _ms("ttft_error_s_p50"), 2, {16: 1, 128: 5, 512: 10}),
    Figure("TTFT, p99", "ms", _ms("ttft_error_s_p99"), 2, {16: 3, 128: 12, 512: 30}),
    Figure("server reading, median", "ms", _ms("reading_s_p50"), 2, {}),
    Figure("server reading, p99", "ms", _ms("reading_s_p99"), 2, {}),
    Figure("send lag, max", "ms", _ms("send_lag_s_max"), 1, {}),
    Figure(
        "CPU",
        "s",
        lambda error: error.cpu_s_per_1000_events,
        4,
        {128: 0.02, 512: 0.02, 2048: 0.02},
    ),
    Figure("lost", "requests", lambda error: error.lost, 0, dict.fromkeys(WAVES, 0)),
)

LEGEND = """\
Errors are absolute values. The brackets say whether the bound is met.
Arrival: of each chunk with tokens, the client's time minus the time the server sent it.
ITL: time between two chunks at the client, minus the time between the server's two sends.
TTFT: difference from the server's configured time to first token. Server reading is the part of it
from the client sending a request until the server has read it: all requests of a wave come at once.
CPU: of the client per 1000 token events, for the measurement and for parsing afterwards.
Others: cores that neither client nor server used. If these two lack cores, the errors grow."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        choices=sorted(WAVES),
        default=sorted(WAVES),
        help="only these numbers of concurrent requests",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--peers", action="store_true", help="also compare with other clients")
    options = parser.parse_args()
    machine = describe_machine()
    results = [measure_at(concurrency) for concurrency in options.concurrency]
    print(format_json(machine, results) if options.json else format_table(machine, results))
    if options.peers:
        from peers import compare_clients

        print(f"\n{compare_clients()}")


def measure_at(concurrency: int) -> Result:
    """Send bursts of `concurrency` requests to a mock server. The first burst is the warm-up."""
    workload = Workload(
        protocol="burst",
        concurrency=concurrency,
        input_len=PROMPT_TOKENS,
        output_len=TOKENS,
        requests=concurrency * WAVES[concurrency],
        timeout_s=TIMEOUT_S,
        idle_timeout_s=TIMEOUT_S,
    )
    cpu_sets = cores.assign_cpu_sets(os.sched_getaffinity(0), concurrency, on_gpu=False).client
    with start_mock_server(SCRIPT) as server:
        measured = (psutil.Process(), psutil.Process(server.process.pid))
        started, busy, used = time.monotonic(), _busy_s(), _used_s(measured)
        measurement = measure(
            server.endpoint, workload, tokenizer=None, salt="bench", cpu_sets=cpu_sets
        )
        others_s = _busy_s() - busy - (_used_s(measured) - used)
        others_cores = max(others_s, 0.0) / (time.monotonic() - started)
        log = server.log()
    cpu_s = measurement.facts["cpu_s"] + measurement.facts["parse_cpu_s"]
    error = measure_timing_error(measurement.requests, log.sent, log.read, SCRIPT.ttft_s, cpu_s)
    return Result(concurrency, error, round(others_cores, 2))


def _busy_s() -> float:
    """CPU time during which a core was not idle, since the machine was started."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def _used_s(processes: Iterable[psutil.Process]) -> float:
    """CPU time of these processes and of their children that have ended."""
    return float(sum(sum(process.cpu_times()[:4]) for process in processes))


def describe_machine() -> dict[str, Any]:
    """The machine, its software, and its load average before the measurements."""
    node = environment.describe_node()
    return {
        "cpu": node["cpu"],
        "cpu_cores": node["cpu_cores"],
        "kernel": node["kernel"],
        "python": node["python"],
        "servegrid": __version__,
        "load_average": round(os.getloadavg()[0], 2),
    }


def format_table(machine: Mapping[str, Any], results: Sequence[Result]) -> str:
    """The results as a Markdown table, with a legend and the machine."""
    titles = [f"{figure.title} ({figure.unit})" for figure in FIGURES]
    header = ["concurrency", *titles, "others (cores)"]
    rows = [
        [
            str(result.concurrency),
            *(figure.format(result.concurrency, result.error) for figure in FIGURES),
            f"{result.others_cores:.2f}",
        ]
        for result in results
    ]
    lines = [_format_row(header), _format_row(["---"] * len(header)), *map(_format_row, rows)]
    machine_line = (
        f"{machine['cpu']}, {machine['cpu_cores']} cores, Linux {machine['kernel']}, Python "
        f"{machine['python']}, servegrid {machine['servegrid']}; load average "
        f"{machine['load_average']} at the start."
    )
    return "\n".join([*lines, "", LEGEND, "", machine_line])


def format_json(machine: Mapping[str, Any], results: Sequence[Result]) -> str:
    data = [
        {
            "concurrency": result.concurrency,
            **asdict(result.error),
            "others_cores": result.others_cores,
            "bounds": {
                figure.title: figure.verdict(result.concurrency, result.error)
                for figure in FIGURES
                if result.concurrency in figure.bounds
            },
        }
        for result in results
    ]
    return json.dumps({"machine": machine, "results": data}, indent=2)


def _format_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
