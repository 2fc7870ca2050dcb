import os
from pathlib import Path

from servegrid.bundle.pack import Origin, pack
from servegrid.script import logged

terminal = os.dup(2)
with logged(snakemake.log[0]):
    origin = Origin(Path(snakemake.params.root), [Path(each) for each in snakemake.params.profiles])
    packed = pack(snakemake.config, origin, Path(), [os.environ.get("USER", "")])
    os.write(terminal, f"{packed.told()}\n".encode())
