rule measure:
    output:
        requests="results/cells/{deployment}/{cell}/trial-{trial}/requests.parquet",
        telemetry="results/cells/{deployment}/{cell}/trial-{trial}/telemetry.parquet",
    log:
        "results/logs/cells/{deployment}/{cell}/trial-{trial}.log",
    # An engine that dies under a load is brought up again and given the same load once more,
    # before the verdict `server_died` is believed.
    retries: 1
    conda:
        "../envs/cpu.yaml"
    resources:
        allocation=lambda wildcards: trial_of(wildcards).deployment.allocation,
        kind=lambda wildcards: trial_of(wildcards).deployment.node_kind,
        gpus=lambda wildcards: trial_of(wildcards).deployment.node_gpus,
        environment=lambda wildcards: trial_of(wildcards).deployment.environment,
        order=lambda wildcards: study.position(trial_of(wildcards)),
        max_concurrency=lambda wildcards: study.max_concurrency(
            trial_of(wildcards).deployment
        ),
        attempt=lambda wildcards, attempt: attempt,
    params:
        spec=lambda wildcards: trial_of(wildcards).spec_json,
    script:
        "../scripts/measure.py"
