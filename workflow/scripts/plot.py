from pathlib import Path

from servegrid.analysis.tables import load_table
from servegrid.report.figure_style import save_figure
from servegrid.report.plots import FIGURES, deployment_figure
from servegrid.run.jobscript import redirect_output

with redirect_output(snakemake.log[0]):
    cells = load_table(Path(snakemake.input.cells))
    paths = zip(snakemake.output.svg, snakemake.output.png, strict=True)
    for metrics, (svg, png) in zip(FIGURES.values(), paths, strict=True):
        figure = deployment_figure(cells, snakemake.wildcards.deployment, metrics)
        save_figure(figure, Path(svg), Path(png))
