from pathlib import Path

from servegrid import summary
from servegrid.script import logged
from servegrid.tables import read_cells

with logged(snakemake.log[0]):
    summary.write(
        summary.summarise(read_cells(Path(snakemake.input.cells))),
        parquet=Path(snakemake.output.parquet),
        csv=Path(snakemake.output.csv),
    )
