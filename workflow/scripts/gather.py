from pathlib import Path

from servegrid.analysis.tables import drift_by_allocation, gather, write_cells, write_csv
from servegrid.run.jobscript import redirect_output
from servegrid.study.config import parse_study

with redirect_output(snakemake.log[0]):
    study, folder = parse_study(snakemake.config), Path("results/cells")
    drift_checks = gather(study.drift_checks, folder)
    cells = gather(study.trials, folder, drift_by_allocation(drift_checks))
    write_cells(cells, Path(snakemake.output.parquet), Path(snakemake.output.csv))
    write_csv(drift_checks, Path(snakemake.output.drift_checks))
