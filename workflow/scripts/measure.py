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
        source_file=Path(name) if (name := snakemake.resources.source_file) else None,
    )
    print(f"{snakemake.output.requests}: {verdict}")
