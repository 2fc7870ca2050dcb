localrules:
    plot,
    plot_overview,


FIGURES = ["per_user", "total", "latency"]


# One job draws all figures of a deployment: most of its time is the start of Python.
rule plot:
    input:
        cells=rules.gather.output.parquet,
    output:
        svg=[
            report(
                f"results/plots/{{deployment}}.{figure}.svg",
                "../report/figure.rst",
                category="Figures",
                subcategory="{deployment}",
                labels={"figure": figure},
            )
            for figure in FIGURES
        ],
        png=expand("results/plots/{{deployment}}.{figure}.png", figure=FIGURES),
    log:
        "results/logs/plot/{deployment}.log",
    conda:
        "../envs/analysis.yaml"
    params:
        code=lambda wildcards: package_digest("report"),
    script:
        "../scripts/plot.py"


rule plot_overview:
    input:
        cells=rules.gather.output.parquet,
    output:
        report(
            "results/plots/overview.svg",
            "../report/overview.rst",
            category="Figures",
            subcategory="All deployments",
            labels={"figure": "overview"},
        ),
        "results/plots/overview.png",
    log:
        "results/logs/plot/overview.log",
    conda:
        "../envs/analysis.yaml"
    params:
        code=lambda wildcards: package_digest("report"),
    script:
        "../scripts/plot_overview.py"
