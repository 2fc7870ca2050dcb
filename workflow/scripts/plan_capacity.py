from pathlib import Path

from servegrid.analysis.tables import read_cells
from servegrid.report.write import write_capacity_plan
from servegrid.run.jobscript import redirect_output

with redirect_output(snakemake.log[0]):
    write_capacity_plan(
        snakemake.config,
        read_cells(Path(snakemake.input.summary)),
        Path(snakemake.input.hardware),
        {name: Path(path) for name, path in snakemake.output.items()},
    )
