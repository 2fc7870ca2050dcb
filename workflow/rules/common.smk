HARDWARE = f"{workflow.basedir}/config/hardware.yaml"


def trial_of(wildcards):
    return study.trial(wildcards.deployment, wildcards.cell, wildcards.trial)


def of_each_deployment(outputs, **wildcards):
    names = [deployment.name for deployment in study.deployments]
    return expand(outputs, deployment=names, **wildcards)


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
    return sorted(str(file) for file in files if "__pycache__" not in file.parts)
