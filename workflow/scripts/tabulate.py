from pathlib import Path

from servegrid.article import write_article
from servegrid.script import logged
from servegrid.tables import read_cells

with logged(snakemake.log[0]):
    write_article(
        read_cells(Path(snakemake.input.cells)),
        snakemake.wildcards.deployment,
        {name: Path(path) for name, path in snakemake.output.items()},
    )
