from pathlib import Path

from servegrid import findings, provenance, published, records, tables
from servegrid.capacity import demand_of, read_hardware
from servegrid.config import study_of
from servegrid.page import compose
from servegrid.script import logged

with logged(snakemake.log[0]):
    study = study_of(snakemake.config)
    cells, summary, frontier, beside = (
        tables.read_cells(Path(snakemake.input[name]))
        for name in ("cells", "summary", "frontier", "published")
    )
    found = compose.Found(
        cells,
        summary,
        frontier,
        beside,
        findings.limits_of(snakemake.config),
        published.differences(cells, [trial.load.prompts for trial in study.trials]),
        provenance.allocations(study.trials, cells, Path("results/cells")),
    )
    hardware = read_hardware(Path(snakemake.input.hardware))
    text = compose.page(study.name, found, demand_of(snakemake.config), hardware)
    with records.written_whole(Path(snakemake.output[0])) as temporary:
        temporary.write_text(text, encoding="utf-8")
