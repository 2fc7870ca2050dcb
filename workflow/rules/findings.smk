localrules:
    findings,


rule findings:
    input:
        cells=rules.gather.output.parquet,
        summary=rules.summarise.output.parquet,
        published_file=published_file(),
    output:
        frontier="results/tables/frontier.parquet",
        frontier_csv="results/tables/frontier.csv",
        frontier_tex="results/tables/frontier.tex",
        findings=report(
            "results/tables/findings.md",
            "../report/findings.rst",
            category="Tables",
            labels={"table": "findings and frontier", "format": "Markdown"},
        ),
        published="results/tables/published.parquet",
        published_csv="results/tables/published.csv",
        published_tex="results/tables/published.tex",
        published_md=report(
            "results/tables/published.md",
            "../report/published.rst",
            category="Tables",
            labels={"table": "comparison with published data", "format": "Markdown"},
        ),
    log:
        "results/logs/findings.log",
    conda:
        "../envs/analysis.yaml"
    params:
        code=lambda wildcards: package_digest("report"),
        slo=config.get("slo"),
        published=config.get("published"),
        allow_emulated_mix=config.get("allow_emulated_mix"),
    script:
        "../scripts/findings.py"
