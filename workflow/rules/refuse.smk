# Cells that cannot work, whatever the engine does: they get their verdict without being submitted.
localrules:
    refuse,


ruleorder: refuse > measure


rule refuse:
    output:
        requests="results/cells/{refused}/requests.parquet",
        telemetry="results/cells/{refused}/telemetry.parquet",
    log:
        "results/logs/cells/{refused}.log",
    wildcard_constraints:
        refused="|".join(re.escape(trial.id) for trial in study.unsupported),
    conda:
        "../envs/cpu.yaml"
    params:
        spec=lambda wildcards: study.by_id(wildcards.refused).spec_json,
    script:
        "../scripts/refuse.py"
