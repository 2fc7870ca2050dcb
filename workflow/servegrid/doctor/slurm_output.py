"""Parses the output of Slurm's programs. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from servegrid.doctor.resources import Gpus, parse_gres
from servegrid.study.text import pluralize

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
    """A partition. `max_minutes` is None without a time limit.

    `allow_accounts`, `allow_qos` and `allow_groups` are None if all can use it. `qos` has limits
    for all its jobs.
    """

    name: str
    is_default: bool
    state: str
    max_minutes: float | None
    preempt_mode: str
    grace_s: int
    allow_accounts: frozenset[str] | None = None
    deny_accounts: frozenset[str] = frozenset()
    allow_qos: frozenset[str] | None = None
    allow_groups: frozenset[str] | None = None
    root_only: bool = False
    qos: str | None = None
    over_subscribe: str = "NO"


@dataclass(frozen=True)
class Limit:
    """What one job, or all jobs of one user, can have; None: no limit."""

    minutes: float | None = None
    gpus: int | None = None
    cpus: int | None = None


@dataclass(frozen=True)
class Account:
    """An account of a user: its QoS, the default one, and its limits."""

    qos: frozenset[str]
    default_qos: str | None = None
    limit: Limit = Limit()


@dataclass(frozen=True)
class Node:
    """A node with what it has, not what is free."""

    name: str
    partitions: frozenset[str]
    features: frozenset[str]
    gpus: tuple[Gpus, ...]
    cpus: int
    memory_mb: int
    state: str

    @property
    def availability(self) -> str:
        """`idle`, `busy`, or `out` (of service)."""
        states = set(re.split(r"[+]", self.state.rstrip("*~#$@!%^-")))
        if states & OUT_STATES or self.state.endswith("*"):
            return "out"
        return "idle" if states <= IDLE_STATES else "busy"


def parse_version(text: str) -> tuple[int, int] | None:
    """(22, 5) of `slurm-wlm 22.05.8`."""
    found = re.search(r"\b(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def parse_settings(text: str) -> dict[str, str]:
    """The output of `scontrol show config`."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def parse_seconds(value: str) -> int | None:
    """600 for `600 sec`; None for other text."""
    found = re.match(r"\d+", value)
    return int(found[0]) if found else None


def parse_time_limit(text: str) -> float | None:
    """Minutes of a time limit such as `3-00:00:00` or `01:30:00`; None for `UNLIMITED`."""
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


def parse_partitions(text: str) -> dict[str, Partition]:
    """The output of `scontrol -o show partition`, by name."""
    found = (_parse_fields(line) for line in text.splitlines())
    return {
        fields["PartitionName"]: Partition(
            name=fields["PartitionName"],
            is_default=fields.get("Default") == "YES",
            state=fields.get("State", "UNKNOWN"),
            max_minutes=parse_time_limit(fields.get("MaxTime", "")),
            preempt_mode=fields.get("PreemptMode", ""),
            grace_s=int(fields.get("GraceTime", "0")),
            allow_accounts=_parse_allowed(fields.get("AllowAccounts", "ALL")),
            deny_accounts=_parse_list(fields.get("DenyAccounts", "")),
            allow_qos=_parse_allowed(fields.get("AllowQos", "ALL")),
            allow_groups=_parse_allowed(fields.get("AllowGroups", "ALL")),
            root_only=fields.get("RootOnly") == "YES",
            qos=fields.get("QoS") if fields.get("QoS") not in ("N/A", "(null)", "") else None,
            over_subscribe=fields.get("OverSubscribe", "NO").partition(":")[0],
        )
        for fields in found
        if "PartitionName" in fields
    }


def parse_nodes(text: str) -> list[Node]:
    """The output of `scontrol -o show node`."""
    found = (_parse_fields(line) for line in text.splitlines())
    return [
        Node(
            name=fields["NodeName"],
            partitions=_parse_list(fields.get("Partitions", "")),
            features=_parse_list(fields.get("ActiveFeatures", fields.get("AvailableFeatures", ""))),
            gpus=tuple(parse_gres(fields.get("Gres", ""))),
            cpus=int(fields.get("CPUEfctv", fields.get("CPUTot", "0"))),
            memory_mb=int(fields.get("RealMemory", "0")),
            state=fields.get("State", "UNKNOWN"),
        )
        for fields in found
        if "NodeName" in fields
    ]


def parse_accounts(text: str) -> dict[str, set[str]]:
    """QoS by account, from `sacctmgr -n -P show assoc format=account,qos`."""
    return {name: set(account.qos) for name, account in parse_associations(text).items()}


def parse_associations(text: str) -> dict[str, Account]:
    """By account, from `sacctmgr show assoc format=account,qos,defaultqos,maxwall,maxtres`."""
    found: dict[str, Account] = {}
    for line in text.splitlines():
        name, qos, default, wall, tres = (*line.strip().split("|"), *[""] * 5)[:5]
        if name:
            before = found.get(name, Account(frozenset()))
            names = before.qos | _parse_list(qos)
            default_qos = before.default_qos or default or None
            found[name] = Account(names, default_qos, parse_limit(wall, tres))
    return found


def parse_qos(text: str) -> dict[str, Limit]:
    """By QoS, from `sacctmgr show qos format=name,maxwall,maxtres,maxtrespu`."""
    found = {}
    for line in text.splitlines():
        name, wall, *tres = (*line.strip().split("|"), *[""] * 4)[:4]
        if name:
            found[name] = parse_limit(wall, *tres)
    return found


def parse_limit(wall: str, *tres: str) -> Limit:
    """A limit such as `2-00:00:00` and `cpu=64,gres/gpu=2,mem=1T`; the smallest number counts."""
    numbers: dict[str, list[int]] = {"gres/gpu": [], "cpu": []}
    for word in ",".join(tres).split(","):
        name, _, number = word.partition("=")
        if name in numbers and number.isdecimal():
            numbers[name].append(int(number))
    return Limit(
        parse_time_limit(wall),
        min(numbers["gres/gpu"], default=None),
        min(numbers["cpu"], default=None),
    )


def is_simple(constraint: str) -> bool:
    """Whether a constraint only joins features with & and |, without groups and counts."""
    return re.fullmatch(r"[\w.:=-]+([&|][\w.:=-]+)*", constraint.replace(" ", "")) is not None


def matches(features: Iterable[str], constraint: str) -> bool:
    """Whether a node's features fulfil a simple constraint, evaluated from left to right."""
    present = frozenset(features)
    first, *rest = re.split(r"([&|])", constraint.replace(" ", ""))
    result = first in present
    for operator, feature in zip(rest[::2], rest[1::2], strict=True):
        has = feature in present
        result = (result and has) if operator == "&" else (result or has)
    return result


def describe_nodes(nodes: Sequence[Node]) -> str:
    """For example `4 nodes (3 idle, 1 busy)`."""
    counts = Counter(node.availability for node in nodes)
    text = ", ".join(f"{counts[each]} {each}" for each in ("idle", "busy", "out") if counts[each])
    return f"{pluralize(len(nodes), 'node')} ({text})" if nodes else "no nodes"


def _parse_fields(line: str) -> dict[str, str]:
    """The `Key=value` words of a line. If a key occurs twice, the first one counts."""
    found: list[tuple[str, str]] = re.findall(r"(?:^|(?<=\s))([\w:/]+)=(\S*)", line)
    return dict(reversed(found))


def _parse_list(text: str) -> frozenset[str]:
    return frozenset(() if text == "(null)" else filter(None, text.split(",")))


def _parse_allowed(text: str) -> frozenset[str] | None:
    return None if text in ("ALL", "") else _parse_list(text)
