from pathlib import Path

from servegrid.analysis.tables import read_cells
from servegrid.report.article_table import write_article
from servegrid.run.jobscript import logged

with logged(snakemake.log[0]):
    write_article(
        read_cells(Path(snakemake.input.cells)),
        snakemake.wildcards.deployment,
        {name: Path(path) for name, path in snakemake.output.items()},
    )
