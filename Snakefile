# What is measured: config/. Where it runs: profiles/. What is done: workflow/rules/.
import re

from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version

from servegrid.study.config import study_from
from servegrid.run.preflight import refuse_unready
from servegrid.run.jobscript import told_as

min_version("9.27")

# Another study replaces the default one; given to Snakemake as well, the two would be merged.
if not config:

    configfile: f"{workflow.basedir}/config/demo.yaml"


with told_as(WorkflowError):
    study = study_from(config, workflow.configfiles)


report: "workflow/report/study.rst"


wildcard_constraints:
    deployment="|".join(re.escape(deployment.name) for deployment in study.deployments),
    trial=r"\d+",


localrules:
    all,


for (
    file
) in "common measure gather tabulate plot findings plan_capacity render bundle".split():

    include: f"workflow/rules/{file}.smk"


onstart:
    with told_as(WorkflowError):
        refuse_unready(study, "results/cells")


onsuccess:
    print("All of it on one page: results/report/index.html")


rule all:
    default_target: True
    input:
        rules.gather.input,  # a record that has been deleted is missed
        *(each.output for each in (rules.gather, rules.summarise, rules.findings)),
        *(each.output for each in (rules.plan_capacity, rules.plot_overview)),
        of_each_deployment(rules.tabulate.output),
        of_each_deployment(rules.plot.output, figure=["per_user", "total", "latency"]),
        rules.render.output,
