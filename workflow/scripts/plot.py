from pathlib import Path

from servegrid.plots import PER_USER, TOTAL, deployment_figure, save
from servegrid.script import logged
from servegrid.tables import read_cells

with logged(snakemake.log[0]):
    metric = {"per_user": PER_USER, "total": TOTAL}[snakemake.wildcards.metric]
    cells = read_cells(Path(snakemake.input.cells))
    figure = deployment_figure(cells, snakemake.wildcards.deployment, metric)
    save(figure, *map(Path, snakemake.output))
