localrules:
    tabulate,


rule tabulate:
    input:
        cells=rules.gather.output.parquet,
    output:
        markdown=report(
            "results/tables/{deployment}.md",
            "../report/latency_table.rst",
            category="Tables",
            labels={"table": "{deployment}", "format": "Markdown"},
        ),
        csv="results/tables/{deployment}.csv",
        latex="results/tables/{deployment}.tex",
        parquet="results/tables/{deployment}.parquet",
    log:
        "results/logs/tabulate/{deployment}.log",
    conda:
        "../envs/analysis.yaml"
    params:
        code=lambda wildcards: package_digest("report"),
    script:
        "../scripts/tabulate.py"
