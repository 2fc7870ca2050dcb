"""The GPUs of an allocation, read through NVIDIA's management library (NVML).

NVML shows all GPUs of a node, whatever CUDA_VISIBLE_DEVICES says. A value that a GPU does not
report is None.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

Row = dict[str, Any]

_VALUE_FIELDS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
"""The members of nvmlValue_t, in the order of nvmlValueType_t (nvml.h)."""


@contextlib.contextmanager
def open_driver() -> Iterator[Any]:
    """The module `pynvml`, initialised; None if there is no NVIDIA driver.

    If there is a driver but NVML cannot use it, it yields None and prints the reason to stderr.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if error.value != pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            warn_unavailable(error)
        yield None
        return
    try:
        yield pynvml
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def warn_unavailable(error: Exception) -> None:
    """Print to stderr why there is no GPU telemetry."""
    print(f"servegrid: no GPU data: NVML failed: {error}", file=sys.stderr)


def visible_gpus(nvml: Any, environment: Mapping[str, str]) -> dict[str, Any]:
    """The GPUs that CUDA sees in `environment`: NVML handles by UUID, in CUDA's order.

    CUDA_VISIBLE_DEVICES contains indices, UUIDs (or prefixes of them) and names of MIG devices.
    CUDA ignores the first name that matches no GPU and everything after it. Indices follow the
    PCI order, as in NVML: the engines run with CUDA_DEVICE_ORDER=PCI_BUS_ID, because CUDA's
    default puts the fastest GPU first. A GPU that this user may not open belongs to another job:
    neither CUDA nor NVML counts it. A GPU that exists but cannot be opened has its index as key
    and None as handle.

    Raises the driver's NVMLError if the GPUs cannot be counted.
    """
    gpus = _all_gpus(nvml)
    names = environment.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return gpus
    visible: dict[str, Any] = {}
    for name in map(str.strip, names.split(",")):
        if name.startswith("MIG-"):
            matches = _mig_device(nvml, name)
        elif name.isdecimal():
            matches = dict(list(gpus.items())[int(name) : int(name) + 1])
        else:
            matches = {uuid: gpus[uuid] for uuid in gpus if name and uuid.startswith(name)}
        if len(matches) != 1:
            break
        visible |= matches
    return visible


def describe_gpus(environment: Mapping[str, str]) -> dict[str, Any]:
    """The driver's version, and UUID and name of each GPU that CUDA sees in `environment`.

    Without GPUs, or if NVML fails, `driver` is None and `gpus` is empty.
    """
    with open_driver() as nvml:
        if nvml is None:
            return {"driver": None, "gpus": []}
        try:
            version, visible = nvml.nvmlSystemGetDriverVersion(), visible_gpus(nvml, environment)
        except nvml.NVMLError as error:
            warn_unavailable(error)
            return {"driver": None, "gpus": []}
        gpus = []
        for uuid, handle in visible.items():
            name = None
            if handle is not None:
                with contextlib.suppress(nvml.NVMLError):
                    name = nvml.nvmlDeviceGetName(handle)
            gpus.append({"uuid": uuid, "name": name})
        return {"driver": version, "gpus": gpus}


def sample_gpu(nvml: Any, uuid: str, handle: Any) -> Row:
    """One sample of a GPU, with the keys of `columns.TELEMETRY`."""

    def read(function: str, *arguments: Any) -> Any:
        with contextlib.suppress(nvml.NVMLError):
            return getattr(nvml, function)(handle, *arguments)
        return None

    if handle is None:
        return {"device": uuid}
    memory = read("nvmlDeviceGetMemoryInfo", nvml.nvmlMemory_v2) or read("nvmlDeviceGetMemoryInfo")
    rates = read("nvmlDeviceGetUtilizationRates")
    power = _field_value(read("nvmlDeviceGetFieldValues", [nvml.NVML_FI_DEV_POWER_INSTANT]))
    if power is None:
        power = read("nvmlDeviceGetPowerUsage")
    reasons = read("nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:
        reasons = read("nvmlDeviceGetCurrentClocksThrottleReasons")
    return {
        "device": uuid,
        "memory_bytes": memory and memory.used,
        "utilization": rates and rates.gpu * 0.01,
        "power_w": _from_milli(power),
        "energy_j": _from_milli(read("nvmlDeviceGetTotalEnergyConsumption")),
        "sm_clock_mhz": read("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": read("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
        "temperature_c": read("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        "throttle_reasons": reasons,
    }


def _all_gpus(nvml: Any) -> dict[str, Any]:
    gpus: dict[str, Any] = {}
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            gpus[nvml.nvmlDeviceGetUUID(handle)] = handle
        except nvml.NVMLError as error:
            if error.value != nvml.NVML_ERROR_NO_PERMISSION:
                gpus[f"index {index}"] = None
    return gpus


def _mig_device(nvml: Any, name: str) -> dict[str, Any]:
    with contextlib.suppress(nvml.NVMLError):
        return {name: nvml.nvmlDeviceGetHandleByUUID(name)}
    return {}


def _field_value(values: Any) -> float | None:
    """The number in the answer of nvmlDeviceGetFieldValues for one field."""
    if values is None or values[0].nvmlReturn:
        return None
    number: float = getattr(values[0].value, _VALUE_FIELDS[values[0].valueType])
    return number


def _from_milli(value: float | None) -> float | None:
    """Converts mW to W and mJ to J."""
    return None if value is None else value / 1000
