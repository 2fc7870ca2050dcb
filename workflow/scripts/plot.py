from itertools import product
from pathlib import Path

from servegrid.analysis.tables import load_table
from servegrid.report.figure_style import save_figure
from servegrid.report.plots import FIGURES, deployment_figure, overview_figure
from servegrid.run.jobscript import redirect_output

with redirect_output(snakemake.log[0]):
    cells = load_table(Path(snakemake.input.cells))
    output = snakemake.output
    save_figure(overview_figure(cells), Path(output.overview), Path(output.overview_png))
    figures = product(snakemake.params.deployments, FIGURES.values())
    for (deployment, metrics), svg, png in zip(figures, output.svg, output.png, strict=True):
        save_figure(deployment_figure(cells, deployment, metrics), Path(svg), Path(png))
