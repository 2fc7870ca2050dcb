from servegrid.reference.hardware import find_hardware_file
from servegrid.reference.published import is_path
from servegrid.run.search_plan import plan_file

HARDWARE = str(find_hardware_file(Path(workflow.basedir)))


def trial_of(wildcards):
    return study.trial(wildcards.deployment, wildcards.cell, wildcards.trial)


def saturation_of(wildcards):
    """The record that a sweep's rate is a fraction of. Other trials need no input."""
    found = study.saturation_trial(trial_of(wildcards))
    return [] if found is None else [f"results/cells/{found.id}/requests.parquet"]


def search_plan_of(deployment):
    """The plan of the deployment's search; an empty text if its whole grid is measured."""
    return str(plan_file(deployment)) if deployment in study.searched else ""


def of_each_deployment(outputs, **wildcards):
    names = [deployment.name for deployment in study.deployments]
    return expand(outputs, deployment=names, **wildcards)


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
