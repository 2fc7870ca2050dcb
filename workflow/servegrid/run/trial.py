"""Measures one trial on the allocation's engine and writes two Parquet files.

The requests are written last: if that file exists, the trial is complete.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from servegrid import __version__
from servegrid.client import Measurement, measure, workers
from servegrid.errors import EngineError
from servegrid.records import columns, parquet
from servegrid.records.verdict import SERVER_DIED, decide_verdict
from servegrid.run.jobscript import report_work_span
from servegrid.run.nodes import device_of
from servegrid.run.service import AllocationInfo
from servegrid.study.deployment import EXTERNAL
from servegrid.study.grid import Trial
from servegrid.telemetry import sampler, server

SAMPLES_LATE_S = 5.0
"""How late the samples of other nodes can come."""
DEATH_CONFIRMED_S = 5.0
"""Seconds that a server must keep answering after a failure to count as alive."""


def measure_trial(
    trial: Trial,
    requests: Path,
    samples: Path,
    last_attempt: bool,
    source_file: Path | None = None,
) -> str:
    """Measure `trial`, write its records and return its verdict.

    `source_file` is the file that its workload takes requests from, if there is one.

    Raises EngineError if the allocation serves another deployment, or if the engine died and this
    is not the last attempt: then the executor starts another engine for the trial. Raises LoadError
    if no request could be sent, and RecordError if the files cannot be written.
    """
    info = AllocationInfo.read()
    if info.deployment_digest != trial.deployment.digest:
        raise EngineError(
            f"{trial.id}: the running engine serves another specification of this deployment. "
            "Run the same command again after that allocation has ended."
        )
    parquet.check_writable(requests.parent)
    parquet.remove_half_written(requests.parent)
    offset = sampler.end_offset(info.telemetry)
    # An open loop has no fixed concurrency: it gets all processes of the client.
    concurrency = trial.workload.concurrency
    cpu_sets = info.cpu_sets[: concurrency and workers.processes_needed(concurrency)]
    if len(cpu_sets) == 1:
        os.sched_setaffinity(0, cpu_sets[0])
    with report_work_span():
        measurement = measure(
            info.endpoint,
            trial.workload,
            info.tokenizer,
            salt=prompt_salt(trial),
            counters=server.counter_reader(info.endpoint),
            cpu_sets=cpu_sets,
            source_file=source_file,
        )
    lost = _lost_health(info, measurement)
    if lost is not None:
        info.check_active()
    verdict, detail = decide_verdict(measurement.errors, lost is None)
    if verdict == SERVER_DIED:
        detail = f"{detail}; {lost}"
        if not last_attempt:
            raise EngineError(
                f"{trial.id}: the engine died under this workload ({lost}). Retrying with a new "
                "engine."
            )
    record = {
        "format": parquet.RECORD_FORMAT,
        "servegrid": __version__,
        "spec": trial.spec,
        "spec_digest": trial.digest,
        "verdict": verdict,
        "verdict_detail": detail,
        "client": measurement.facts,
        "engine": info.engine,
        "environment": info.environment,
        "calibration": info.calibration,
        "metrics_before": measurement.counters_before,
        "metrics_after": measurement.counters_after,
    }
    window = measurement.facts["window_ns"]
    others = info.environment.get("other_nodes", ())
    devices = [device_of(rank, sampler.ENGINE) for rank, _ in enumerate(others, 1)]
    sampler.wait_for(info.telemetry, offset, window[1], devices, SAMPLES_LATE_S)
    rows = sampler.read_samples(info.telemetry, offset, *window)
    parquet.write_table(parquet.arrow_table(columns.TELEMETRY, rows, record), samples)
    table = measurement.requests
    schema = parquet.arrow_schema(columns.REQUESTS, record)
    parquet.write_table(table.replace_schema_metadata(schema.metadata), requests)
    return verdict


def prompt_salt(trial: Trial) -> str:
    """The seed of the trial's prompts: the same for every engine that servegrid starts.

    An external engine may still have the prompts of an earlier run in its cache: it gets new ones
    each time.
    """
    if trial.deployment.engine != EXTERNAL:
        return trial.digest
    return f"{trial.digest}-{secrets.token_hex(4)}"


def _lost_health(info: AllocationInfo, measurement: Measurement) -> server.Health | None:
    """What shows that the server no longer answers. After a failed request, it is watched for a few
    seconds."""
    if not any(measurement.errors):
        return None
    deadline = time.monotonic() + DEATH_CONFIRMED_S
    while (health := server.check_health(info.endpoint)).ok:
        if time.monotonic() > deadline:
            return None
        time.sleep(0.5)
    return health
