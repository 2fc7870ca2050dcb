import json
from pathlib import Path

from servegrid.run.jobscript import redirect_output
from servegrid.run.trial import measure_trial
from servegrid.study.grid import Trial

with redirect_output(snakemake.log[0]):
    trial = Trial.from_spec(json.loads(snakemake.params.spec))
    files = Path(snakemake.output.requests), Path(snakemake.output.telemetry)
    last_attempt = snakemake.resources.attempt > 1
    saturation = Path(snakemake.input[0]) if snakemake.input else None
    if plan := snakemake.resources.get("search"):
        # Not at the top: only searches need it.
        from servegrid.run.search import measure_if_needed

        verdict = measure_if_needed(Path(plan), trial, *files, last_attempt)
    else:
        verdict = measure_trial(trial, *files, last_attempt, saturation)
    print(f"{snakemake.output.requests}: {verdict}")
