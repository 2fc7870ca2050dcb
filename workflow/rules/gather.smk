localrules:
    gather,
    summarise,


rule gather:
    input:
        expand(
            "results/cells/{trial}/{part}.parquet",
            trial=[trial.id for trial in study.all_trials],
            part=["requests", "telemetry"],
        ),
        package_files("analysis"),
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
        specs=[trial.digest for trial in study.all_trials],
        slo=config.get("slo", {}),
    script:
        "../scripts/gather.py"


rule summarise:
    input:
        package_files("analysis"),
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
    script:
        "../scripts/summarise.py"
