localrules:
    plot,


FIGURES = ["per_user", "total", "latency"]


rule plot:
    input:
        cells=rules.gather.output.parquet,
    output:
        overview=report(
            "results/plots/overview.svg",
            "../report/overview.rst",
            category="Figures",
            subcategory="All deployments",
            labels={"figure": "overview"},
        ),
        overview_png="results/plots/overview.png",
        svg=[
            report(
                f"results/plots/{name}.{figure}.svg",
                "../report/figure.rst",
                category="Figures",
                subcategory=name,
                labels={"figure": figure},
            )
            for name in DEPLOYMENTS
            for figure in FIGURES
        ],
        png=[
            f"results/plots/{name}.{figure}.png"
            for name in DEPLOYMENTS
            for figure in FIGURES
        ],
    log:
        "results/logs/plot.log",
    conda:
        "../envs/analysis.yaml"
    params:
        code=lambda wildcards: package_digest("report"),
        deployments=DEPLOYMENTS,
    script:
        "../scripts/plot.py"
