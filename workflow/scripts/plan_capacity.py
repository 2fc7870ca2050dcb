from pathlib import Path

from servegrid.analysis.tables import load_table
from servegrid.report.write import write_capacity_plan
from servegrid.run.jobscript import redirect_output

with redirect_output(snakemake.log[0]):
    write_capacity_plan(
        snakemake.config,
        load_table(Path(snakemake.input.summary)),
        Path(snakemake.input.hardware),
        {name: Path(path) for name, path in snakemake.output.items()},
    )
