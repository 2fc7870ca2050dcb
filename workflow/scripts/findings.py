from pathlib import Path

from servegrid.analysis.tables import read_cells
from servegrid.report.write import write_findings
from servegrid.run.jobscript import redirect_output

with redirect_output(snakemake.log[0]):
    write_findings(
        snakemake.config,
        read_cells(Path(snakemake.input.cells)),
        read_cells(Path(snakemake.input.summary)),
        {name: Path(path) for name, path in snakemake.output.items()},
    )
