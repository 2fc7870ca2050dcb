localrules:
    gather,


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
        # A trial that a search left out is an error if there is no search.
        searched=sorted(study.searched),
    script:
        "../scripts/gather.py"
