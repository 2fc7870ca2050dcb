import os
from pathlib import Path

from servegrid.bundle.pack import Origin, pack
from servegrid.run.jobscript import logged

terminal = os.dup(2)
with logged(snakemake.log[0]):
    params = snakemake.params
    profiles = [Path(each) for each in params.profiles]
    origin = Origin(Path(params.root), Path(params.hardware), profiles)
    packed = pack(snakemake.config, origin, Path(), [os.environ.get("USER", "")])
    os.write(terminal, f"{packed.told()}\n".encode())
