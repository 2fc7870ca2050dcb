localrules:
    summarise,


rule summarise:
    input:
        cells=rules.gather.output.parquet,
    output:
        parquet="results/tables/summary.parquet",
        csv=report(
            "results/tables/summary.csv",
            "../report/summary.rst",
            category="Tables",
            labels={"table": "all cells over their trials", "format": "CSV"},
        ),
    log:
        "results/logs/summarise.log",
    conda:
        "../envs/analysis.yaml"
    params:
        code=lambda wildcards: package_digest("analysis"),
    script:
        "../scripts/summarise.py"
