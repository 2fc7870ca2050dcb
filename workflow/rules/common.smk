HARDWARE = f"{workflow.basedir}/config/hardware.yaml"


def trial_of(wildcards):
    return study.trial(wildcards.deployment, wildcards.cell, wildcards.trial)


def of_each_deployment(outputs, **wildcards):
    names = [deployment.name for deployment in study.deployments]
    return expand(outputs, deployment=names, **wildcards)


def modules(*names):
    """Modules of the package that decide an output: these rules are cheap enough to follow them.

    What was measured follows its specification only, so `measure` names none.
    """
    return [f"{workflow.basedir}/workflow/servegrid/{name}.py" for name in names]


def page_files():
    """All that the page is made with."""
    folder = Path(workflow.basedir) / "workflow/servegrid/page"
    files = [*folder.glob("*.*"), *folder.glob("charts/*.json")]
    return sorted(map(str, files))
