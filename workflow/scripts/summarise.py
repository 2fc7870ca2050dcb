from pathlib import Path

from servegrid.analysis import summary
from servegrid.analysis.tables import load_table
from servegrid.run.jobscript import redirect_output

with redirect_output(snakemake.log[0]):
    summary.write_summary(
        summary.summarise(load_table(Path(snakemake.input.cells))),
        parquet=Path(snakemake.output.parquet),
        csv=Path(snakemake.output.csv),
    )
