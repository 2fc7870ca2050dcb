"""Each kind of node of a profile against the partitions and nodes that Slurm has. Pure."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterator, Sequence

from servegrid.doctor.commands import Answer
from servegrid.doctor.demands import Demand, Gpus
from servegrid.doctor.report import Finding, Group
from servegrid.doctor.slurm import Facts
from servegrid.doctor.slurm_facts import Node, Partition, fits, is_readable, spread

SHOWN = 12


def judge_kind(demand: Demand, facts: Facts, where: str) -> Iterator[Finding]:
    """Everything that Slurm's own facts say about one kind; `where` names its file."""
    group = Group(f"kind {demand.kind}")
    partitions = partitions_in_use(demand, facts)
    if facts.partitions:
        yield from _judge_partition(group, demand, facts, where)
    else:
        yield group.skip("partition", facts.silence.get("partitions", "Slurm shows none"))
    if not facts.nodes:
        yield group.skip("nodes", facts.silence.get("nodes", "Slurm shows none"))
    elif partitions or not facts.partitions:
        yield from _judge_nodes(group, demand, _within(facts.nodes, partitions), where)
    yield from _judge_account(group, demand, facts, where)


def judge_test(demand: Demand, answer: Answer, nodes_out: bool = False) -> Finding:
    """What `sbatch --test-only` says of the kind's options; it submits nothing.

    While all nodes are out it refuses what a real sbatch would let wait.
    """
    group = Group(f"kind {demand.kind}")
    if nodes_out:
        return group.skip("sbatch --test-only", "refuses everything while no node is up")
    if answer.good:
        return group.ok("sbatch --test-only", _without_job_number(answer.complaint))
    return group.fail(
        "sbatch --test-only",
        f"Slurm refuses: {answer.complaint}",
        f"Try it by hand: sbatch --test-only {shlex.join(demand.sbatch())} --wrap=true",
    )


def all_out(demand: Demand, facts: Facts) -> bool:
    """Whether the kind has nodes, and none of them can take an allocation now."""
    nodes = [
        node
        for node in _within(facts.nodes, partitions_in_use(demand, facts))
        if demand.constraint is None
        or (is_readable(demand.constraint) and fits(node.features, demand.constraint))
    ]
    return bool(nodes) and all(node.use == "out" for node in nodes)


def partitions_in_use(demand: Demand, facts: Facts) -> list[Partition]:
    """The partitions that a kind's allocations may go to, of those that exist."""
    if demand.partition:
        names = demand.partition.split(",")
        return [facts.partitions[name] for name in names if name in facts.partitions]
    return [each for each in facts.partitions.values() if each.is_default]


def _judge_partition(group: Group, demand: Demand, facts: Facts, where: str) -> Iterator[Finding]:
    wanted = demand.partition.split(",") if demand.partition else []
    for name in wanted:
        if name not in facts.partitions:
            near = difflib.get_close_matches(name, facts.partitions, n=1)
            meant = f"Did you mean `{near[0]}`? " if near else ""
            yield group.fail(
                f"partition {name}",
                "does not exist, or not for you",
                f"{meant}Correct slurm_partition of `{demand.kind}` in {where}; "
                f"there are: {_some(sorted(facts.partitions))}.",
            )
    partitions = partitions_in_use(demand, facts)
    if not wanted and not partitions:
        yield group.fail(
            "partition",
            "none is asked for, and Slurm has no default",
            f"Give `{demand.kind}` in {where} a slurm_partition of these: "
            f"{_some(sorted(facts.partitions))}.",
        )
    for partition in partitions:
        if partition.state != "UP":
            yield group.fail(
                f"partition {partition.name}",
                f"is {partition.state}",
                f"Wait until it is up, or correct slurm_partition of `{demand.kind}` in {where}.",
            )
        else:
            yield _judge_limit(group, demand, partition, where)


def _judge_limit(group: Group, demand: Demand, partition: Partition, where: str) -> Finding:
    subject, limit = f"partition {partition.name}", partition.max_minutes
    text = "no time limit" if limit is None else f"time limit {_duration(limit)}"
    asked = demand.minutes
    if asked is None:
        return group.fail(
            subject,
            f"up, {text}; no runtime is asked for, or none that can be read",
            "Write minutes in the profile: set-resources: measure: runtime: 720.",
        )
    if limit is not None and asked > limit:
        return group.fail(
            subject,
            f"{text}, but {_duration(asked)} are asked for: such a job waits for ever",
            f"Ask for at most {limit:g} minutes: set-resources: measure: runtime in the profile, "
            f"or timeout_min of `{demand.kind}` in {where}. What is left gets a further "
            "allocation.",
        )
    return group.ok(subject, f"up, {text}, {_duration(asked)} asked for")


def _judge_nodes(
    group: Group, demand: Demand, candidates: Sequence[Node], where: str
) -> Iterator[Finding]:
    constraint = demand.constraint
    if constraint and not is_readable(constraint):
        yield group.skip("nodes", f"constraint {constraint} is for Slurm to judge")
        return
    subject = f"nodes {constraint}" if constraint else "nodes"
    nodes = [each for each in candidates if not constraint or fits(each.features, constraint)]
    if not nodes:
        features = sorted({feature for node in candidates for feature in node.features})
        yield group.fail(
            subject,
            f"none of {len(candidates)} nodes of the partition has these features",
            f"Correct slurm_constraint of `{demand.kind}` in {where} (upper and lower case "
            f"count); there are: {_some(features)}.",
        )
        return
    yield _judge_availability(group, demand, subject, nodes, where)
    yield _judge_size(group, demand, nodes, where)
    yield judge_gpus(group, demand, nodes, where)


def _judge_availability(
    group: Group, demand: Demand, subject: str, nodes: Sequence[Node], where: str
) -> Finding:
    usable = sum(node.use != "out" for node in nodes)
    if usable == 0:
        return group.warn(
            subject,
            f"{spread(nodes)}: allocations would wait",
            f"Wait until they are back (`sinfo -R` may say why), or name others in {where}.",
        )
    if len(nodes) < demand.most_nodes:
        return group.warn(
            subject,
            f"{spread(nodes)}, but one deployment takes {demand.most_nodes}",
            f"Loosen slurm_constraint of `{demand.kind}` in {where}, or leave the deployment out.",
        )
    return group.ok(subject, spread(nodes))


def _judge_size(group: Group, demand: Demand, nodes: Sequence[Node], where: str) -> Finding:
    enough = [
        node for node in nodes if node.cpus >= demand.cpus and node.memory_mb >= demand.memory_mb
    ]
    text = f"{_range([node.cpus for node in nodes])} CPUs, " + (
        f"{_range([round(node.memory_mb / 1024) for node in nodes])} GiB of memory"
    )
    asked = f"{demand.cpus} CPUs"
    if demand.memory_mb:
        asked += f", {demand.memory_mb / 1024:g} GiB"
    if not enough:
        return group.fail(
            "CPUs and memory",
            f"{text} in a node, but {asked} are asked for",
            f"Lower cpus_per_task or the memory of `{demand.kind}` in {where}.",
        )
    some = "" if len(enough) == len(nodes) else f", enough in {len(enough)} of {len(nodes)}"
    return group.ok("CPUs and memory", f"{text}; {asked} asked for{some}")


def judge_gpus(group: Group, demand: Demand, nodes: Sequence[Node], where: str) -> Finding:
    """GPUs that the kind asks for, against those that Slurm manages in its nodes."""
    in_node = {sum(gpus.count for gpus in node.gpus) for node in nodes if node.gpus}
    said = demand.values.get("gpus_of_node")
    if said and in_node and said not in in_node:
        return group.warn(
            "GPUs",
            f"gpus_of_node is {said}, but Slurm manages {_range(sorted(in_node))} in a node",
            f"Correct gpus_of_node of `{demand.kind}` in {where}.",
        )
    managed = sorted({str(gpus) for node in nodes for gpus in node.gpus})
    text = f"Slurm manages gpu:{' and gpu:'.join(managed)} in a node" if managed else ""
    asked = demand.gpus
    if asked is None:
        if not (managed and demand.wants_gpus):
            return group.ok("GPUs", "none asked for" + ("" if managed else ", none managed"))
        gres = f"gpu:{managed[0]}"
        return group.warn(
            "GPUs",
            f"{text}, but none are asked for: it may hand none over",
            f"Give `{demand.kind}` in {where} `slurm_gres: {gres}` and remove gpus_per_node: 0.",
        )
    if not managed:
        return group.fail(
            "GPUs",
            f"{asked} are asked for by name, but Slurm manages none in these nodes",
            f"Write `gpus_per_node: 0` for `{demand.kind}` in {where}: whole nodes "
            "(slurm_exclusive) bring their GPUs along.",
        )
    if not any(_covers(node.gpus, asked) for node in nodes):
        return group.fail(
            "GPUs",
            f"{text}, but {asked} are asked for",
            f"Correct slurm_gres or gpus_per_node of `{demand.kind}` in {where}: "
            f"gpu:{' or gpu:'.join(managed)} (upper and lower case count).",
        )
    return group.ok("GPUs", f"{text}; {asked} asked for")


def _judge_account(group: Group, demand: Demand, facts: Facts, where: str) -> Iterator[Finding]:
    account, qos = demand.values.get("slurm_account"), demand.values.get("slurm_qos")
    accounts = facts.accounts
    if accounts is None or not (account or qos):
        if account or qos:
            yield group.skip("account and QoS", facts.silence.get("accounts", "cannot be asked"))
        elif accounts == {} and "associations" in facts.settings.get(
            "AccountingStorageEnforce", ""
        ):
            yield group.fail(
                "account", "you have none", "Ask the administrators for an account in Slurm."
            )
        return
    if account and account not in accounts:
        yield group.fail(
            "account",
            f"`{account}` is not among yours: {_some(sorted(accounts))}",
            f"Correct slurm_account of `{demand.kind}` in {where}.",
        )
        return
    having = [accounts[account]] if account else list(accounts.values())
    allowed: set[str] = set().union(*having)
    if qos and qos not in allowed:
        yield group.fail(
            "QoS",
            f"`{qos}` is not among yours: {_some(sorted(allowed))}",
            f"Correct slurm_qos of `{demand.kind}` in {where}.",
        )
        return
    yield group.ok("account and QoS", " ".join(filter(None, (account, qos))))


def _within(nodes: Sequence[Node], partitions: Sequence[Partition]) -> list[Node]:
    names = {each.name for each in partitions}
    return [node for node in nodes if not names or node.partitions & names]


def _covers(had: Sequence[Gpus], asked: Gpus) -> bool:
    if asked.kind is None:
        return sum(gpus.count for gpus in had) >= asked.count
    return any(gpus.kind == asked.kind and gpus.count >= asked.count for gpus in had)


def _without_job_number(text: str) -> str:
    """`sbatch: Job 17 to start at …`: the number means nothing, for no job is made."""
    head, found, rest = text.partition(" to start at ")
    return f"would start at {rest}" if found and "Job" in head else text


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "") or "none"


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def _duration(minutes: float) -> str:
    return f"{minutes / 60:g} h" if minutes >= 60 else f"{minutes:g} min"
