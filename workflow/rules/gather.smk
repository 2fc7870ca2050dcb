localrules:
    gather,
    summarise,


rule gather:
    input:
        records,
    output:
        parquet="results/tables/cells.parquet",
        csv=report(
            "results/tables/cells.csv",
            "../report/cells.rst",
            category="Tables",
            labels={"table": "all cells", "format": "CSV"},
        ),
        drift_checks="results/tables/drift_checks.csv",
    log:
        "results/logs/gather.log",
    conda:
        "../envs/analysis.yaml"
    params:
        code=lambda wildcards: package_digest("analysis"),
        specs=lambda wildcards: [trial.digest for trial in study.all_trials],
        slo=config.get("slo", {}),
    script:
        "../scripts/gather.py"


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
