localrules:
    gather,
    tabulate,
    plot,
    plot_overview,


rule gather:
    input:
        expand(
            "results/cells/{trial}/{part}.parquet",
            trial=[trial.id for trial in study.measured],
            part=["requests", "telemetry"],
        ),
        modules("energy", "metrics", "records", "stationarity", "tables", "validity"),
    output:
        parquet="results/tables/cells.parquet",
        csv=report(
            "results/tables/cells.csv",
            "../report/cells.rst",
            category="Tables",
            labels={"table": "all cells", "format": "CSV"},
        ),
        sentinels="results/tables/sentinels.csv",
    log:
        "results/logs/gather.log",
    conda:
        "../envs/cpu.yaml"
    params:
        specs=[trial.digest for trial in study.measured],
    script:
        "../scripts/gather.py"


rule tabulate:
    input:
        modules("article", "labels"),
        cells=rules.gather.output.parquet,
    output:
        markdown=report(
            "results/tables/{deployment}.md",
            "../report/article.rst",
            category="Tables",
            labels={"table": "{deployment}", "format": "Markdown"},
        ),
        csv="results/tables/{deployment}.csv",
    log:
        "results/logs/tabulate/{deployment}.log",
    conda:
        "../envs/cpu.yaml"
    script:
        "../scripts/tabulate.py"


rule plot:
    input:
        modules("plots", "labels"),
        cells=rules.gather.output.parquet,
    output:
        report(
            "results/plots/{deployment}.{metric}.svg",
            "../report/figure.rst",
            category="Figures",
            subcategory="{deployment}",
            labels={"figure": "{metric}"},
        ),
        "results/plots/{deployment}.{metric}.png",
    log:
        "results/logs/plot/{deployment}.{metric}.log",
    wildcard_constraints:
        metric="per_user|total",
    conda:
        "../envs/cpu.yaml"
    script:
        "../scripts/plot.py"


rule plot_overview:
    input:
        modules("plots", "labels"),
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
        "../envs/cpu.yaml"
    script:
        "../scripts/plot_overview.py"
