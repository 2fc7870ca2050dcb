"""Proposes the kinds of a profile from what Slurm says about its nodes. Pure."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from servegrid.doctor.resources import Gpus
from servegrid.doctor.slurm import Rights, SlurmFacts, preempt_mode
from servegrid.doctor.slurm_output import Limit, Node, Partition, describe_nodes
from servegrid.study.deployment import CPU
from servegrid.study.text import pluralize

DEFAULT_MINUTES = 720
"""An allocation is long enough for a model that takes an hour to load. Cells that are left get
another allocation."""
MODEL = re.compile(
    r"[vp]100s?|p40|k[48]0|m[46]0|t4|a(2|10g?|16|30|40|100|800)|l(4|20|40s?)|h(20|100|200|800)"
    r"|gh200|g?b[123]00|rtx\w*|gtx\w*|titan\w*|quadro\w*|mi\d{2,3}[ax]?|gaudi\d?"
)
"""Names of GPUs as sites write them in features and types."""
MEMORY = re.compile(r"\d{2,3}gb?")
SLICE = re.compile(r"\d+g\.\d+gb")
COUNT = re.compile(r"(\d+)x?-?gpus?|gpus?-?(\d+)")


@dataclass(frozen=True)
class Choice:
    """A key of a kind, its value, and why it has this value."""

    key: str
    value: Any
    why: str


@dataclass(frozen=True)
class Kind:
    """A proposed kind of node: its name, its nodes in words, and its keys."""

    name: str
    about: str
    choices: tuple[Choice, ...]

    @property
    def values(self) -> dict[str, Any]:
        return {choice.key: choice.value for choice in self.choices}


@dataclass(frozen=True)
class Proposal:
    """The proposed kinds, and what a person should know about hardware without a kind."""

    kinds: tuple[Kind, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Hardware:
    """Nodes with the same GPUs. `gpus` is None without GPUs that Slurm manages."""

    name: str
    nodes: tuple[Node, ...]
    gpus: Gpus | None = None

    @property
    def is_slice(self) -> bool:
        return self.gpus is not None and bool(SLICE.search(self.gpus.type or ""))

    @property
    def is_cpu(self) -> bool:
        return self.name == CPU


def propose(facts: SlurmFacts, rights: Rights) -> Proposal:
    """A kind for each kind of GPU, and one for nodes without GPUs."""
    kinds, notes = [], []
    for hardware in find_hardware(facts.nodes):
        partitions = _rank_partitions(hardware, facts, rights)
        if partitions:
            kinds.append(_propose_kind(hardware, partitions, facts, rights))
        else:
            notes.append(
                f"{hardware.name}: {pluralize(len(hardware.nodes), 'node')}, but you can use no "
                "partition that has them and is up."
            )
    if not any(kind.name == CPU for kind in kinds):
        notes.append("cpu: no node without GPUs; studies with `gpu: cpu` cannot run here.")
    return Proposal(tuple(kinds), tuple(notes))


def find_hardware(nodes: Iterable[Node]) -> list[_Hardware]:
    """The nodes by their GPUs. A node with GPUs of two types is in two groups."""
    groups: dict[tuple[str, Gpus | None], list[Node]] = {}
    for node in nodes:
        for name, gpus in _gpus_of(node):
            groups.setdefault((name, gpus), []).append(node)
    names = [name for name, _ in groups]
    return sorted(
        (
            _Hardware(_distinct(name, gpus, names), tuple(members), gpus)
            for (name, gpus), members in groups.items()
        ),
        key=lambda hardware: (not hardware.is_cpu, hardware.name),
    )


def _distinct(name: str, gpus: Gpus | None, names: Sequence[str]) -> str:
    """The same GPUs in other numbers per node are another kind."""
    return f"{name}-x{gpus.count}" if gpus and names.count(name) > 1 else name


def _gpus_of(node: Node) -> Iterator[tuple[str, Gpus | None]]:
    model = _model_in(node.features)
    counts: dict[str | None, int] = {}
    for gpus in node.gpus:
        counts[gpus.type] = counts.get(gpus.type, 0) + gpus.count
    for gpu_type, count in counts.items():
        if count:
            yield _kind_name(gpu_type, model), Gpus(gpu_type, count)
    if not any(counts.values()):
        yield model or CPU, None


def _kind_name(gpu_type: str | None, model: str | None) -> str:
    """A name that a study can write: without the underscores of many GRES types."""
    if gpu_type is None:
        return model or "gpu"
    clean = re.sub(r"[^a-z0-9.+-]+", "-", gpu_type.lower()).removeprefix("nvidia-").strip("-.+")
    if SLICE.fullmatch(clean):
        return f"{model or 'mig'}-{clean}"
    # A type without a memory size says less than the features of its nodes.
    if model is not None and model.startswith(f"{clean}-"):
        return model
    return clean or "gpu"


def _model_in(features: Iterable[str]) -> str | None:
    """The GPU that a node's features name, such as `a100-80gb`."""
    words = [re.split(r"[-_:.]", feature.lower()) for feature in sorted(features)]
    found = [[word for word in each if MODEL.fullmatch(word)] for each in words]
    models = [each[0] for each in found if each]
    if not models:
        return None
    memory = [word for each in words for word in each if MEMORY.fullmatch(word)]
    return f"{models[0]}-{memory[0].removesuffix('b')}b" if memory else models[0]


# The partition


def _rank_partitions(
    hardware: _Hardware, facts: SlurmFacts, rights: Rights
) -> list[tuple[Partition, list[Node]]]:
    """The partitions that this user can use, with their nodes of this hardware, best first."""
    found = [
        (partition, [node for node in hardware.nodes if partition.name in node.partitions])
        for partition in facts.partitions.values()
        if partition.state == "UP" and may_use(partition, rights)
    ]

    def rank(each: tuple[Partition, list[Node]]) -> tuple[Any, ...]:
        partition, nodes = each
        all_nodes = sum(partition.name in node.partitions for node in facts.nodes)
        limit = partition.max_minutes
        return (
            preempt_mode(facts.settings, partition) is None,
            len(nodes),
            min(DEFAULT_MINUTES, math.inf if limit is None else limit),
            len(nodes) / all_nodes,
            partition.is_default,
        )

    return sorted((each for each in found if each[1]), key=rank, reverse=True)


def may_use(partition: Partition, rights: Rights) -> bool:
    """Whether the partition admits an account, a QoS and a group of this user, if it names some."""
    accounts = rights.accounts
    qos = {name for account in (accounts or {}).values() for name in account.qos}
    return (
        not partition.root_only
        and _admits(partition.allow_accounts, accounts)
        and (accounts is None or not accounts or bool(set(accounts) - partition.deny_accounts))
        and _admits(partition.allow_qos, None if accounts is None else qos)
        and _admits(partition.allow_groups, rights.groups)
    )


def _admits(allowed: frozenset[str] | None, mine: Iterable[str] | None) -> bool:
    return allowed is None or mine is None or bool(allowed & set(mine))


# The keys of a kind


def _propose_kind(
    hardware: _Hardware,
    partitions: Sequence[tuple[Partition, list[Node]]],
    facts: SlurmFacts,
    rights: Rights,
) -> Kind:
    partition, nodes = partitions[0]
    others = [
        node
        for node in facts.nodes
        if partition.name in node.partitions and node.name not in {each.name for each in nodes}
    ]
    account = _choose_account(partition, rights)
    qos = _choose_qos(partition, account, rights)
    limits = _limits(partition, account, qos, rights)
    usage = _Usage.choose(hardware, nodes, limits)
    choices = [
        _partition_choice(partition, partitions[1:], facts),
        *_selection(hardware, nodes, others),
        *_gpu_choices(hardware, nodes, usage),
        usage.exclusive_choice(partition),
        Choice("cpus_per_task", usage.cpus, usage.why_cpus),
        Choice("slurm_mem", usage.memory, usage.why_memory),
        _time_choice(partition, limits),
        *_account_choices(partition, account, qos, rights),
    ]
    return Kind(
        hardware.name,
        f"{describe_nodes(nodes)}: {_names(nodes)}",
        tuple(choices),
    )


def _partition_choice(
    partition: Partition, others: Sequence[tuple[Partition, list[Node]]], facts: SlurmFacts
) -> Choice:
    why = "the only partition with these nodes that you can use"
    if others:
        names = ", ".join(
            f"{other.name} ({_describe_limit(other.max_minutes)}"
            f"{', preemption' if preempt_mode(facts.settings, other) else ''})"
            for other, _ in others
        )
        why = f"{_describe_limit(partition.max_minutes)}; also possible: {names}"
    if mode := preempt_mode(facts.settings, partition):
        why += f". Slurm may preempt jobs here ({mode})"
    return Choice("slurm_partition", partition.name, why)


def _selection(
    hardware: _Hardware, nodes: Sequence[Node], others: Sequence[Node]
) -> Iterator[Choice]:
    """How Slurm chooses these nodes among those of the partition."""
    if not others or _is_chosen_by_gres(hardware, others):
        return
    features = _telling_features(nodes, others)
    if features:
        why = "all these nodes have it, and no other node of the partition"
        yield Choice("slurm_constraint", "&".join(features), why)
    else:
        names = ",".join(sorted(node.name for node in others))
        why = "no feature is only on these nodes, so the other nodes of the partition are excluded"
        yield Choice("slurm_exclude", names, why)


def _is_chosen_by_gres(hardware: _Hardware, others: Sequence[Node]) -> bool:
    gpus = hardware.gpus
    if gpus is None:
        return False
    return not any(gpus.type in (None, each.type) for node in others for each in node.gpus)


def _telling_features(nodes: Sequence[Node], others: Sequence[Node]) -> tuple[str, ...]:
    """One or two features that only `nodes` have; the name of a GPU comes first."""
    common = frozenset.intersection(*(node.features for node in nodes))
    ordered = sorted(common, key=lambda name: (_model_in([name]) is None, len(name), name))
    for size in (1, 2):
        for features in itertools.combinations(ordered, size):
            if not any(node.features.issuperset(features) for node in others):
                return features
    return ()


def _gpu_choices(hardware: _Hardware, nodes: Sequence[Node], usage: _Usage) -> Iterator[Choice]:
    gpus = hardware.gpus
    if hardware.is_cpu:
        return
    if gpus is None:
        stated = _count_in(nodes)
        why = "as their features say" if stated else (
            "CHECK THIS: Slurm does not say how many GPUs a node has. Run `nvidia-smi -L` on one"
        )  # fmt: skip
        yield Choice("gpus_of_node", stated or 1, why)
        yield Choice(
            "gpus_per_node", 0, "Slurm manages no GPUs here: a whole node includes its own"
        )
        return
    if hardware.is_slice:
        yield Choice("gpus_of_node", 1, f"an engine can use one MIG slice; a node has {gpus.count}")
    elif usage.gpus < gpus.count:
        why = f"a node has {gpus.count}, but {usage.limited_by} allows {usage.gpus} of them"
        yield Choice("gpus_of_node", usage.gpus, why)
    else:
        yield Choice("gpus_of_node", gpus.count, "Slurm manages this number per node")
    requested = "gpu" if gpus.type is None else f"gpu:{gpus.type}"
    why = "all of them" if usage.gpus == gpus.count else f"{usage.gpus} of {gpus.count}"
    if gpus.type is not None:
        why += "; the type is case-sensitive"
    yield Choice("slurm_gres", f"{requested}:{usage.gpus}", why)


def _count_in(nodes: Sequence[Node]) -> int | None:
    """GPUs per node that features such as `2gpu` or `gpu4` state; None unless all agree."""
    counts = set()
    for node in nodes:
        found = [COUNT.fullmatch(feature.lower().replace("_", "-")) for feature in node.features]
        counts |= {int(each[1] or each[2]) for each in found if each} or {0}
    return counts.pop() or None if len(counts) == 1 else None


@dataclass(frozen=True)
class _Usage:
    """How much of a node an allocation gets. `limited_by` names the limit that allows no more."""

    exclusive: bool
    gpus: int
    cpus: int
    memory: str
    why_exclusive: str
    why_cpus: str
    why_memory: str
    limited_by: str = ""

    @classmethod
    def choose(
        cls, hardware: _Hardware, nodes: Sequence[Node], limits: Mapping[str, Limit]
    ) -> _Usage:
        cpus, memory_mb = min(node.cpus for node in nodes), min(node.memory_mb for node in nodes)
        if hardware.is_slice:
            slices = max(sum(gpus.count for gpus in node.gpus) for node in nodes)
            why = "a slice is a part of a node, and others may use the rest meanwhile"
            return cls._share(1, 1 / slices, cpus, memory_mb, "one MIG slice", why)
        total = gpus = hardware.gpus.count if hardware.gpus else 0
        allowed, by = cpus, ""
        for name, limit in limits.items():
            if limit.gpus is not None and limit.gpus < gpus:
                gpus, by = limit.gpus, name
            if limit.cpus is not None and limit.cpus < allowed:
                allowed, by = limit.cpus, by or name
        if not by:
            return cls(
                *(True, gpus, cpus, "0", "other jobs on the node would disturb the measurement"),
                *("all that every one of these nodes has", "all memory of the node"),
            )
        part = min(gpus / total if total else 1.0, allowed / cpus)
        why = f"{by} does not allow a whole node; other jobs may disturb the measurement"
        return cls._share(gpus, part, cpus, memory_mb, "this part of the node", why, by)

    @classmethod
    def _share(
        cls, gpus: int, part: float, cpus: int, memory_mb: int, name: str, why: str, by: str = ""
    ) -> _Usage:
        """A part of a node, with as much of its CPUs and memory."""
        return cls(
            *(False, gpus, max(1, int(cpus * part)), f"{int(memory_mb * part)}M", why),
            *(f"the share of {name} in {cpus} CPUs", f"the share of {name} in {memory_mb} MiB", by),
        )

    def exclusive_choice(self, partition: Partition) -> Choice:
        why = self.why_exclusive
        if partition.over_subscribe == "EXCLUSIVE":
            why = "the partition gives whole nodes only"
            return Choice("slurm_exclusive", True, why)
        return Choice("slurm_exclusive", self.exclusive, why)


def _time_choice(partition: Partition, limits: Mapping[str, Limit]) -> Choice:
    named = {f"partition {partition.name}": partition.max_minutes}
    named |= {name: limit.minutes for name, limit in limits.items()}
    known = {name: minutes for name, minutes in named.items() if minutes is not None}
    shortest = min(known, key=lambda name: known[name], default=None)
    if shortest is None or known[shortest] >= DEFAULT_MINUTES:
        limit = f"{shortest} allows {known[shortest]:g}" if shortest else "there is no limit"
        why = f"minutes; {limit}. Cells that are left get another allocation"
        return Choice("timeout_min", DEFAULT_MINUTES, why)
    return Choice("timeout_min", math.floor(known[shortest]), f"minutes: the limit of {shortest}")


# Accounts and QoS


def _choose_account(partition: Partition, rights: Rights) -> str | None:
    """The account of the jobs: the default one if the partition admits it."""
    accounts = [
        name
        for name in rights.accounts or ()
        if _admits(partition.allow_accounts, [name]) and name not in partition.deny_accounts
    ]
    return next((name for name in accounts if name == rights.default_account), None) or next(
        iter(sorted(accounts)), None
    )


def _choose_qos(partition: Partition, account: str | None, rights: Rights) -> str | None:
    """The QoS of the jobs: the account's default one if the partition admits it."""
    mine = (rights.accounts or {}).get(account or "")
    if mine is None:
        return None
    names = [name for name in sorted(mine.qos) if _admits(partition.allow_qos, [name])]
    if mine.default_qos in names:
        return mine.default_qos
    return "normal" if "normal" in names else next(iter(names), None)


def _limits(
    partition: Partition, account: str | None, qos: str | None, rights: Rights
) -> dict[str, Limit]:
    """The limits that apply to a job, by what sets them."""
    found: dict[str, Limit] = {}
    if account is not None and rights.accounts:
        found[f"account {account}"] = rights.accounts[account].limit
    for name in (qos, partition.qos):
        if name is not None and name in rights.qos:
            found[f"QoS {name}"] = rights.qos[name]
    return found


def _account_choices(
    partition: Partition, account: str | None, qos: str | None, rights: Rights
) -> Iterator[Choice]:
    if account is not None and account != rights.default_account:
        others = ", ".join(sorted(set(rights.accounts or ()) - {account}))
        why = f"the partition does not admit your default account; you have: {others or 'no other'}"
        yield Choice("slurm_account", account, why if rights.default_account else "your account")
    mine = (rights.accounts or {}).get(account or "")
    if mine is not None and qos is not None and partition.allow_qos and qos != mine.default_qos:
        yield Choice("slurm_qos", qos, "the partition admits it, and not your default QoS")


def _describe_limit(minutes: float | None) -> str:
    if minutes is None:
        return "no time limit"
    return f"at most {minutes / 60:g} h" if minutes >= 60 else f"at most {minutes:g} min"


def _names(nodes: Sequence[Node]) -> str:
    names = sorted(node.name for node in nodes)
    return ", ".join(names) if len(names) <= 6 else f"{names[0]} to {names[-1]}"
