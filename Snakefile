# What is measured: config/. Where it runs: profiles/. What is done: workflow/rules/.
import re

from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version

from servegrid.node.environment import use_safe_path, use_utf8
from servegrid.reference.published import published_from_config
from servegrid.study.config import from_snakemake
from servegrid.run.preflight import check_ready
from servegrid.run.jobscript import reraise_as

min_version("9.27")
use_safe_path()

# Another study replaces the default one; given to Snakemake as well, the two would be merged.
if not config:

    configfile: f"{workflow.basedir}/config/demo.yaml"


with reraise_as(WorkflowError):
    use_utf8()
    study = from_snakemake(config, workflow.configfiles)
    # An unknown data set is refused now, not after the benchmark.
    published_from_config(config, workflow.configfiles)


report: "workflow/report/study.rst"


wildcard_constraints:
    deployment="|".join(re.escape(deployment.name) for deployment in study.deployments),
    trial=r"\d+(?:-bring_up-\d+)?",


localrules:
    all,


FILES = "common measure gather tabulate plot findings plan_capacity render bundle"
for file in FILES.split():

    include: f"workflow/rules/{file}.smk"


onstart:
    with reraise_as(WorkflowError):
        check_ready(study, "results/cells")
        if expected := walltimes.forecast(missing_trials()):
            logger.info(expected)


rule all:
    default_target: True
    input:
        rules.gather.input,  # a record that has been deleted is missed
        *(each.output for each in (rules.gather, rules.summarise, rules.findings)),
        *(each.output for each in (rules.plan_capacity, rules.plot_overview)),
        of_each_deployment(rules.tabulate.output),
        of_each_deployment(rules.plot.output, figure=["per_user", "total", "latency"]),
        rules.render.output,
