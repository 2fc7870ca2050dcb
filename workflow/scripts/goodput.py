from pathlib import Path

from servegrid.analysis.tables import load_table
from servegrid.report.write import write_slo
from servegrid.run.jobscript import redirect_output

with redirect_output(snakemake.log[0]):
    write_slo(
        snakemake.config,
        Path("results/cells"),
        load_table(Path(snakemake.input.cells)),
        {name: Path(path) for name, path in snakemake.output.items()},
    )
