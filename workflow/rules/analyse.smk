localrules:
    gather,
    summarise,
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
        modules("columns", "counters", "energy", "fidelity", "metrics", "records"),
        modules("serverside", "stationarity", "tables", "validity"),
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


rule summarise:
    input:
        modules("columns", "intervals", "records", "summary", "tables"),
        cells=rules.gather.output.parquet,
    output:
        parquet="results/tables/summary.parquet",
        csv=report(
            "results/tables/summary.csv",
            "../report/summary.rst",
            category="Tables",
            labels={"table": "all cells over their trials", "format": "CSV"},
        ),
    log:
        "results/logs/summarise.log",
    conda:
        "../envs/cpu.yaml"
    script:
        "../scripts/summarise.py"


rule tabulate:
    input:
        modules("article", "intervals", "labels", "printable", "reasons", "summary"),
        cells=rules.gather.output.parquet,
    output:
        markdown=report(
            "results/tables/{deployment}.md",
            "../report/article.rst",
            category="Tables",
            labels={"table": "{deployment}", "format": "Markdown"},
        ),
        csv="results/tables/{deployment}.csv",
        latex="results/tables/{deployment}.tex",
        parquet="results/tables/{deployment}.parquet",
    log:
        "results/logs/tabulate/{deployment}.log",
    conda:
        "../envs/cpu.yaml"
    script:
        "../scripts/tabulate.py"


rule plot:
    input:
        modules("drawing", "intervals", "labels", "plots", "summary"),
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
        "../envs/cpu.yaml"
    script:
        "../scripts/plot.py"


rule plot_overview:
    input:
        modules("drawing", "intervals", "labels", "plots", "summary"),
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
