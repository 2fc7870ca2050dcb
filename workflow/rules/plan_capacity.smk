localrules:
    plan_capacity,


rule plan_capacity:
    input:
        summary=rules.summarise.output.parquet,
        hardware=HARDWARE,
    output:
        parquet="results/tables/capacity.parquet",
        csv="results/tables/capacity.csv",
        latex="results/tables/capacity.tex",
        markdown=report(
            "results/tables/capacity.md",
            "../report/capacity.rst",
            category="Tables",
            labels={"table": "capacity plan", "format": "Markdown"},
        ),
    log:
        "results/logs/plan_capacity.log",
    conda:
        "../envs/analysis.yaml"
    params:
        code=lambda wildcards: package_digest("report"),
        demand=[config.get("slo"), config.get("capacity")],
    script:
        "../scripts/plan_capacity.py"
