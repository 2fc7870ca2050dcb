localrules:
    tabulate,


# One job for all deployments, here and in `plot`: for every job that reads the table of cells,
# Snakemake searches the list of all records, and a job's start of Python takes most of its time.
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
