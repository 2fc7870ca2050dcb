localrules:
    plot,
    plot_overview,


rule plot:
    input:
        package_files("report"),
        cells=rules.gather.output.parquet,
    output:
        report(
            "results/plots/{deployment}.{figure}.svg",
            "../report/figure.rst",
            category="Figures",
            subcategory="{deployment}",
            labels={"figure": "{figure}"},
        ),
        "results/plots/{deployment}.{figure}.png",
    log:
        "results/logs/plot/{deployment}.{figure}.log",
    wildcard_constraints:
        figure="per_user|total|latency",
    conda:
        "../envs/analysis.yaml"
    script:
        "../scripts/plot.py"


rule plot_overview:
    input:
        package_files("report"),
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
    script:
        "../scripts/plot_overview.py"
