from pathlib import Path

from servegrid.report.write import write_study_page
from servegrid.run.jobscript import redirect_output

INPUTS = ("cells", "summary", "frontier", "published", "slo", "saturation")

with redirect_output(snakemake.log[0]):
    write_study_page(
        snakemake.config,
        Path("results/cells"),
        {name: Path(snakemake.input[name]) for name in INPUTS},
        Path(snakemake.input.hardware),
        Path(snakemake.output[0]),
    )
