from pathlib import Path

from servegrid.config import study_of
from servegrid.script import logged
from servegrid.tables import gather, write_cells

with logged(snakemake.log[0]):
    cells = gather(study_of(snakemake.config).trials, Path("results/cells"))
    write_cells(cells, Path(snakemake.output.parquet), Path(snakemake.output.csv))
