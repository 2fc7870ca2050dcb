from pathlib import Path

from servegrid.analysis.tables import drift_by_allocation, gather, write_cells, write_csv
from servegrid.run.jobscript import logged
from servegrid.study.config import study_of

with logged(snakemake.log[0]):
    study, folder = study_of(snakemake.config), Path("results/cells")
    sentinels = gather(study.sentinels, folder)
    cells = gather(study.trials, folder, drift_by_allocation(sentinels))
    write_cells(cells, Path(snakemake.output.parquet), Path(snakemake.output.csv))
    write_csv(sentinels, Path(snakemake.output.sentinels))
