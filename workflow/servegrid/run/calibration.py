"""The load client measured on the very node, before an engine is up there."""

from __future__ import annotations

import http.client
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
"""A server as quick as one stream of a small model on a good GPU."""
PROMPT_TOKENS = 8
LIMIT_S = 60.0


def calibrate(concurrency: int, shares: CpuSets, socket: Path | None = None) -> dict[str, Any]:
    """The client's timing error at that concurrency, or `error` and why it is unknown.

    A mock server on this node, on TCP or on the Unix socket of that path, is given one burst.
    Server and client have the cores that engine and client will have.
    """
    script = ResponseScript(TTFT_S, ITL_S, unix_socket=None if socket is None else str(socket))
    try:
        with (
            pinned_to(shares.engine),
            start_mock_server(script) as server,
            pinned_to(frozenset().union(*shares.client)),
        ):
            return {"concurrency": concurrency} | asdict(
                measure_mock_server(server, calibration_workload(concurrency), shares.client)
            )
    except (ServegridError, OSError, http.client.HTTPException) as error:
        return {"concurrency": concurrency, "error": " ".join(str(error).split()) or repr(error)}


def calibration_workload(concurrency: int) -> Workload:
    """One wave of `concurrency` requests, after another that opens the connections."""
    return Workload(
        "burst",
        concurrency,
        PROMPT_TOKENS,
        TOKENS,
        concurrency,
        timeout_s=LIMIT_S,
        idle_timeout_s=LIMIT_S / 2,
    )


def measure_mock_server(
    server: MockServer, workload: Workload, cpu_sets: Sequence[Collection[int]] = ()
) -> TimingError:
    """The client's timing error under `load` on a mock server with TTFT_S and ITL_S."""
    measurement = measure(server.endpoint, workload, None, "self-check", cpu_sets=cpu_sets)
    log = server.log()
    cpu_s = measurement.facts["cpu_s"]
    return measure_timing_error(measurement.requests, log.sent, log.read, TTFT_S, cpu_s)


def describe_calibration(check: Mapping[str, Any]) -> str:
    """What `self_check` gave, in a line."""
    if "error" in check:
        return f"not known, so no cell will be valid: {check['error']}"
    arrival, itl = (1e3 * check[f"{each}_error_s_p99"] for each in ("arrival", "itl"))
    return (
        f"at concurrency {check['concurrency']}, 99% of arrivals are right to "
        f"{arrival:.2f} ms and of times between tokens to {itl:.2f} ms"
    )
