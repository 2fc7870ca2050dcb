"""What Slurm says of itself, from the texts of its programs to frozen facts. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from servegrid.doctor.demands import Gpus, gpus_of

OUT_STATES = frozenset(
    {
        *("DOWN", "DRAIN", "DRAINED", "DRAINING", "ERROR", "FAIL", "FAILING", "FUTURE", "INVAL"),
        *("MAINT", "NOT_RESPONDING", "NO_RESPOND", "PERFCTRS", "RESERVED", "UNKNOWN"),
    }
)
IDLE_STATES = frozenset(
    {"IDLE", "CLOUD", "DYNAMIC_NORM", "PLANNED", "POWERED_DOWN", "POWERING_DOWN", "POWERING_UP"}
)
UNLIMITED = frozenset({"UNLIMITED", "INFINITE", "NONE"})


@dataclass(frozen=True)
class Partition:
    name: str
    is_default: bool
    state: str
    max_minutes: float | None
    """None without a limit."""
    preempt_mode: str
    grace_s: int


@dataclass(frozen=True)
class Node:
    name: str
    partitions: frozenset[str]
    features: frozenset[str]
    gpus: tuple[Gpus, ...]
    cpus: int
    memory_mb: int
    state: str

    @property
    def use(self) -> str:
        """`idle`, `busy` or `out`: whether it can take an allocation, now or later."""
        states = set(re.split(r"[+]", self.state.rstrip("*~#$@!%^-")))
        if states & OUT_STATES or self.state.endswith("*"):
            return "out"
        return "idle" if states <= IDLE_STATES else "busy"


def version_of(text: str) -> tuple[int, int] | None:
    """(22, 5) of `slurm-wlm 22.05.8`."""
    found = re.search(r"\b(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def settings_of(text: str) -> dict[str, str]:
    """`scontrol show config` as a mapping."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def seconds_of(value: str) -> int | None:
    """The number of `600 sec`; None of anything else."""
    found = re.match(r"\d+", value)
    return int(found[0]) if found else None


def minutes_of_limit(text: str) -> float | None:
    """Minutes of a time limit such as `3-00:00:00` or `01:30:00`; None of `UNLIMITED`."""
    if text.upper() in UNLIMITED or not text:
        return None
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # days-hours[:minutes[:seconds]]
        parts += [0] * (3 - len(parts))
    elif len(parts) < 3:  # minutes[:seconds]
        parts = [0, *parts, *[0] * (2 - len(parts))]
    hours, minutes, seconds = parts
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def partitions_of(text: str) -> dict[str, Partition]:
    """`scontrol -o show partition`, by name."""
    found = (_fields(line) for line in text.splitlines())
    return {
        fields["PartitionName"]: Partition(
            name=fields["PartitionName"],
            is_default=fields.get("Default") == "YES",
            state=fields.get("State", "UNKNOWN"),
            max_minutes=minutes_of_limit(fields.get("MaxTime", "")),
            preempt_mode=fields.get("PreemptMode", ""),
            grace_s=int(fields.get("GraceTime", "0")),
        )
        for fields in found
        if "PartitionName" in fields
    }


def nodes_of_text(text: str) -> list[Node]:
    """`scontrol -o show node`."""
    found = (_fields(line) for line in text.splitlines())
    return [
        Node(
            name=fields["NodeName"],
            partitions=_listed(fields.get("Partitions", "")),
            features=_listed(fields.get("ActiveFeatures", fields.get("AvailableFeatures", ""))),
            gpus=tuple(gpus_of(fields.get("Gres", ""))),
            cpus=int(fields.get("CPUEfctv", fields.get("CPUTot", "0"))),
            memory_mb=int(fields.get("RealMemory", "0")),
            state=fields.get("State", "UNKNOWN"),
        )
        for fields in found
        if "NodeName" in fields
    ]


def accounts_of(text: str) -> dict[str, set[str]]:
    """QoS by account, of `sacctmgr -n -P show assoc format=account,qos`."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        account, _, qos = line.strip().partition("|")
        if account:
            found.setdefault(account, set()).update(filter(None, qos.split(",")))
    return found


def is_readable(constraint: str) -> bool:
    """Whether `fits` can read it: features joined by & and |, without groups and counts."""
    return re.fullmatch(r"[\w.:=-]+([&|][\w.:=-]+)*", constraint.replace(" ", "")) is not None


def fits(features: Iterable[str], constraint: str) -> bool:
    """Whether a node has what a constraint wants; & and | are read from left to right."""
    had = frozenset(features)
    first, *rest = re.split(r"([&|])", constraint.replace(" ", ""))
    result = first in had
    for operator, feature in zip(rest[::2], rest[1::2], strict=True):
        has = feature in had
        result = (result and has) if operator == "&" else (result or has)
    return result


def spread(nodes: Sequence[Node]) -> str:
    """`4 nodes (3 idle, 1 busy)`."""
    counts = [(use, sum(node.use == use for node in nodes)) for use in ("idle", "busy", "out")]
    text = ", ".join(f"{count} {use}" for use, count in counts if count)
    noun = "node" if len(nodes) == 1 else "nodes"
    return f"{len(nodes)} {noun} ({text})" if nodes else "no nodes"


def _fields(line: str) -> dict[str, str]:
    """The `Key=value` words of a line; of two with the same key, the first."""
    found: list[tuple[str, str]] = re.findall(r"(?:^|(?<=\s))([\w:/]+)=(\S*)", line)
    return dict(reversed(found))


def _listed(text: str) -> frozenset[str]:
    return frozenset(() if text == "(null)" else filter(None, text.split(",")))
