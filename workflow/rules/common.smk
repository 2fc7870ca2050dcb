import hashlib
from functools import cache

from snakemake.exceptions import WorkflowError

from servegrid.analysis.slo import parse_slo
from servegrid.node.environment import use_safe_path, use_utf8
from servegrid.reference.hardware import find_hardware_file
from servegrid.reference.published import is_path, published_from_config
from servegrid.run import refusals, search_plan
from servegrid.run.jobscript import reraise_as
from servegrid.run.preflight import check_ready
from servegrid.run.search_plan import plan_file
from servegrid.run.walltime import Walltimes
from servegrid.study.config import from_snakemake
from servegrid.study.recorded_users import resolve_users
from snakemake_logger_plugin_servegrid import forecast

use_safe_path()

with reraise_as(WorkflowError):
    use_utf8()
    study = from_snakemake(config, workflow.configfiles)
    # An unknown data set is refused now, not after the benchmark.
    published_from_config(config, workflow.configfiles)
    # Their records say that nothing was measured, and now it must be.
    OUTDATED = set()
    if workflow.is_main_process:
        OUTDATED.update(search_plan.find_outdated(study, parse_slo(config)))
        OUTDATED.update(refusals.find_outdated(study))
        # Tables, page and bundle have the facts of this file, as it is now, and not its path.
        if "users_from" in config.get("capacity", {}):
            config["capacity"].update(resolve_users(config)["capacity"])

DEPLOYMENTS = [deployment.name for deployment in study.deployments]
HARDWARE = str(find_hardware_file(Path(workflow.basedir)))


def trial_of(wildcards):
    try:
        trial = study.trial(wildcards.deployment, wildcards.cell, wildcards.trial)
    except KeyError as error:
        raise WorkflowError(
            f"The study has no trial {error}. `snakemake --dry-run --verbose` lists its trials."
        ) from None
    if trial.unsupported:
        raise WorkflowError(
            f"{trial.id} cannot be measured: {trial.unsupported}. A run without this file as its "
            "target records the verdict `unsupported`."
        )
    return trial


def saturation_of(wildcards):
    """The record that a sweep's rate is a fraction of. Other trials need no input."""
    found = study.saturation_trial(trial_of(wildcards))
    return [] if found is None else [f"results/cells/{found.id}/requests.parquet"]


def hide_outdated(wildcards):
    """No input. Makes Snakemake take the record of an outdated trial for missing.

    `prepare_run` removes it, but only in a run that has the lock of the folder.
    """
    trial = trial_of(wildcards)
    if trial.id in OUTDATED:
        for record in records_of(trial.id):
            workflow.iocache.exists_local[record] = False
    return []


def search_plan_of(deployment):
    """The plan of the deployment's search; an empty text if its whole grid is measured."""
    return str(plan_file(deployment)) if deployment in study.searched else ""


walltimes = Walltimes(study, Path("results"), parse_slo(config))
# What the executor should expect. A dry run and the processes of jobs need no times.
EXPECTED = {}
if workflow.output_settings.dryrun:
    forecast.source = walltimes.forecast
elif workflow.is_main_process:
    EXPECTED = dict(
        expected_s=lambda wildcards: walltimes.trial_s(trial_of(wildcards)),
        expected_start_s=lambda wildcards: walltimes.start_s(
            trial_of(wildcards).deployment
        ),
    )


def prepare_run():
    """Refuse what cannot work, plan the searches, and say how long the missing trials take."""
    with reraise_as(WorkflowError):
        search_plan.forget_left_out(study, parse_slo(config))
        refusals.forget_refused(study)
        check_ready(study, "results/cells")
        refusals.refuse_unsupported(study, replace=bool(WHOLE_STUDY))
        search_plan.write_plans(study, parse_slo(config))
    if expected := walltimes.forecast(missing_trials()):
        logger.info(expected)


def unless_dry_run(**resources):
    """The resources; none in a dry run that does not show them: they are a third of its time."""
    output = workflow.output_settings
    hidden = output.dryrun and not (output.verbose or output.printshellcmds)
    return {} if hidden else resources


def records_of(name):
    """The two files of the trial with this id."""
    return [
        f"results/cells/{name}/{part}.parquet" for part in ("requests", "telemetry")
    ]


# Not empty if this run needs all records, and not single ones as `bundle_partial` does.
WHOLE_STUDY = set()


def records(wildcards=None):
    """The files that jobs measure. A function, because only `gather` needs so many."""
    WHOLE_STUDY.add("gather")
    return [
        record
        for trial in study.all_trials
        if not trial.unsupported
        for record in records_of(trial.id)
    ]


def deleted_records(wildcards=None):
    """The records that are missing below tables that are there.

    Snakemake finds all others below `gather`, but it does not look below what is up to date. To
    name all records in `all` as well would make a plan more than a tenth longer.
    """
    if not all(os.path.exists(table) for table in rules.gather.output):
        return []
    outdated = {record for name in OUTDATED for record in records_of(name)}
    return [
        record
        for record in records()
        if record in outdated or not os.path.exists(record)
    ]


def missing_trials():
    """The trials without a record, before the run."""
    files = Path("results/cells")
    return {
        trial.id
        for trial in study.all_trials
        if not (files / trial.id / "requests.parquet").exists()
    }


def published_file():
    """The CSV file of published data, if the study names one: an input of what compares with it."""
    name = str(config.get("published", ""))
    return [name] if is_path(name) else []


PACKAGES = {
    "analysis": "analysis reference records study telemetry".split(),
    "report": "report analysis node reference records study telemetry".split(),
}


def package_files(name):
    """All files of a package and of those that it imports."""
    root = Path(workflow.basedir) / "workflow/servegrid"
    files = [*root.glob("*.py")]
    files += [file for each in PACKAGES[name] for file in (root / each).rglob("*.*")]
    # The link to the prices is left out: rules that need prices have HARDWARE as input.
    return sorted(
        str(file)
        for file in files
        if "__pycache__" not in file.parts and not file.is_symlink()
    )


@cache
def package_digest(name):
    """The digest of `package_files`: a change of the code makes the tables of a package anew.

    Only for rules that are cheap: what was measured follows its specification alone. The files are
    no inputs, because a hundred inputs per rule make the plan of a small study a tenth longer.
    """
    digest = hashlib.sha256()
    for file in map(Path, package_files(name)):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]
