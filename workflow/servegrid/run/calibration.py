"""Measures the timing error of the load client on this node, before the engine starts."""

from __future__ import annotations

import http.client
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from servegrid.client import measure
from servegrid.client.timing_error import TimingError, measure_timing_error
from servegrid.errors import ServegridError
from servegrid.mock_server.process import MockServer, start_mock_server
from servegrid.mock_server.responses import ResponseScript
from servegrid.run.cores import CpuSets, pinned_to
from servegrid.study.grid import Workload

TTFT_S, ITL_S, TOKENS = 0.1, 0.02, 100
"""Latencies and output tokens of the mock server: a small model on a fast GPU."""
PROMPT_TOKENS = 8
TIMEOUT_S = 60.0


def calibrate(concurrency: int, cpu_sets: CpuSets, socket: Path | None = None) -> dict[str, Any]:
    """The client's timing error at this concurrency; if it is unknown, the reason under `error`.

    The client sends one burst to a mock server on this node, over TCP or over the Unix socket
    `socket`. The server runs on the engine's cores, the client on its own. It answers this process
    only.
    """
    script = ResponseScript(TTFT_S, ITL_S, unix_socket=None if socket is None else str(socket))
    try:
        with (
            pinned_to(cpu_sets.engine),
            start_mock_server(script, api_key=secrets.token_urlsafe(24)) as server,
            pinned_to(frozenset().union(*cpu_sets.client)),
        ):
            return {"concurrency": concurrency} | asdict(
                measure_mock_server(server, calibration_workload(concurrency), cpu_sets.client)
            )
    except (ServegridError, OSError, http.client.HTTPException) as error:
        return {"concurrency": concurrency, "error": " ".join(str(error).split()) or repr(error)}


def calibration_workload(concurrency: int) -> Workload:
    """One wave of `concurrency` requests, after a warm-up wave that opens the connections."""
    return Workload(
        "burst",
        concurrency,
        PROMPT_TOKENS,
        TOKENS,
        concurrency,
        timeout_s=TIMEOUT_S,
        idle_timeout_s=TIMEOUT_S / 2,
    )


def measure_mock_server(
    server: MockServer, workload: Workload, cpu_sets: Sequence[Collection[int]] = ()
) -> TimingError:
    """The client's timing error under `workload`, on a mock server with TTFT_S and ITL_S."""
    measurement = measure(server.endpoint, workload, None, "calibration", cpu_sets=cpu_sets)
    log = server.log()
    cpu_s = measurement.facts["cpu_s"]
    return measure_timing_error(measurement.requests, log.sent, log.read, TTFT_S, cpu_s)


def describe_calibration(result: Mapping[str, Any]) -> str:
    """The result of `calibrate` in one line."""
    if "error" in result:
        return f"timing error unknown, so no cell will be valid: {result['error']}"
    arrival, itl = (1e3 * result[f"{metric}_error_s_p99"] for metric in ("arrival", "itl"))
    return (
        f"timing error at concurrency {result['concurrency']} (99th percentile): "
        f"arrivals {arrival:.2f} ms, inter-token latency {itl:.2f} ms"
    )
