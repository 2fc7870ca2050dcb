# What is measured: config/. Where it runs: profiles/. What is done: workflow/rules/.
import re

from snakemake.utils import min_version

min_version("9.27")

# Another study replaces the default one; given to Snakemake as well, the two would be merged.
if not config:

    configfile: f"{workflow.basedir}/config/demo.yaml"


include: "workflow/rules/common.smk"


report: "workflow/report/study.rst"


wildcard_constraints:
    deployment="|".join(re.escape(deployment.name) for deployment in study.deployments),
    trial=r"\d+(?:-bring_up-\d+)?",


localrules:
    all,


FILES = "measure gather goodput tabulate plot findings plan_capacity render bundle"
# The rule `refuse` only if it has cells: Snakemake would look for them among all others.
for file in FILES.split() + ["refuse"] * bool(study.unsupported):

    include: f"workflow/rules/{file}.smk"


onstart:
    prepare_run()


rule all:
    default_target: True
    input:
        deleted_records,
        derived=[
            *(each.output for each in (rules.gather, rules.summarise, rules.findings)),
            *(each.output for each in (rules.goodput, rules.plan_capacity)),
            rules.plot_overview.output,
            of_each_deployment(rules.tabulate.output + rules.plot.output),
            rules.render.output,
        ],
