from pathlib import Path

from servegrid.drawing import save
from servegrid.plots import overview_figure
from servegrid.script import logged
from servegrid.tables import read_cells

with logged(snakemake.log[0]):
    save(overview_figure(read_cells(Path(snakemake.input.cells))), *map(Path, snakemake.output))
