from pathlib import Path

from servegrid.analysis.tables import read_cells
from servegrid.report.figure_style import save
from servegrid.report.plots import overview_figure
from servegrid.run.jobscript import logged

with logged(snakemake.log[0]):
    save(overview_figure(read_cells(Path(snakemake.input.cells))), *map(Path, snakemake.output))
