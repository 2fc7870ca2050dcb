localrules:
    render,


rule render:
    input:
        modules("beside_engines", "conclusions", "derived", "findings", "labels"),
        modules("provenance", "published"),
        page_files(),
        cells=rules.gather.output.parquet,
        summary=rules.summarise.output.parquet,
        frontier=rules.conclude.output.frontier,
        published=rules.conclude.output.published,
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
        "../envs/cpu.yaml"
    params:
        demand=[config.get("limits"), config.get("capacity")],
    script:
        "../scripts/render.py"
