localrules:
    render,


rule render:
    input:
        package_files("report"),
        cells=rules.gather.output.parquet,
        summary=rules.summarise.output.parquet,
        frontier=rules.findings.output.frontier,
        published=rules.findings.output.published,
        hardware=HARDWARE,
    output:
        report(
            "results/report/index.html",
            "../report/page.rst",
            category="Page",
            labels={"page": "all of the study"},
        ),
    log:
        "results/logs/render.log",
    conda:
        "../envs/analysis.yaml"
    params:
        demand=[config.get("slo"), config.get("capacity")],
    script:
        "../scripts/render.py"
