localrules:
    goodput,


rule goodput:
    input:
        # The records are inputs of `gather`; a new one makes its table anew.
        cells=rules.gather.output.parquet,
    output:
        slo="results/tables/slo.parquet",
        slo_csv="results/tables/slo.csv",
        slo_md=report(
            "results/tables/slo.md",
            "../report/slo.rst",
            category="Tables",
            labels={"table": "SLO attainment and goodput", "format": "Markdown"},
        ),
        saturation="results/tables/saturation.parquet",
        saturation_csv="results/tables/saturation.csv",
    log:
        "results/logs/goodput.log",
    conda:
        "../envs/analysis.yaml"
    params:
        code=lambda wildcards: package_digest("report"),
        slo=config.get("slo"),
    script:
        "../scripts/goodput.py"
