import os
import sys
from pathlib import Path

from servegrid.bundle.pack import Sources, pack
from servegrid.cli.progress import show_progress
from servegrid.run.jobscript import redirect_output

terminal = os.fdopen(os.dup(2), "w", encoding=sys.stderr.encoding, errors="replace")
with redirect_output(snakemake.log[0]):
    params = snakemake.params
    profiles = [Path(profile) for profile in params.profiles]
    made_with = Sources(Path(params.repository), Path(params.hardware), profiles)
    users = [os.environ.get("USER", "")]
    with show_progress("Bundling", terminal) as report:
        packed = pack(snakemake.config, made_with, Path(), users, report)
    print(packed.format(), file=terminal, flush=True)
