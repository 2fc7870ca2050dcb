import json
from pathlib import Path

from servegrid.run.jobscript import redirect_output
from servegrid.run.unmeasured import refuse_trial
from servegrid.study.grid import Trial

with redirect_output(snakemake.log[0]):
    verdict = refuse_trial(
        Trial.from_spec(json.loads(snakemake.params.spec)),
        requests=Path(snakemake.output.requests),
        samples=Path(snakemake.output.telemetry),
    )
    print(f"{snakemake.output.requests}: {verdict}")
