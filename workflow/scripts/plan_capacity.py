from pathlib import Path

from servegrid import plan_page, printable, records, tables
from servegrid.capacity import demand_of, plan, read_hardware
from servegrid.script import logged

with logged(snakemake.log[0]):
    demand = demand_of(snakemake.config)
    hardware = read_hardware(Path(snakemake.input.hardware))
    planned = plan(tables.read_cells(Path(snakemake.input.summary)), demand, hardware)
    tables.write(planned, records.PLAN, Path(snakemake.output.parquet), Path(snakemake.output.csv))
    printable.write(
        {
            Path(snakemake.output.markdown): plan_page.page(planned, demand, hardware),
            Path(snakemake.output.latex): printable.as_latex(
                plan_page.table(planned), f"Capacity plan for {demand.users} users.", "tab:capacity"
            ),
        }
    )
