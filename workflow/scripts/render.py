from pathlib import Path

from servegrid import provenance, records
from servegrid.capacity import demand_of, read_hardware
from servegrid.config import study_of
from servegrid.page import compose
from servegrid.script import logged
from servegrid.tables import read_cells

with logged(snakemake.log[0]):
    study, cells = study_of(snakemake.config), read_cells(Path(snakemake.input.cells))
    text = compose.page(
        study.name,
        cells,
        read_cells(Path(snakemake.input.summary)),
        provenance.allocations(study.trials, cells, Path("results/cells")),
        demand_of(snakemake.config),
        read_hardware(Path(snakemake.input.hardware)),
    )
    with records.written_whole(Path(snakemake.output[0])) as temporary:
        temporary.write_text(text, encoding="utf-8")
