# What is measured: config/. Where it runs: profiles/. What is done: workflow/rules/.
from snakemake.utils import min_version

min_version("9.27")

# Another study replaces the default one; given to Snakemake as well, the two would be merged.
if not config:

    configfile: f"{workflow.basedir}/config/demo.yaml"


include: "workflow/rules/common.smk"


report: "workflow/report/study.rst"


wildcard_constraints:
    deployment="[^/]+",
    trial=r"\d+(?:-bring_up-\d+)?",


localrules:
    all,


DERIVED = "gather summarise goodput tabulate plot findings plan_capacity render".split()
for name in ["measure", *DERIVED, "bundle"]:

    include: f"workflow/rules/{name}.smk"


onstart:
    prepare_run()


rule all:
    default_target: True
    input:
        deleted_records,
        # Each file by itself: with lists in a list, Snakemake's time grows with their squared length.
        derived=[file for name in DERIVED for file in getattr(rules, name).output],
