"""The sampler with fake GPUs: the real `pynvml` calls a fake NVML library written in C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.fake_nvml import GpuScript, build
from servegrid.analysis.energy import MAX_GAP_S, gpu_columns, mean_power
from servegrid.analysis.metrics import memory_peak_bytes
from servegrid.records import columns, parquet
from servegrid.telemetry import sampler

pytestmark = pytest.mark.crowded

HZ = 20.0
GIB = 2**30
NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED, GPU_IS_LOST, UNKNOWN = 3, 4, 9, 15, 999
"""nvmlReturn_t of nvml.h."""

A, B = "GPU-aaaa1111-0000-0000-0000-000000000000", "GPU-bbbb2222-0000-0000-0000-000000000000"
MIG = "MIG-cccc3333-0000-0000-0000-000000000000"
READINGS: dict[str, Any] = {
    "power": 190_000,
    "instant": 200_000,
    "energy": (5_000_000, 204_000),
    "used": 20 * GIB,
    "reserved": GIB,
    "utilization": 75,
    "sm_clock": 1410,
    "memory_clock": 1215,
    "temperature": 54,
    "reasons": 0x4,
}
"""200 W by the samples, 204 W by the energy counter."""

Row = dict[str, Any]
Sampled = Callable[..., list[Row]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def sampled(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sampled:
    """Runs a sampler until `until(rows)` is true, and returns its rows."""

    def run(script: GpuScript, until: Callable[[list[Row]], bool], **variables: str) -> list[Row]:
        script.use(library, tmp_path, monkeypatch, **variables)
        file = tmp_path / "telemetry.jsonl"
        with sampler.Sampler([os.getpid()], file, hz=HZ):
            deadline = time.monotonic() + 60
            while not until(rows := sampler.read_samples(file, 0, 0, time.monotonic_ns())):
                assert time.monotonic() < deadline, rows[-3:]
                time.sleep(0.02)
        return rows

    return run


def select(rows: list[Row], device: str) -> list[Row]:
    return [row for row in rows if row["device"] == device]


def several(device: str, count: int = 3) -> Callable[[list[Row]], bool]:
    return lambda rows: len(select(rows, device)) >= count


def lasting(seconds: float, device: str = "engine") -> Callable[[list[Row]], bool]:
    def until(rows: list[Row]) -> bool:
        times = [row["time_ns"] for row in select(rows, device)]
        return bool(times) and times[-1] - times[0] >= seconds * 1e9

    return until


def test_every_reading_has_the_scripted_value(sampled: Sampled) -> None:
    script = GpuScript()
    script.gpu(A, **READINGS)
    rows = select(sampled(script, several(A)), A)
    for row in rows:
        assert row | {"time_ns": 0, "energy_j": 0.0} == {
            "time_ns": 0,
            "device": A,
            "memory_bytes": 20 * GIB,
            "utilization": pytest.approx(0.75),
            "power_w": 200.0,
            "energy_j": 0.0,
            "sm_clock_mhz": 1410,
            "memory_clock_mhz": 1215,
            "temperature_c": 54,
            "throttle_reasons": 4,
        }
    # The counter is read after the time stamp of its row and before that of the next row.
    for row, following in pairwise(rows):
        counted_at_s = (row["energy_j"] - 5000) / 204
        since_s = [(each["time_ns"] - script.origin_ns) / 1e9 for each in (row, following)]
        assert since_s[0] - 0.001 <= counted_at_s <= since_s[1]


@pytest.mark.parametrize(
    ("counted", "doubtful"), [(204_000, False), (250_000, True), (160_000, True)]
)
def test_power_and_energy_come_from_the_counter_and_a_disagreement_is_flagged(
    sampled: Sampled, counted: float, doubtful: bool
) -> None:
    script = GpuScript()
    for uuid in (A, B):
        script.gpu(uuid, **READINGS | {"energy": (0, counted)})
    # Samples 0.05 s apart need 2.5 s to be exact to 2%. If one is late, they need longer.
    for seconds in (6.0, 20.0, 40.0):
        rows = sampled(script, lasting(seconds, B))
        table = parquet.arrow_table(columns.TELEMETRY, rows)
        power = mean_power(table)
        if power.mean_w is not None:
            break
    # Two GPUs.
    assert power.sampled_w == pytest.approx(400)
    assert power.mean_w == power.counter_w == pytest.approx(2 * counted / 1000, rel=0.04)
    assert power.disagreement == pytest.approx(200_000 / counted - 1, abs=0.05)
    assert power.is_suspect is doubtful
    assert memory_peak_bytes(table) == 40 * GIB
    assert gpu_columns(table) == {
        "gpu_utilization_mean": pytest.approx(0.75),
        "gpu_temperature_c_max": 54,
        "sm_clock_mhz_min": 1410,
        "sm_clock_mhz_max": 1410,
    }


def test_unsupported_readings_are_null_and_zero_stays_zero(sampled: Sampled) -> None:
    script = GpuScript()
    script.gpu(A, utilization=0, energy=0, reasons=0)
    row = select(sampled(script, several(A)), A)[-1]
    known = {name: value for name, value in row.items() if value is not None}
    assert known.pop("time_ns") > script.origin_ns
    assert known == {"device": A, "utilization": 0.0, "energy_j": 0.0, "throttle_reasons": 0}
    assert row.keys() >= {"memory_bytes", "power_w", "temperature_c"}


def test_power_is_the_drivers_mean_if_it_has_no_instant_power(
    sampled: Sampled,
) -> None:
    script = GpuScript()
    script.gpu(A, power=190_000)
    assert select(sampled(script, several(A)), A)[-1]["power_w"] == 190.0


def test_an_old_driver_is_read_through_its_older_functions(
    sampled: Sampled, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build(tmp_path_factory.mktemp("old"), old_driver=True)
    script = GpuScript()
    script.gpu(A, **READINGS)
    row = select(sampled(script, several(A), LD_LIBRARY_PATH=str(old)), A)[-1]
    # Its used memory includes the memory that the driver reserves.
    assert (row["memory_bytes"], row["power_w"], row["throttle_reasons"]) == (21 * GIB, 190.0, 4)


@pytest.mark.parametrize(
    ("named", "devices"),
    [
        (None, [A, B]),
        ("1", [B]),
        ("1,0", [A, B]),
        (B, [B]),
        ("GPU-bb", [B]),
        ("GPU-", []),  # a prefix of both
        (MIG, [MIG]),
        (f"{MIG}, 0", [A, MIG]),
        ("0,7,1", [A]),
        ("0,-1,1", [A]),
        ("", []),
        ("NoDevFiles", []),
        ("MIG-dddd", []),
    ],
)
def test_only_the_gpus_of_the_allocation_are_sampled(
    sampled: Sampled, named: str | None, devices: list[str]
) -> None:
    script = GpuScript()
    script.gpu(A, **READINGS)
    script.gpu(MIG, part=True, used=4 * GIB)
    script.gpu(B, **READINGS)
    variables = {} if named is None else {"CUDA_VISIBLE_DEVICES": named}

    def until(rows: list[Row]) -> bool:
        return lasting(0.5)(rows) and all(several(each)(rows) for each in devices)

    rows = sampled(script, until, **variables)
    assert sorted({row["device"] for row in rows} - {"engine"}) == devices
    for row in select(rows, MIG):
        assert (row["memory_bytes"], row["power_w"]) == (4 * GIB, None)


def test_gpus_of_other_jobs_are_ignored_and_a_failing_gpu_is_named(
    sampled: Sampled,
) -> None:
    script = GpuScript()
    script.gpu("GPU-of-another-job")
    script.fail("open", NO_PERMISSION)
    script.gpu(A, **READINGS)
    script.gpu(B, **READINGS)
    script.fail("open", GPU_IS_LOST)
    rows = sampled(script, several("index 2"))
    assert {row["device"] for row in rows} == {"engine", A, "index 2"}
    assert select(rows, "index 2")[-1].keys() == {"time_ns", "device"}
    assert mean_power(parquet.arrow_table(columns.TELEMETRY, rows)).mean_w is None
    assert sampled(script, several(A), CUDA_VISIBLE_DEVICES="0")


def test_a_lost_gpu_is_null_from_then_on_and_the_others_continue(sampled: Sampled) -> None:
    script = GpuScript()
    script.gpu(A, **READINGS)
    script.fail("all", GPU_IS_LOST, "later")
    script.gpu(B, **READINGS)

    def lost(row: Row) -> bool:
        return row["device"] != "engine" and row["memory_bytes"] is None

    def until(rows: list[Row]) -> bool:
        if several(A)(rows):
            script.begin_faults()
        return lasting(MAX_GAP_S + 0.2, A)([row for row in rows if lost(row)])

    rows = sampled(script, until)
    states = [lost(row) for row in select(rows, A)]
    assert states[:3] == [False] * 3
    assert states == sorted(states)  # never known again
    assert not any(map(lost, select(rows, B)))
    # The beginning does not give the mean power of the whole time.
    assert mean_power(parquet.arrow_table(columns.TELEMETRY, rows)).mean_w is None


def test_a_failing_call_does_not_affect_other_readings(sampled: Sampled) -> None:
    script = GpuScript()
    script.gpu(A, **READINGS)
    script.fail("energy", NOT_SUPPORTED, "later")
    script.fail("temperature", UNKNOWN, "later")

    def until(rows: list[Row]) -> bool:
        if several(A)(rows):
            script.begin_faults()
        return rows != [] and rows[-1].get("temperature_c", 54) is None

    first, *_, row = select(sampled(script, until), A)
    assert first["energy_j"] >= 5000
    assert first["temperature_c"] == 54
    assert (row["energy_j"], row["temperature_c"]) == (None, None)
    assert (row["power_w"], row["memory_bytes"]) == (200.0, 20 * GIB)


def test_a_driver_that_hangs_stops_neither_engine_samples_nor_the_sampler(
    sampled: Sampled,
) -> None:
    script = GpuScript()
    script.gpu(A, **READINGS)
    script.hang("temperature", "later")

    def until(rows: list[Row]) -> bool:
        if not several(A)(rows):
            return False
        script.begin_faults()
        after = [
            row for row in select(rows, "engine") if row["time_ns"] > select(rows, A)[-1]["time_ns"]
        ]
        return lasting(1.0)(after)

    rows = sampled(script, until)
    # The row that was being read when the driver hung is missing.
    assert all(row["temperature_c"] == 54 for row in select(rows, A))


@pytest.mark.parametrize("script", [GpuScript(init=DRIVER_NOT_LOADED), GpuScript(count=UNKNOWN)])
def test_without_a_driver_only_the_engine_is_sampled_and_the_log_says_why(
    sampled: Sampled, script: GpuScript, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = sampled(script, lasting(0.5))
    assert {row["device"] for row in rows} == {"engine"}
    log = capfd.readouterr().err
    assert log.startswith("servegrid: no GPU data: NVML failed: ")
    assert log.count("\n") == 1


def test_a_sampler_whose_driver_hangs_still_ends_with_its_parent(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = GpuScript()
    script.gpu(A, **READINGS)
    script.hang("instant")
    script.use(library, tmp_path, monkeypatch)
    file = tmp_path / "telemetry.jsonl"
    code = (
        "import os, sys, time, pathlib; from servegrid.telemetry import sampler\n"
        "with sampler.Sampler([os.getpid()], pathlib.Path(sys.argv[1])): time.sleep(300)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(file)])
    deadline = time.monotonic() + 60
    while not (file.exists() and file.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (sampler,) = psutil.Process(parent.pid).children()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    gone, _ = psutil.wait_procs([sampler], timeout=30)
    assert gone == [sampler]


def test_the_driver_and_the_gpus_of_the_allocation_are_described(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = GpuScript()
    script.gpu(A)
    script.gpu(B)
    script.use(library, tmp_path, monkeypatch, CUDA_VISIBLE_DEVICES="1")
    code = (
        "import json, os; from servegrid.node import nvml;"
        "print(json.dumps(nvml.describe_gpus(os.environ)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == {
        "driver": "580.65.06",
        "gpus": [{"uuid": B, "name": "Scripted GPU"}],
    }
