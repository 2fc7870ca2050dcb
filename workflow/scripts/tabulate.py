from pathlib import Path

from servegrid.analysis.tables import load_table
from servegrid.report.latency_table import write_latency_tables
from servegrid.run.jobscript import redirect_output

with redirect_output(snakemake.log[0]):
    cells = load_table(Path(snakemake.input.cells))
    for number, deployment in enumerate(snakemake.params.deployments):
        files = {name: Path(paths[number]) for name, paths in snakemake.output.items()}
        write_latency_tables(cells, deployment, files)
