from servegrid.reference.hardware import find_hardware_file
from servegrid.reference.published import is_path
from servegrid.run.walltime import Walltimes
from snakemake_logger_plugin_servegrid import forecast

HARDWARE = str(find_hardware_file(Path(workflow.basedir)))


def trial_of(wildcards):
    return study.trial(wildcards.deployment, wildcards.cell, wildcards.trial)


walltimes = Walltimes(study, Path("results"))
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


def unless_dry_run(**resources):
    """The resources; none in a dry run that does not show them: they are a third of its time."""
    output = workflow.output_settings
    hidden = output.dryrun and not (output.verbose or output.printshellcmds)
    return {} if hidden else resources


def of_each_deployment(outputs, **wildcards):
    names = [deployment.name for deployment in study.deployments]
    return expand(outputs, deployment=names, **wildcards)


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
    """All files of a package and of those that it imports: a change makes its tables anew.

    Only for rules that are cheap: what was measured follows its specification alone.
    """
    root = Path(workflow.basedir) / "workflow/servegrid"
    files = [*root.glob("*.py")]
    files += [file for each in PACKAGES[name] for file in (root / each).rglob("*.*")]
    # The link to the prices is left out: rules that need prices have HARDWARE as input.
    return sorted(
        str(file)
        for file in files
        if "__pycache__" not in file.parts and not file.is_symlink()
    )
