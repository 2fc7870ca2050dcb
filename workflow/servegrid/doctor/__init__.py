"""`servegrid doctor`: checks a site before the first study. Only `network` submits a job.

`shell` and `files` gather facts, `report` formats the findings, all other modules check facts.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from servegrid.doctor import containers, environments, files, kinds, models, network, slurm
from servegrid.doctor.profile import CLUSTERS, Profile, check_profile, check_study, count_nodes
from servegrid.doctor.proposal import Proposal, propose
from servegrid.doctor.report import Finding, Group, Status
from servegrid.doctor.resources import ResourceRequest, build_request
from servegrid.doctor.shell import RunCommand, run_command
from servegrid.errors import ConfigError
from servegrid.study.config import load_study
from servegrid.study.grid import Deployment, Study
from servegrid.study.revisions import read_revisions

__all__ = ["propose_profile", "run_checks"]

ENGINE_PACKAGES = {"vllm": "vllm", "llamacpp": "xllamacpp"}


def run_checks(
    profile_folder: Path, study_file: Path | None, directory: Path, network_of: str | None = None
) -> Iterator[Finding]:
    """All findings, group by group, each as soon as it is known.

    With `network_of`, a kind, also the network between two of its nodes, in a short allocation.

    Raises ConfigError before the first finding if the profile or the study cannot be read.
    """
    profile = Profile.load(profile_folder)
    study = load_study(study_file, directory) if study_file else None
    if network_of is not None:
        network.check_kind_name(profile, network_of)
    checks = _run_checks(profile, study, study_file or Path(), directory)
    if network_of is None:
        return checks
    return chain(checks, network.check_network(profile, network_of, directory, run_command))


def propose_profile() -> Proposal:
    """Kinds of nodes for the cluster of this machine, from what its Slurm says.

    Raises ConfigError if Slurm is missing, does not answer, or shows no node.
    """
    tools = list(slurm.check_programs(run_command))
    failed = [finding for finding in tools if finding.status is Status.FAIL]
    if not failed:
        responses = slurm.check_responses(*slurm.query_responses(run_command))
        failed = [finding for finding in responses if finding.status is Status.FAIL]
    if failed:
        raise ConfigError(f"{failed[0].subject}: {failed[0].found}. {failed[0].remedy}")
    facts = slurm.query_facts(run_command)
    proposal = propose(facts, slurm.query_rights(run_command))
    if not proposal.kinds:
        why = "; ".join((*facts.errors.values(), *proposal.notes))
        raise ConfigError(
            f"Slurm shows no node that you can use ({why}). Ask the administrators which "
            "partition you can use, and copy profiles/plafrim/."
        )
    return proposal


def _run_checks(
    profile: Profile, study: Study | None, study_file: Path, directory: Path
) -> Iterator[Finding]:
    yield from check_profile(profile)
    if study is not None:
        yield from check_study(profile, study, study_file)
    deployments = study.deployments if study else ()
    uses_slurm = _uses_slurm(profile)
    requests = _build_requests(profile, study)
    if uses_slurm:
        yield from _check_slurm(requests, str(profile.kinds_file or profile.file), run_command)
    else:
        yield Group("slurm").skip("Slurm", "not needed: the cluster is this machine")
    yield from files.check_files(directory, shared=uses_slurm)
    engines = {request.kind: _engine_packages(request.kind, deployments) for request in requests}
    inside = [request for request in requests if _kind_container(request, deployments)]
    yield from environments.check_environments(
        {each.kind: _kind_python(each, deployments) for each in requests if each not in inside},
        engines,
        {each.kind: _on_nodes(profile, each, deployments) for each in requests},
        str(profile.kinds_file),
    )
    for request in inside:
        run = partial(run_command, timeout_s=environments.TIMEOUT_S)
        yield from containers.check_container(
            request,
            engines[request.kind],
            str(profile.kinds_file),
            run,
            on_nodes=_on_nodes(profile, request, deployments),
        )
    if study is not None:
        mounts = files.read_mounts() if uses_slurm else None
        revisions = read_revisions(directory / "results")
        yield from models.check_models(study.deployments, study_file, mounts, revisions, directory)


def _check_slurm(
    requests: Sequence[ResourceRequest], file: str, run: RunCommand
) -> Iterator[Finding]:
    tools = list(slurm.check_programs(run))
    yield from tools
    if any(finding.status is Status.FAIL for finding in tools):
        yield slurm.CONTROLLER.skip("controller, kinds, settings", "Slurm's programs are missing")
        return
    responses = list(slurm.check_responses(*slurm.query_responses(run)))
    yield from responses
    if responses[0].status is Status.FAIL:
        yield slurm.CONTROLLER.skip("kinds, settings", "the controller does not answer")
        return
    facts: dict[str | None, slurm.SlurmFacts] = {None: slurm.query_facts(run)}
    for request in requests:
        cluster = request.clusters
        several = cluster is not None and "," in cluster
        if several:
            group = Group(f"kind {request.kind}")
            yield group.skip("nodes", f"Slurm chooses one of the clusters {cluster}")
        else:
            if cluster not in facts:
                facts[cluster] = slurm.query_facts(run, cluster)
            yield from kinds.check_kind(request, facts[cluster], file)
        yield kinds.check_test_submission(
            request,
            run(["sbatch", "--test-only", *request.sbatch_options(), "--wrap=true"]),
            not several and kinds.are_nodes_out(request, facts[cluster]),
        )
    for cluster, known in facts.items():
        on_it = [request for request in requests if request.clusters == cluster]
        partitions = [kinds.used_partitions(request, known) for request in on_it]
        names = dict.fromkeys(partition.name for used in partitions for partition in used)
        yield from slurm.check_settings(known, list(names))


def _uses_slurm(profile: Profile) -> bool:
    if profile.cluster in CLUSTERS:
        return profile.cluster == "slurm"
    return shutil.which("sbatch") is not None


def _build_requests(profile: Profile, study: Study | None) -> list[ResourceRequest]:
    """One per kind that the study needs and the profile has; without a study, of all kinds."""
    deployments = study.deployments if study else ()
    names = dict.fromkeys(each.node_kind for each in deployments) if study else profile.kinds
    by_kind = {
        str(name): [each for each in deployments if each.node_kind == name]
        for name in names
        if name in profile.kinds or not profile.kinds
    }
    return [build_request(profile, name, on_kind) for name, on_kind in by_kind.items()]


def _kind_python(request: ResourceRequest, deployments: Sequence[Deployment]) -> str | None:
    """The kind's own Python; None if all its deployments use the main process's Python."""
    return None if _uses_main_python(request, deployments) else request.values.get("python")


def _kind_container(request: ResourceRequest, deployments: Sequence[Deployment]) -> bool:
    """Whether allocations of the kind run in a container: not with the main process's Python."""
    has_container = isinstance(request.values.get("container"), dict)
    return has_container and not _uses_main_python(request, deployments)


def _uses_main_python(request: ResourceRequest, deployments: Sequence[Deployment]) -> bool:
    """Whether the study has deployments of this kind, and all use the main process's Python."""
    used = {each.environment for each in deployments if each.node_kind == request.kind}
    return used == {"main"}


def _engine_packages(kind: str, deployments: Sequence[Deployment]) -> list[str]:
    engines = dict.fromkeys(each.engine for each in deployments if each.node_kind == kind)
    return [ENGINE_PACKAGES[engine] for engine in engines if engine in ENGINE_PACKAGES]


def _on_nodes(
    profile: Profile, request: ResourceRequest, deployments: Sequence[Deployment]
) -> list[tuple[Deployment, int]]:
    """The deployments of a kind that not every vLLM can start, each with its number of nodes."""
    counted = [
        (each, count_nodes(each, profile.kinds.get(request.kind, {})))
        for each in deployments
        if each.node_kind == request.kind
    ]
    return [(each, nodes) for each, nodes in counted if nodes > 1 or each.replicas > 1]
