from servegrid.bundle.sources import find_profile_folders


localrules:
    bundle,
    bundle_partial,


# Neither rule has an output, because a bundle's name ends with the digest of its content.
rule bundle:
    input:
        deleted_records,
        lambda wildcards: rules.all.input.derived,
    log:
        "results/logs/bundle.log",
    conda:
        "../envs/analysis.yaml"
    params:
        repository=workflow.basedir,
        hardware=HARDWARE,
        profiles=lambda wildcards: find_profile_folders(sys.argv, os.environ),
    script:
        "../scripts/bundle.py"


# Packs the trials that exist, if the rest of the study cannot be measured.
rule bundle_partial:
    log:
        "results/logs/bundle.log",
    conda:
        "../envs/analysis.yaml"
    params:
        repository=workflow.basedir,
        hardware=HARDWARE,
        profiles=lambda wildcards: find_profile_folders(sys.argv, os.environ),
    script:
        "../scripts/bundle.py"
