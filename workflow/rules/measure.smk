rule measure:
    # Its time does not count: a record that was only copied makes no measurement again.
    input:
        [hide_outdated] * bool(OUTDATED),
        [ancient(saturation_of)] if study.has_rate_fractions else [],
    output:
        requests="results/cells/{deployment}/{cell}/trial-{trial}/requests.parquet",
        telemetry="results/cells/{deployment}/{cell}/trial-{trial}/telemetry.parquet",
    log:
        "results/logs/cells/{deployment}/{cell}/trial-{trial}.log",
    # If an engine dies under a workload, a new engine gets the same workload once more. Only if it
    # dies again is the verdict `server_died`.
    retries: 1
    conda:
        "../envs/cpu.yaml"
    resources:
        **unless_dry_run(
            allocation=lambda wildcards: trial_of(wildcards).allocation,
            kind=lambda wildcards: trial_of(wildcards).deployment.node_kind,
            gpus=lambda wildcards: trial_of(wildcards).deployment.node_gpus,
            environment=lambda wildcards: trial_of(wildcards).deployment.environment,
            order=lambda wildcards: study.position(trial_of(wildcards)),
            max_concurrency=lambda wildcards: study.max_concurrency(
                trial_of(wildcards).deployment
            ),
            prune=lambda wildcards: study.prunes(trial_of(wildcards)),
            attempt=lambda wildcards, attempt: attempt,
            # Not in `params`: a cell that a search has measured is that of a full grid, too.
            search=lambda wildcards: search_plan_of(wildcards.deployment),
            # Not there either: a cell of the same file stays the same wherever the file lies.
            source_file=lambda wildcards: study.source_file(trial_of(wildcards)),
            **EXPECTED,
        ),
    params:
        spec=lambda wildcards: trial_of(wildcards).spec_json,
    script:
        "../scripts/measure.py"
