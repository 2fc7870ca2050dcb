"""What the load client adds to the times that it reports: `make bench`.

It is put on a scripted server on this machine, which logs when it had read each request and when
it sent each piece of the answer. With `--peers` other clients have their turn as well.
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
from servegrid.client.distortion import Distortion, distortion_of
from servegrid.mock_server.process import running
from servegrid.mock_server.responses import Script
from servegrid.node import environment
from servegrid.run import cores
from servegrid.study.grid import Workload

SCRIPT = Script(ttft_s=0.1, itl_s=0.02)
PROMPT_TOKENS, TOKENS = 8, 100
WAVES = {16: 10, 128: 4, 512: 3, 2048: 3}
"""By streams: as many waves, each sent at once, as a minute allows for all. One lapse of a busy
machine spoils 1% of a wave, so that there are several."""
LIMIT_S = 120.0


@dataclass(frozen=True)
class Figure:
    """One column: what it shows of a distortion, and by streams what it may be at most."""

    title: str
    unit: str
    of: Callable[[Distortion], float]
    digits: int
    bounds: Mapping[int, float]

    def shown(self, streams: int, found: Distortion) -> str:
        """The figure, and whether it keeps its bound, if there is one."""
        figure = f"{self.of(found):.{self.digits}f}"
        bound = self.bounds.get(streams)
        return figure if bound is None else f"{figure} ({self.verdict(streams, found)} {bound:g})"

    def verdict(self, streams: int, found: Distortion) -> str | None:
        if streams not in self.bounds:
            return None
        return "met" if self.of(found) <= self.bounds[streams] else "missed"


@dataclass(frozen=True)
class Level:
    """What was found at one number of streams, and the cores that all else kept busy meanwhile."""

    streams: int
    found: Distortion
    others_cores: float


def _ms(name: str) -> Callable[[Distortion], float]:
    return lambda found: 1e3 * float(getattr(found, name))


FIGURES = (
    Figure("arrival, median", "ms", _ms("arrival_error_s_p50"), 3, dict.fromkeys(WAVES, 0.03)),
    Figure("arrival, p99", "ms", _ms("arrival_error_s_p99"), 3, dict.fromkeys(WAVES, 0.15)),
    Figure("ITL, p99", "ms", _ms("itl_error_s_p99"), 3, {16: 0.1, 128: 0.1, 512: 0.1}),
    Figure("TTFT, median", "ms", _ms("ttft_error_s_p50"), 2, {16: 1, 128: 5, 512: 10}),
    Figure("TTFT, p99", "ms", _ms("ttft_error_s_p99"), 2, {16: 3, 128: 12, 512: 30}),
    Figure("server reading, median", "ms", _ms("reading_s_p50"), 2, {}),
    Figure("server reading, p99", "ms", _ms("reading_s_p99"), 2, {}),
    Figure("send lag, most", "ms", _ms("send_lag_s_max"), 1, {}),
    Figure(
        "CPU",
        "s",
        lambda found: found.cpu_s_per_1000_events,
        4,
        {128: 0.02, 512: 0.02, 2048: 0.02},
    ),
    Figure("lost", "requests", lambda found: found.lost, 0, dict.fromkeys(WAVES, 0)),
)

LEGEND = """\
Errors without their sign, in ms; in brackets whether the bound is met. Arrival: of each chunk of
tokens, between the client's stamp and the server's sending it. ITL: between two chunks by the
client and between the server's two sends. TTFT: from what the script says; of that, server reading
is between a request's being sent and its being read, where all of a wave come at once. CPU: of the
client per 1000 token events, while its clock ran and for parsing afterwards. Others: cores that
neither client nor server kept busy meanwhile; where client and server would have needed them, that
shows in these figures."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--streams",
        type=int,
        nargs="+",
        choices=sorted(WAVES),
        default=sorted(WAVES),
        help="only these numbers of concurrent streams",
    )
    parser.add_argument("--json", action="store_true", help="JSON in place of the table")
    parser.add_argument("--peers", action="store_true", help="then compare with other clients")
    options = parser.parse_args()
    machine = described()
    levels = [measured_at(streams) for streams in options.streams]
    print(as_json(machine, levels) if options.json else as_markdown(machine, levels))
    if options.peers:
        from peers import compared

        print(f"\n{compared()}")


def measured_at(streams: int) -> Level:
    """Put bursts of `streams` requests on a server of its own, the first of them to warm up."""
    workload = Workload(
        protocol="burst",
        concurrency=streams,
        input_len=PROMPT_TOKENS,
        output_len=TOKENS,
        requests=streams * WAVES[streams],
        timeout_s=LIMIT_S,
        idle_timeout_s=LIMIT_S,
    )
    places = cores.shares(os.sched_getaffinity(0), streams, on_gpu=False).client
    with running(SCRIPT) as server:
        own = (psutil.Process(), psutil.Process(server.process.pid))
        began, busy, used = time.monotonic(), _busy_s(), _used_s(own)
        measured = measure(server.endpoint, workload, tokenizer=None, salt="bench", places=places)
        others_s = _busy_s() - busy - (_used_s(own) - used)
        others_cores = max(others_s, 0.0) / (time.monotonic() - began)
        log = server.log()
    cpu_s = measured.facts["cpu_s"] + measured.facts["parse_cpu_s"]
    found = distortion_of(measured.requests, log.sent, log.read, SCRIPT.ttft_s, cpu_s)
    return Level(streams, found, round(others_cores, 2))


def _busy_s() -> float:
    """CPU time of all cores that was not idle, since the machine was started."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def _used_s(processes: Iterable[psutil.Process]) -> float:
    """Their CPU time, with that of their children that have ended."""
    return float(sum(sum(process.cpu_times()[:4]) for process in processes))


def described() -> dict[str, Any]:
    """The machine, its software, and how busy it was before anything was begun."""
    told = environment.describe()
    return {
        "cpu": told["cpu"],
        "cpu_cores": told["cpu_cores"],
        "kernel": told["kernel"],
        "python": told["python"],
        "servegrid": __version__,
        "load_average": round(os.getloadavg()[0], 2),
    }


def as_markdown(machine: Mapping[str, Any], levels: Sequence[Level]) -> str:
    titles = [f"{figure.title} ({figure.unit})" for figure in FIGURES]
    head = ["streams", *titles, "others (cores)"]
    rows = [
        [
            str(level.streams),
            *(figure.shown(level.streams, level.found) for figure in FIGURES),
            f"{level.others_cores:.2f}",
        ]
        for level in levels
    ]
    lines = [_line(head), _line(["---"] * len(head)), *map(_line, rows)]
    told = (
        f"{machine['cpu']}, {machine['cpu_cores']} cores, Linux {machine['kernel']}, Python "
        f"{machine['python']}, servegrid {machine['servegrid']}; load average "
        f"{machine['load_average']} at the start."
    )
    return "\n".join([*lines, "", LEGEND, "", told])


def as_json(machine: Mapping[str, Any], levels: Sequence[Level]) -> str:
    told = [
        {
            "streams": level.streams,
            **asdict(level.found),
            "others_cores": level.others_cores,
            "bounds": {
                figure.title: figure.verdict(level.streams, level.found)
                for figure in FIGURES
                if level.streams in figure.bounds
            },
        }
        for level in levels
    ]
    return json.dumps({"machine": machine, "levels": told}, indent=2)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
