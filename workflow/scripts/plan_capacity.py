from pathlib import Path

from servegrid import plan_page, records, tables
from servegrid.capacity import demand_of, plan, read_hardware
from servegrid.script import logged

with logged(snakemake.log[0]):
    demand = demand_of(snakemake.config)
    hardware = read_hardware(Path(snakemake.input.hardware))
    planned = plan(tables.read_cells(Path(snakemake.input.summary)), demand, hardware)
    tables.write(planned, records.PLAN, Path(snakemake.output.parquet), Path(snakemake.output.csv))
    with records.written_whole(Path(snakemake.output.markdown)) as temporary:
        temporary.write_text(plan_page.as_markdown(planned, demand, hardware), encoding="utf-8")
