"""The files of a proposed profile, with a comment for each choice. Pure."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from servegrid.doctor.proposal import Kind, Proposal
from servegrid.errors import ConfigError
from servegrid.study.deployment import CPU

WIDTH = 100
KINDS_HEAD = """\
The kinds of nodes, as Slurm describes them. `gpu` in a study names one of them. The keys are \
submitit's names of Slurm options; plugin/docs/further.md explains all of them. You can change \
everything here: no change of a profile reruns a measurement. `servegrid doctor --profile \
{folder}` compares this file with Slurm. The capacity plan finds the price of a GPU by the \
kind's name: use the names of config/hardware.yaml, or add yours there."""
CONFIG_HEAD = """\
Written by `servegrid init-profile {name}` from what Slurm says about this cluster. Snakemake's \
options; kinds.yaml describes the nodes."""
CONFIG = """\
executor: submitit
submitit-cluster: slurm
submitit-service: servegrid.run.service:serve
submitit-follower: servegrid.run.service:follow
submitit-check: servegrid.run.service:check_servable
submitit-kinds: {kinds}
submitit-preload: servegrid.run.trial
submitit-records: results/logs/allocations
jobs: 10000               # cells wait in the queue of their allocation, not in Snakemake
max-jobs-per-timespan: 100000/1s
keep-going: true          # a failed cell does not stop the others
show-failed-logs: true
logger: servegrid         # progress bars; --verbose shows Snakemake's own output
latency-wait: 60          # seconds until a shared file system shows a new file
# servegrid writes each file completely or not at all, so no file is incomplete after a kill.
ignore-incomplete: true
# A changed script does not rerun a cell; a changed specification does.
rerun-triggers: [params, input, mtime, software-env]
set-resources:
  measure:
    # {why_socket}
    socket: {socket}
    startup_s: 1800       # seconds within which an engine must start
    runtime: 720          # maximum minutes per allocation; timeout_min of a kind replaces it
"""


def check_name(name: str) -> None:
    """Raise ConfigError if a profile cannot have this name."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ConfigError(
            f"`{name}` is not a name: it must consist of letters, digits and the characters _ . - "
            "and start with a letter or a digit. servegrid writes profiles/NAME/."
        )
    if name == "default":
        raise ConfigError(
            "`default` cannot be the name: Snakemake uses profiles/default in every run, with any "
            "other profile. Use the name of your cluster."
        )


def render_files(name: str, folder: Path, proposal: Proposal) -> dict[str, str]:
    """The text of each file of the profile `folder`."""
    shared = [kind.name for kind in proposal.kinds if not kind.values["slurm_exclusive"]]
    config = CONFIG.format(
        kinds=folder / "kinds.yaml",
        socket="unix" if shared else "tcp",
        why_socket=f"other users share the nodes of {', '.join(shared)}; `tcp` is more precise"
        if shared
        else "for exclusive nodes; use `unix` on nodes that users share",
    )
    return {
        "config.yaml": f"{_comment(CONFIG_HEAD.format(name=name))}\n{config}",
        "kinds.yaml": "\n".join(_kinds_file(folder, proposal)),
    }


def _kinds_file(folder: Path, proposal: Proposal) -> Iterator[str]:
    yield _comment(KINDS_HEAD.format(folder=folder))
    for note in proposal.notes:
        yield _comment(f"No kind for {note}")
    for kind in proposal.kinds:
        yield ""
        yield _comment(kind.about)
        yield f"{kind.name}:"
        for choice in kind.choices:
            yield _comment(choice.why, "  ")
            yield f"  {choice.key}: {_scalar(choice.value)}"
        if kind.name != CPU:
            yield _environment(kind)
    yield ""


def _environment(kind: Kind) -> str:
    built = "v100" if kind.name.startswith("v100") else "a100"
    return _comment(
        f"Without `python`, jobs use Snakemake's own Python. `make env-{built}` creates an "
        f"environment for {'V100' if built == 'v100' else 'A100 and newer'} GPUs:",
        "  ",
    ) + (f"\n  # python: .venv-{built}/bin/python")


def _comment(text: str, indent: str = "") -> str:
    start = f"{indent}# "
    return textwrap.fill(
        text, WIDTH, initial_indent=start, subsequent_indent=start, break_on_hyphens=False
    )


def _scalar(value: Any) -> str:
    """The value as YAML, on one line."""
    text: str = yaml.safe_dump(value, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
