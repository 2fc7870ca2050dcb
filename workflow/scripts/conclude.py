from pathlib import Path

from servegrid.derived import write_conclusions
from servegrid.script import logged
from servegrid.tables import read_cells

with logged(snakemake.log[0]):
    write_conclusions(
        snakemake.config,
        read_cells(Path(snakemake.input.cells)),
        read_cells(Path(snakemake.input.summary)),
        {name: Path(path) for name, path in snakemake.output.items()},
    )
