from pathlib import Path

from servegrid.derived import write_plan
from servegrid.script import logged
from servegrid.tables import read_cells

with logged(snakemake.log[0]):
    write_plan(
        snakemake.config,
        read_cells(Path(snakemake.input.summary)),
        Path(snakemake.input.hardware),
        {name: Path(path) for name, path in snakemake.output.items()},
    )
