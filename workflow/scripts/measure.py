import json
from pathlib import Path

from servegrid.run.jobscript import redirect_output
from servegrid.run.trial import TrialInputs, measure_trial
from servegrid.study.grid import Trial

with redirect_output(snakemake.log[0]):
    trial = Trial.from_spec(json.loads(snakemake.params.spec))
    requests, samples = Path(snakemake.output.requests), Path(snakemake.output.telemetry)
    inputs = TrialInputs(
        saturation=Path(snakemake.input[0]) if snakemake.input else None,
        source_file=Path(name) if (name := snakemake.resources.source_file) else None,
    )
    last_attempt = snakemake.resources.attempt > 1
    if plan := snakemake.resources.get("search"):
        # Not at the top: only searches need it.
        from servegrid.run.search import measure_if_needed

        verdict = measure_if_needed(Path(plan), trial, requests, samples, last_attempt, inputs)
    else:
        verdict = measure_trial(trial, requests, samples, last_attempt, inputs)
    print(f"{snakemake.output.requests}: {verdict}")
