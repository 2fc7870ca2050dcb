from pathlib import Path

from servegrid.analysis.search import check_left_out
from servegrid.analysis.slo import parse_slo
from servegrid.analysis.tables import gather_study, write_cells, write_csv
from servegrid.run.jobscript import redirect_output
from servegrid.study.config import parse_study

with redirect_output(snakemake.log[0]):
    slo, folder = parse_slo(snakemake.config), Path("results/cells")
    study = parse_study(snakemake.config)
    cells, drift_checks = gather_study(study, folder, slo)
    check_left_out(study, cells, slo, folder)
    write_cells(cells, Path(snakemake.output.parquet), Path(snakemake.output.csv))
    write_csv(drift_checks, Path(snakemake.output.drift_checks))
