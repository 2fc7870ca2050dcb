from pathlib import Path

from servegrid.analysis.tables import read_cells
from servegrid.report.write import write_conclusions
from servegrid.run.jobscript import logged

with logged(snakemake.log[0]):
    write_conclusions(
        snakemake.config,
        read_cells(Path(snakemake.input.cells)),
        read_cells(Path(snakemake.input.summary)),
        {name: Path(path) for name, path in snakemake.output.items()},
    )
