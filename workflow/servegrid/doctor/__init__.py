"""`servegrid doctor`: looks at a site before the first study runs there. Nothing is submitted.

Facts are gathered by `commands` and `files`; everything else judges them. `report` tells.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from servegrid.doctor import environments, files, kinds, site, slurm, studies
from servegrid.doctor.commands import Ask, ask
from servegrid.doctor.demands import Demand, demand_of
from servegrid.doctor.report import Finding, Group, Status
from servegrid.study.config import load_study
from servegrid.study.grid import Deployment, Study

__all__ = ["examine"]

ENGINE_PACKAGES = {"vllm": "vllm", "llamacpp": "xllamacpp"}


def examine(profile_folder: Path, study_file: Path | None, directory: Path) -> Iterator[Finding]:
    """All findings, group by group, each as soon as it is known.

    Raises ConfigError, before the first, where the profile or the study cannot be read.
    """
    profile = site.Profile.read(profile_folder)
    study = load_study(study_file) if study_file else None
    return _examine(profile, study, study_file or Path(), directory)


def _examine(
    profile: site.Profile, study: Study | None, study_file: Path, directory: Path
) -> Iterator[Finding]:
    yield from site.judge_profile(profile)
    if study is not None:
        yield from site.judge_study(profile, study, study_file)
    deployments = study.deployments if study else ()
    on_slurm = _is_slurm(profile)
    demands = _demands(profile, study)
    if on_slurm:
        yield from _examine_slurm(demands, str(profile.kinds_file or profile.file), ask)
    else:
        yield Group("slurm").skip("Slurm", "not needed: the cluster is this machine")
    yield from files.examine_files(directory, shared=on_slurm)
    yield from environments.examine_environments(
        {demand.kind: _python(demand, deployments) for demand in demands},
        {demand.kind: _engine_packages(demand.kind, deployments) for demand in demands},
    )
    if study is not None:
        mounts = files.mounts() if on_slurm else None
        yield from studies.examine_models(study.deployments, study_file, mounts)


def _examine_slurm(demands: Sequence[Demand], where: str, ask: Ask) -> Iterator[Finding]:
    tools = list(slurm.judge_tools(ask))
    yield from tools
    if any(each.status is Status.FAIL for each in tools):
        yield slurm.CONTROLLER.skip("controller, kinds, settings", "cannot be asked without tools")
        return
    ping, squeue, sacct = slurm.ask_answers(ask)
    answers = list(slurm.judge_answers(ping, squeue, sacct))
    yield from answers
    if answers[0].status is Status.FAIL:
        yield slurm.CONTROLLER.skip("kinds, settings", "the controller does not answer")
        return
    facts = slurm.gather(ask)
    for demand in demands:
        yield from kinds.judge_kind(demand, facts, where)
        yield kinds.judge_test(
            demand,
            ask(["sbatch", "--test-only", *demand.sbatch(), "--wrap=true"]),
            kinds.all_out(demand, facts),
        )
    used = [each.name for demand in demands for each in kinds.partitions_in_use(demand, facts)]
    yield from slurm.judge_settings(facts, list(dict.fromkeys(used)))


def _is_slurm(profile: site.Profile) -> bool:
    if profile.cluster in site.CLUSTERS:
        return profile.cluster == "slurm"
    return shutil.which("sbatch") is not None


def _demands(profile: site.Profile, study: Study | None) -> list[Demand]:
    """Of the kinds that the study needs and the profile knows; without a study, of all."""
    deployments = study.deployments if study else ()
    names = dict.fromkeys(each.node_kind for each in deployments) if study else profile.kinds
    of_kind = {
        str(name): [each for each in deployments if each.node_kind == name]
        for name in names
        if name in profile.kinds or not profile.kinds
    }
    return [demand_of(profile, name, each) for name, each in of_kind.items()]


def _python(demand: Demand, deployments: Sequence[Deployment]) -> str | None:
    """The kind's own Python, unless all that the study runs there wants the main process's."""
    wanted = {each.environment for each in deployments if each.node_kind == demand.kind}
    return None if wanted == {"main"} else demand.values.get("python")


def _engine_packages(kind: str, deployments: Sequence[Deployment]) -> list[str]:
    engines = dict.fromkeys(each.engine for each in deployments if each.node_kind == kind)
    return [ENGINE_PACKAGES[engine] for engine in engines if engine in ENGINE_PACKAGES]
