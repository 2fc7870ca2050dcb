"""What NVIDIA's management library (NVML) says of the GPUs that an allocation has.

NVML shows every GPU of a node, whatever CUDA is told to use. What a GPU does not tell is None.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

Row = dict[str, Any]

_NUMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
"""The members of nvmlValue_t, in the order of nvmlValueType_t (nvml.h)."""


@contextlib.contextmanager
def driver() -> Iterator[Any]:
    """The module `pynvml`, ready to be asked; None where there is no driver.

    Why a driver that is there cannot be asked is said on standard error.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if error.value != pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            complain(error)
        yield None
        return
    try:
        yield pynvml
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def complain(error: Exception) -> None:
    """Say on standard error why nothing is known of the GPUs."""
    print(f"servegrid: nothing is known of the GPUs: NVML: {error}", file=sys.stderr)


def visible_gpus(nvml: Any, environment: Mapping[str, str]) -> dict[str, Any]:
    """NVML's handles by UUID of the GPUs that CUDA shows where `environment` holds, in its order.

    CUDA_VISIBLE_DEVICES has indices, UUIDs that may be cut short, and names of parts of GPUs
    (MIG); from the first name on that fits no GPU, CUDA shows none. Indices are in PCI order, as
    NVML counts: the engines run with CUDA_DEVICE_ORDER=PCI_BUS_ID, for CUDA itself would put the
    fastest first. GPUs that this user may not open are another job's, and count for neither. A
    GPU that is there and cannot be opened goes by its index and has None for a handle.

    Raises the driver's NVMLError where the GPUs cannot be counted.
    """
    present = _present(nvml)
    names = environment.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return present
    found: dict[str, Any] = {}
    for name in map(str.strip, names.split(",")):
        if name.startswith("MIG-"):
            part = _part(nvml, name)
        elif name.isdecimal():
            part = dict(list(present.items())[int(name) : int(name) + 1])
        else:
            part = {uuid: present[uuid] for uuid in present if name and uuid.startswith(name)}
        if len(part) != 1:
            break
        found |= part
    return found


def described(environment: Mapping[str, str]) -> dict[str, Any]:
    """The driver's version and the GPUs that CUDA shows where `environment` holds.

    `driver` is None and `gpus` is empty where there are none, or where nothing can be said.
    """
    with driver() as nvml:
        if nvml is None:
            return {"driver": None, "gpus": []}
        try:
            version, visible = nvml.nvmlSystemGetDriverVersion(), visible_gpus(nvml, environment)
        except nvml.NVMLError as error:
            complain(error)
            return {"driver": None, "gpus": []}
        gpus = []
        for uuid, handle in visible.items():
            name = None
            if handle is not None:
                with contextlib.suppress(nvml.NVMLError):
                    name = nvml.nvmlDeviceGetName(handle)
            gpus.append({"uuid": uuid, "name": name})
        return {"driver": version, "gpus": gpus}


def gpu_row(nvml: Any, uuid: str, handle: Any) -> Row:
    """One sample of a GPU, keyed as `columns.TELEMETRY`."""

    def read(name: str, *arguments: Any) -> Any:
        with contextlib.suppress(nvml.NVMLError):
            return getattr(nvml, name)(handle, *arguments)
        return None

    if handle is None:
        return {"device": uuid}
    memory = read("nvmlDeviceGetMemoryInfo", nvml.nvmlMemory_v2) or read("nvmlDeviceGetMemoryInfo")
    rates = read("nvmlDeviceGetUtilizationRates")
    power = _field(read("nvmlDeviceGetFieldValues", [nvml.NVML_FI_DEV_POWER_INSTANT]))
    if power is None:
        power = read("nvmlDeviceGetPowerUsage")
    reasons = read("nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:
        reasons = read("nvmlDeviceGetCurrentClocksThrottleReasons")
    return {
        "device": uuid,
        "memory_bytes": memory and memory.used,
        "utilization": rates and rates.gpu * 0.01,
        "power_w": _thousandth(power),
        "energy_j": _thousandth(read("nvmlDeviceGetTotalEnergyConsumption")),
        "sm_clock_mhz": read("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": read("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
        "temperature_c": read("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        "throttle_reasons": reasons,
    }


def _present(nvml: Any) -> dict[str, Any]:
    present: dict[str, Any] = {}
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            present[nvml.nvmlDeviceGetUUID(handle)] = handle
        except nvml.NVMLError as error:
            if error.value != nvml.NVML_ERROR_NO_PERMISSION:
                present[f"index {index}"] = None
    return present


def _part(nvml: Any, name: str) -> dict[str, Any]:
    with contextlib.suppress(nvml.NVMLError):
        return {name: nvml.nvmlDeviceGetHandleByUUID(name)}
    return {}


def _field(values: Any) -> float | None:
    """The number in what nvmlDeviceGetFieldValues gave for one field."""
    if values is None or values[0].nvmlReturn:
        return None
    number: float = getattr(values[0].value, _NUMBERS[values[0].valueType])
    return number


def _thousandth(value: float | None) -> float | None:
    """From mW and mJ."""
    return None if value is None else value / 1000
