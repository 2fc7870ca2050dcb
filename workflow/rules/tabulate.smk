localrules:
    tabulate,


# One job writes the tables of all deployments, and the next one draws all figures: for a job of
# each deployment, Snakemake searches all records once, and most of its time is the start of Python.
rule tabulate:
    input:
        cells=rules.gather.output.parquet,
    output:
        markdown=[
            report(
                f"results/tables/{name}.md",
                "../report/latency_table.rst",
                category="Tables",
                labels={"table": name, "format": "Markdown"},
            )
            for name in DEPLOYMENTS
        ],
        csv=[f"results/tables/{name}.csv" for name in DEPLOYMENTS],
        latex=[f"results/tables/{name}.tex" for name in DEPLOYMENTS],
        parquet=[f"results/tables/{name}.parquet" for name in DEPLOYMENTS],
    log:
        "results/logs/tabulate.log",
    conda:
        "../envs/analysis.yaml"
    params:
        code=lambda wildcards: package_digest("report"),
        deployments=DEPLOYMENTS,
    script:
        "../scripts/tabulate.py"
