localrules:
    render,


rule render:
    input:
        cells=rules.gather.output.parquet,
        summary=rules.summarise.output.parquet,
        frontier=rules.findings.output.frontier,
        published=rules.findings.output.published,
        slo=rules.goodput.output.slo,
        saturation=rules.goodput.output.saturation,
        published_file=published_file(),
        hardware=HARDWARE,
    output:
        report(
            "results/report/index.html",
            "../report/page.rst",
            category="Page",
            labels={"page": "the whole study"},
        ),
    log:
        "results/logs/render.log",
    conda:
        "../envs/analysis.yaml"
    params:
        code=lambda wildcards: package_digest("report"),
        demand=[config.get("slo"), config.get("capacity")],
        published=config.get("published"),
    script:
        "../scripts/render.py"
