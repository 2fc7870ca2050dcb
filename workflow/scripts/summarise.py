from pathlib import Path

from servegrid.analysis import summary
from servegrid.analysis.tables import read_cells
from servegrid.run.jobscript import redirect_output

with redirect_output(snakemake.log[0]):
    summary.write(
        summary.summarise(read_cells(Path(snakemake.input.cells))),
        parquet=Path(snakemake.output.parquet),
        csv=Path(snakemake.output.csv),
    )
