from servegrid.bundle.sources import profile_folders


localrules:
    bundle,
    bundle_partial,


# Neither has an output: a bundle's name ends with the digest of what is in it.
rule bundle:
    input:
        lambda wildcards: rules.all.input,
    log:
        "results/logs/bundle.log",
    conda:
        "../envs/analysis.yaml"
    params:
        root=workflow.basedir,
        hardware=HARDWARE,
        profiles=lambda wildcards: profile_folders(sys.argv, os.environ),
    script:
        "../scripts/bundle.py"


# What there is, where not all can be measured.
rule bundle_partial:
    log:
        "results/logs/bundle.log",
    conda:
        "../envs/analysis.yaml"
    params:
        root=workflow.basedir,
        hardware=HARDWARE,
        profiles=lambda wildcards: profile_folders(sys.argv, os.environ),
    script:
        "../scripts/bundle.py"
