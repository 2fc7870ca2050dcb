from pathlib import Path

from servegrid.drawing import save
from servegrid.plots import FIGURES, deployment_figure
from servegrid.script import logged
from servegrid.tables import read_cells

with logged(snakemake.log[0]):
    cells = read_cells(Path(snakemake.input.cells))
    metrics = FIGURES[snakemake.wildcards.figure]
    figure = deployment_figure(cells, snakemake.wildcards.deployment, metrics)
    save(figure, *map(Path, snakemake.output))
