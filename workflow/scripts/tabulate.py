from pathlib import Path

from servegrid.analysis.tables import load_table
from servegrid.report.latency_table import write_latency_tables
from servegrid.run.jobscript import redirect_output

with redirect_output(snakemake.log[0]):
    write_latency_tables(
        load_table(Path(snakemake.input.cells)),
        snakemake.wildcards.deployment,
        {name: Path(path) for name, path in snakemake.output.items()},
    )
