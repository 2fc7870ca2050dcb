"""Compares each kind of node of a profile with Slurm's partitions and nodes. Pure."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterator, Sequence

from servegrid.doctor.report import Finding, Group
from servegrid.doctor.resources import Gpus, ResourceRequest
from servegrid.doctor.shell import CommandResult
from servegrid.doctor.slurm import SlurmFacts
from servegrid.doctor.slurm_output import Node, Partition, describe_nodes, is_simple, matches

MAX_LISTED = 12


def check_kind(request: ResourceRequest, facts: SlurmFacts, file: str) -> Iterator[Finding]:
    """Compare one kind, described in `file`, with Slurm's partitions, nodes and accounts."""
    group = Group(f"kind {request.kind}")
    partitions = used_partitions(request, facts)
    if facts.partitions:
        yield from _check_partitions(group, request, facts, file)
    else:
        yield group.skip("partition", facts.errors.get("partitions", "Slurm shows none"))
    if not facts.nodes:
        yield group.skip("nodes", facts.errors.get("nodes", "Slurm shows none"))
    elif partitions or not facts.partitions:
        yield from _check_nodes(group, request, _nodes_in(facts.nodes, partitions), file)
    yield from _check_account(group, request, facts, file)


def check_test_submission(
    request: ResourceRequest, result: CommandResult, nodes_out: bool = False
) -> Finding:
    """The result of `sbatch --test-only` with the kind's options. It submits nothing.

    While all nodes are out of service, it refuses jobs that a real sbatch would queue.
    """
    group = Group(f"kind {request.kind}")
    subject = "sbatch --test-only"
    if nodes_out:
        return group.skip(subject, "refuses every job while no node is available")
    if result.ok:
        return group.ok(subject, _remove_job_number(result.message))
    return group.fail(
        subject,
        f"Slurm refuses the job: {result.message}",
        f"Try it yourself: sbatch --test-only {shlex.join(request.sbatch_options())} --wrap=true",
    )


def are_nodes_out(request: ResourceRequest, facts: SlurmFacts) -> bool:
    """Whether the kind has nodes and all of them are out of service."""
    nodes = [
        node
        for node in _nodes_in(facts.nodes, used_partitions(request, facts))
        if request.constraint is None
        or (is_simple(request.constraint) and matches(node.features, request.constraint))
    ]
    return bool(nodes) and all(node.availability == "out" for node in nodes)


def used_partitions(request: ResourceRequest, facts: SlurmFacts) -> list[Partition]:
    """The existing partitions that the kind's allocations can use."""
    if request.partition:
        names = request.partition.split(",")
        return [facts.partitions[name] for name in names if name in facts.partitions]
    return [partition for partition in facts.partitions.values() if partition.is_default]


def _check_partitions(
    group: Group, request: ResourceRequest, facts: SlurmFacts, file: str
) -> Iterator[Finding]:
    requested = request.partition.split(",") if request.partition else []
    for name in requested:
        if name not in facts.partitions:
            near = difflib.get_close_matches(name, facts.partitions, n=1)
            hint = f"Did you mean `{near[0]}`? " if near else ""
            yield group.fail(
                f"partition {name}",
                "does not exist, or you cannot use it",
                f"{hint}Correct slurm_partition of `{request.kind}` in {file}. "
                f"Slurm has: {_list(sorted(facts.partitions))}.",
            )
    partitions = used_partitions(request, facts)
    if not requested and not partitions:
        yield group.fail(
            "partition",
            "none is requested, and Slurm has no default partition",
            f"Set slurm_partition of `{request.kind}` in {file} to one of: "
            f"{_list(sorted(facts.partitions))}.",
        )
    for partition in partitions:
        if partition.state != "UP":
            yield group.fail(
                f"partition {partition.name}",
                f"is {partition.state}",
                f"Wait until it is up, or correct slurm_partition of `{request.kind}` in {file}.",
            )
        else:
            yield _check_time_limit(group, request, partition, file)


def _check_time_limit(
    group: Group, request: ResourceRequest, partition: Partition, file: str
) -> Finding:
    subject, limit = f"partition {partition.name}", partition.max_minutes
    text = "no time limit" if limit is None else f"time limit {_format_minutes(limit)}"
    requested = request.minutes
    if requested is None:
        return group.fail(
            subject,
            f"up, {text}; the profile requests no runtime, or it cannot be read",
            "Set the runtime in the profile, in minutes: set-resources: measure: runtime: 720.",
        )
    if limit is not None and requested > limit:
        return group.fail(
            subject,
            f"{text}, but the profile requests {_format_minutes(requested)}: Slurm will never "
            "start the job",
            f"Request at most {limit:g} minutes: set-resources: measure: runtime in the profile, "
            f"or timeout_min of `{request.kind}` in {file}. Remaining cells get another "
            "allocation.",
        )
    return group.ok(subject, f"up, {text}, {_format_minutes(requested)} requested")


def _check_nodes(
    group: Group, request: ResourceRequest, candidates: Sequence[Node], file: str
) -> Iterator[Finding]:
    constraint = request.constraint
    if constraint and not is_simple(constraint):
        yield group.skip("nodes", f"only Slurm can evaluate the constraint {constraint}")
        return
    subject = f"nodes {constraint}" if constraint else "nodes"
    nodes = [node for node in candidates if not constraint or matches(node.features, constraint)]
    if not nodes:
        features = sorted({feature for node in candidates for feature in node.features})
        yield group.fail(
            subject,
            f"none of the {len(candidates)} nodes in the partition has these features",
            f"Correct slurm_constraint of `{request.kind}` in {file} (it is case-sensitive). "
            f"The nodes have: {_list(features)}.",
        )
        return
    yield _check_availability(group, request, subject, nodes, file)
    yield _check_size(group, request, nodes, file)
    yield check_gpus(group, request, nodes, file)


def _check_availability(
    group: Group, request: ResourceRequest, subject: str, nodes: Sequence[Node], file: str
) -> Finding:
    text = describe_nodes(nodes)
    if all(node.availability == "out" for node in nodes):
        return group.warn(
            subject,
            f"{text}: no node is available now, so allocations would wait",
            "Wait until they are available again (`sinfo -R` shows the reasons), or use "
            f"other nodes in {file}.",
        )
    if len(nodes) < request.max_nodes:
        return group.warn(
            subject,
            f"{text}, but one deployment needs {request.max_nodes}",
            f"Relax slurm_constraint of `{request.kind}` in {file}, or exclude the deployment.",
        )
    return group.ok(subject, text)


def _check_size(
    group: Group, request: ResourceRequest, nodes: Sequence[Node], file: str
) -> Finding:
    large_enough = [
        node for node in nodes if node.cpus >= request.cpus and node.memory_mb >= request.memory_mb
    ]
    text = f"{_range([node.cpus for node in nodes])} CPUs, " + (
        f"{_range([round(node.memory_mb / 1024) for node in nodes])} GiB of memory per node"
    )
    requested = f"{request.cpus} CPUs"
    if request.memory_mb:
        requested += f", {request.memory_mb / 1024:g} GiB"
    if not large_enough:
        return group.fail(
            "CPUs and memory",
            f"{text}, but {requested} requested",
            f"Lower cpus_per_task or the memory of `{request.kind}` in {file}.",
        )
    some = f" ({len(large_enough)} of {len(nodes)} nodes have them)"
    return group.ok(
        "CPUs and memory",
        f"{text}; {requested} requested{some if len(large_enough) < len(nodes) else ''}",
    )


def check_gpus(group: Group, request: ResourceRequest, nodes: Sequence[Node], file: str) -> Finding:
    """Compare the kind's GPUs with those that Slurm manages in the nodes."""
    counts = {count for node in nodes if (count := _count_gpus(node, request.gpus))}
    stated = request.values.get("gpus_of_node")
    # On a shared node, a limit of the user can be lower.
    fits = stated in counts or (
        bool(counts) and not request.values.get("slurm_exclusive") and stated in range(max(counts))
    )
    if stated and counts and not fits:
        return group.warn(
            "GPUs",
            f"gpus_of_node is {stated}, but Slurm manages {_range(sorted(counts))} per node",
            f"Correct gpus_of_node of `{request.kind}` in {file}.",
        )
    managed = sorted({str(gpus) for node in nodes for gpus in node.gpus})
    text = f"Slurm manages gpu:{' and gpu:'.join(managed)} per node" if managed else ""
    requested = request.gpus
    if requested is None:
        if not (managed and request.needs_gpus):
            return group.ok("GPUs", "none requested" + ("" if managed else ", none managed"))
        gres = f"gpu:{managed[0]}"
        return group.warn(
            "GPUs",
            f"{text}, but the kind requests none: its jobs may see no GPU",
            f"Set `slurm_gres: {gres}` for `{request.kind}` in {file} and remove gpus_per_node: 0.",
        )
    if not managed:
        return group.fail(
            "GPUs",
            f"{requested} requested, but Slurm does not manage GPUs in these nodes",
            f"Set `gpus_per_node: 0` for `{request.kind}` in {file}: a job on a whole node "
            "(slurm_exclusive) can use its GPUs.",
        )
    if not any(_has_gpus(node.gpus, requested) for node in nodes):
        return group.fail(
            "GPUs",
            f"{text}, but {requested} requested",
            f"Correct slurm_gres or gpus_per_node of `{request.kind}` in {file}: "
            f"gpu:{' or gpu:'.join(managed)} (it is case-sensitive).",
        )
    return group.ok("GPUs", f"{text}; {requested} requested")


def _check_account(
    group: Group, request: ResourceRequest, facts: SlurmFacts, file: str
) -> Iterator[Finding]:
    account, qos = request.values.get("slurm_account"), request.values.get("slurm_qos")
    accounts = facts.accounts
    if accounts is None or not (account or qos):
        enforced = facts.settings.get("AccountingStorageEnforce", "")
        if account or qos:
            yield group.skip("account and QoS", facts.errors.get("accounts", "cannot be checked"))
        elif accounts == {} and "associations" in enforced:
            yield group.fail(
                "account", "you have none", "Ask the administrators for an account in Slurm."
            )
        return
    if account and account not in accounts:
        yield group.fail(
            "account",
            f"`{account}` is not one of yours: {_list(sorted(accounts))}",
            f"Correct slurm_account of `{request.kind}` in {file}.",
        )
        return
    used = [accounts[account]] if account else list(accounts.values())
    allowed: set[str] = set().union(*used)
    if qos and qos not in allowed:
        yield group.fail(
            "QoS",
            f"`{qos}` is not one of yours: {_list(sorted(allowed))}",
            f"Correct slurm_qos of `{request.kind}` in {file}.",
        )
        return
    yield group.ok("account and QoS", " ".join(filter(None, (account, qos))))


def _nodes_in(nodes: Sequence[Node], partitions: Sequence[Partition]) -> list[Node]:
    names = {partition.name for partition in partitions}
    return [node for node in nodes if not names or node.partitions & names]


def _count_gpus(node: Node, requested: Gpus | None) -> int:
    """The GPUs of a node that are of the requested type, if one is requested."""
    wanted = requested.type if requested else None
    return sum(gpus.count for gpus in node.gpus if wanted in (None, gpus.type))


def _has_gpus(available: Sequence[Gpus], requested: Gpus) -> bool:
    if requested.type is None:
        return sum(gpus.count for gpus in available) >= requested.count
    return any(gpus.type == requested.type and gpus.count >= requested.count for gpus in available)


def _remove_job_number(text: str) -> str:
    """`sbatch: Job 17 to start at …`: no job is created, so its number means nothing."""
    head, found, rest = text.partition(" to start at ")
    return f"would start at {rest}" if found and "Job" in head else text


def _list(names: Sequence[str]) -> str:
    more = len(names) - MAX_LISTED
    listed = ", ".join(names[:MAX_LISTED])
    return listed + (f" and {more} more" if more > 0 else "") or "none"


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def _format_minutes(minutes: float) -> str:
    return f"{minutes / 60:g} h" if minutes >= 60 else f"{minutes:g} min"
