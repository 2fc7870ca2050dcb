from pathlib import Path

from servegrid.report.write import write_page
from servegrid.run.jobscript import logged

FOUND = ("cells", "summary", "frontier", "published")

with logged(snakemake.log[0]):
    write_page(
        snakemake.config,
        Path("results/cells"),
        {name: Path(snakemake.input[name]) for name in FOUND},
        Path(snakemake.input.hardware),
        Path(snakemake.output[0]),
    )
