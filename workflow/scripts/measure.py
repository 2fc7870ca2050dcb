import json
from pathlib import Path

from servegrid.run.jobscript import redirect_output
from servegrid.run.trial import measure_trial
from servegrid.study.grid import Trial

with redirect_output(snakemake.log[0]):
    verdict = measure_trial(
        Trial.from_spec(json.loads(snakemake.params.spec)),
        requests=Path(snakemake.output.requests),
        samples=Path(snakemake.output.telemetry),
        last_attempt=snakemake.resources.attempt > 1,
        saturation=Path(snakemake.input[0]) if snakemake.input else None,
    )
    print(f"{snakemake.output.requests}: {verdict}")
