from pathlib import Path

from servegrid.analysis.tables import load_table
from servegrid.report.figure_style import save_figure
from servegrid.report.plots import overview_figure
from servegrid.run.jobscript import redirect_output

with redirect_output(snakemake.log[0]):
    save_figure(
        overview_figure(load_table(Path(snakemake.input.cells))), *map(Path, snakemake.output)
    )
