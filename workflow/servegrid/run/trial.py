"""Measures one trial on the allocation's engine and writes two Parquet files.

The requests are written last: if that file exists, the trial is complete.
"""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from servegrid import __version__
from servegrid.client import Measurement, measure, workers
from servegrid.engines.startup_errors import end_offset, find_death, shorten
from servegrid.errors import EngineError
from servegrid.records import columns, parquet
from servegrid.records.verdict import SERVER_DIED, Verdict, decide_verdict, is_out_of_memory
from servegrid.run import pruning
from servegrid.run.jobscript import report_work_span
from servegrid.run.nodes import device_of
from servegrid.run.service import AllocationInfo
from servegrid.run.unmeasured import write_unmeasured
from servegrid.study.deployment import EXTERNAL
from servegrid.study.grid import Trial, Workload
from servegrid.telemetry import sampler, server
from servegrid.telemetry.strain import measure_strain

SAMPLES_LATE_S = 5.0
"""How late the samples of other nodes can come."""
DEATH_CONFIRMED_S = 5.0
"""Seconds that a server must keep answering after a failure to count as alive."""


@dataclass(frozen=True)
class TrialInputs:
    """Files that some workloads need; None for the others."""

    saturation: Path | None = None
    """The record that a sweep's request rate is a fraction of."""
    source_file: Path | None = None
    """The file that a workload takes its requests from."""


NO_INPUTS = TrialInputs()


def measure_trial(
    trial: Trial,
    requests: Path,
    samples: Path,
    last_attempt: bool,
    inputs: TrialInputs = TrialInputs(),  # it is frozen
) -> str:
    """Measure `trial`, write its records and return its verdict.

    It is not tried if its engine cannot start, or if a lighter workload could not be served.

    Raises EngineError if the allocation serves another deployment, or if the engine died for an
    unknown reason and this is not the last attempt: then the executor starts another engine for the
    trial. Raises LoadError if no request could be sent or the rate at saturation is not known, and
    RecordError if the files cannot be written, or if the record of the saturation is damaged.
    """
    info = AllocationInfo.read()
    if info.deployment_digest != trial.deployment.digest:
        raise EngineError(
            f"{trial.id}: the running engine serves another specification of this deployment. "
            "Run the same command again after that allocation has ended."
        )
    if (known := _known_verdict(trial, info)) is not None:
        return write_unmeasured(
            trial, known, requests, samples, info.engine, info.environment, info.calibration
        )
    parquet.check_writable(requests.parent)
    parquet.remove_half_written(requests.parent)
    offset = sampler.end_offset(info.telemetry)
    errors_before = end_offset(info.errors) if info.errors else 0
    workload, found = trial.workload, None
    if inputs.saturation is not None:
        workload, found = _at_saturation(trial, inputs.saturation)
    measurement = _send(trial, workload, info, inputs.source_file)
    lost = _lost_health(info, measurement)
    if lost is not None:
        info.check_active()
    rows = _read_samples(info, offset, measurement)
    verdict = decide_verdict(
        measurement.errors,
        lost is None,
        measure_strain(measurement.counters_before, measurement.counters_after, rows),
        None if lost is None else _describe_death(info, errors_before, measurement, lost),
    )
    if verdict.name == SERVER_DIED and not last_attempt:
        raise EngineError(
            f"{trial.id}: the engine died under this workload ({lost}). Retrying with a new engine."
        )
    record = _make_record(trial, verdict, measurement, info)
    if found is not None:
        record["saturation"] = found
    parquet.write_table(parquet.arrow_table(columns.TELEMETRY, rows, record), samples)
    table = measurement.requests
    schema = parquet.arrow_schema(columns.REQUESTS, record)
    parquet.write_table(table.replace_schema_metadata(schema.metadata), requests)
    outcome = pruning.Outcome.of(trial, verdict.name, verdict.evidence)
    if info.outcomes is not None and outcome is not None:
        pruning.append_outcome(info.outcomes, outcome)
    return verdict.name


def _known_verdict(trial: Trial, info: AllocationInfo) -> Verdict | None:
    """The verdict if it is known without a try."""
    if info.refused is not None:
        refused: dict[str, Any] = dict(info.refused)
        return Verdict(refused["verdict"], refused["verdict_detail"], refused["verdict_evidence"])
    if info.outcomes is None:
        return None
    outcomes = pruning.read_outcomes(info.outcomes)
    dominating = pruning.find_dominating(trial.workload, outcomes)
    return None if dominating is None else pruning.dominated_by(dominating)


def _send(
    trial: Trial, workload: Workload, info: AllocationInfo, source_file: Path | None
) -> Measurement:
    """Send the requests of `workload`: that of the trial, with the rate of a sweep."""
    # An open loop has no fixed concurrency: it gets all processes of the client.
    concurrency = trial.workload.concurrency
    cpu_sets = info.cpu_sets[: concurrency and workers.processes_needed(concurrency)]
    if len(cpu_sets) == 1:
        os.sched_setaffinity(0, cpu_sets[0])
    with report_work_span():
        return measure(
            info.endpoint,
            workload,
            info.tokenizer,
            salt=prompt_salt(trial),
            counters=server.counter_reader(info.endpoint),
            cpu_sets=cpu_sets,
            source_file=source_file,
        )


def _read_samples(
    info: AllocationInfo, offset: int, measurement: Measurement
) -> list[dict[str, Any]]:
    """The samples of all nodes in the time of the measurement, from `offset` of their file on."""
    window = measurement.facts["window_ns"]
    others = info.environment.get("other_nodes", ())
    devices = [device_of(rank, sampler.ENGINE) for rank, _ in enumerate(others, 1)]
    sampler.wait_for(info.telemetry, offset, window[1], devices, SAMPLES_LATE_S)
    return sampler.read_samples(info.telemetry, offset, *window)


def _make_record(
    trial: Trial, verdict: Verdict, measurement: Measurement, info: AllocationInfo
) -> dict[str, Any]:
    return {
        "format": parquet.RECORD_FORMAT,
        "servegrid": __version__,
        "spec": trial.spec,
        "spec_digest": trial.digest,
        **verdict.record,
        "client": measurement.facts,
        "engine": info.engine,
        "environment": info.environment,
        "calibration": info.calibration,
        "metrics_before": measurement.counters_before,
        "metrics_after": measurement.counters_after,
    }


def _describe_death(
    info: AllocationInfo, offset: int, measurement: Measurement, lost: server.Health
) -> str:
    """What is known about the engine's death: its own error, the memory, its health."""
    own = None if info.errors is None else find_death(info.errors, offset)
    # An engine that runs out of memory mostly does so at once, and then only the warm-up knows it.
    warmup = next(filter(is_out_of_memory, measurement.facts["warmup_errors"]), None)
    return "; ".join(filter(None, (own and shorten(own), warmup, str(lost))))


def _at_saturation(trial: Trial, saturation: Path) -> tuple[Workload, dict[str, Any]]:
    """The workload of a sweep's trial with its rate, and for the record where that comes from."""
    from servegrid.analysis.saturation import saturation_rate

    assert trial.workload.rate_fraction is not None
    source, requests = parquet.read_rows(saturation)
    highest = saturation_rate(source, requests)
    rate = trial.workload.rate_fraction * highest
    found = {
        "request_rate": rate,
        "requests_per_s": highest,
        "spec_digest": source["spec_digest"],
    }
    return replace(trial.workload, request_rate=rate), found


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
