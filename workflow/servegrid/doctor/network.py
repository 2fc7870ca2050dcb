"""Measures the network between two nodes of a kind, in an allocation of a few seconds."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from servegrid.doctor import network_probe
from servegrid.doctor.profile import Profile
from servegrid.doctor.report import Finding, Group
from servegrid.doctor.resources import ResourceRequest, build_request
from servegrid.doctor.shell import RunCommand
from servegrid.errors import ConfigError

WAIT_S, ASK_S, POLL_S = 600.0, 5.0, 0.5
MINUTES = 5
MUCH_FASTER = 2.0
"""Another interface is proposed if it has this many times the bandwidth of the kind's."""

Facts = Mapping[str, Any]


def check_network(
    profile: Profile, kind: str, directory: Path, run: RunCommand
) -> Iterator[Finding]:
    """Submit a probe on two nodes of `kind`, and compare what it finds with `interface`.

    `directory` must be on a file system that the nodes share.
    """
    group = Group(f"network of kind {kind}")
    with tempfile.TemporaryDirectory(prefix=".servegrid-network-", dir=directory) as name:
        folder = Path(name).absolute()
        problem = _run_probe(build_request(profile, kind, ()), folder, run)
        if problem is not None:
            yield group.fail("two nodes", problem, "Look at `squeue` and `sinfo`; try again later.")
            return
        first, second = (
            json.loads((folder / file).read_text(encoding="utf-8"))
            for file in (network_probe.FIRST, network_probe.SECOND)
        )
    place = f"`{kind}` in {profile.kinds_file}"
    yield from judge(group, first, second, profile.kinds[kind].get("interface"), place)


def check_kind_name(profile: Profile, kind: str) -> None:
    """Raise ConfigError if the profile does not have the kind."""
    if kind not in profile.kinds:
        raise ConfigError(
            f"--network: {profile.kinds_file} has no kind `{kind}`. Use one of: "
            f"{', '.join(map(str, profile.kinds))}."
        )


def judge(
    group: Group, first: Facts, second: Facts, setting: str | None, place: str
) -> Iterator[Finding]:
    """Findings from what both nodes wrote; `setting` is the kind's `interface`. Pure."""
    for node in (first, second):
        yield group.ok(node["host"], _describe(node))
    if first["boot"] == second["boot"]:
        yield group.warn(
            "two nodes",
            "both are one machine, so this is not the speed of a network",
            "Use a kind whose nodes are different machines.",
        )
    links = second["links"]
    for link in links:
        subject = f"{link['interface']} {link['network']}"
        if "error" in link:
            yield group.skip(subject, f"no connection: {link['error']}")
        else:
            yield group.ok(
                subject,
                f"{link['gbit_s']:g} Gbit/s in one TCP connection, "
                f"{link['round_trip_us']:g} µs round trip",
            )
    yield _compare(group, [link for link in links if "error" not in link], setting, place)


def _compare(group: Group, links: Sequence[Facts], setting: str | None, place: str) -> Finding:
    if not links:
        return group.fail(
            "interface",
            "no interface of the two nodes can reach the other",
            "Ask the administrators which network the nodes share, and whether a firewall closes "
            "its ports.",
        )
    best = max(links, key=lambda link: float(link["gbit_s"]))
    same_name = best["interface"] == best["other"]
    remedy = f"Write `interface: {best['interface'] if same_name else best['network']}` for {place}"
    chosen = [link for link in links if setting is not None and _is_chosen(link, setting)]
    if setting is None:
        return group.warn("interface", "the kind names none", f"{remedy}.")
    if not chosen:
        return group.fail("interface", f"`{setting}` connects no two nodes", f"{remedy}.")
    if best["gbit_s"] > MUCH_FASTER * chosen[0]["gbit_s"]:
        return group.warn(
            "interface",
            f"`{setting}` has {chosen[0]['gbit_s']:g} Gbit/s, {best['interface']} has "
            f"{best['gbit_s']:g}",
            f"{remedy}, unless GPUs use another way.",
        )
    return group.ok("interface", f"`{setting}` is as fast as any")


def _is_chosen(link: Facts, setting: str) -> bool:
    if "/" not in setting:
        return bool(setting == link["interface"])
    with contextlib.suppress(ValueError, TypeError):
        inner, outer = (
            ipaddress.IPv4Network(each, strict=False) for each in (link["network"], setting)
        )
        return inner.overlaps(outer)
    return False


def _describe(node: Facts) -> str:
    interfaces = [
        f"{each['name']} {each['address']} ({each['network']}, {'up' if each['up'] else 'down'}"
        + (", infiniband" if each["infiniband"] else "")
        + (f", {each['mbit_s'] / 1000:g} Gbit/s" if each["mbit_s"] else "")
        + ")"
        for each in node["interfaces"]
    ]
    cards = [
        f"{each['name']} ({each['link_layer']}, {each['rate']}, {each['state']})"
        for each in node["cards"]
    ]
    return ", ".join(interfaces) + f"; RDMA: {', '.join(cards) or 'no card'}"


def _run_probe(request: ResourceRequest, folder: Path, run: RunCommand) -> str | None:
    """Run the probe; it writes its files to `folder`. Returns why it did not, or None."""
    python = request.values.get("python")
    if python is None or "container" in request.values:
        python = sys.executable
    step = "srun --nodes=2 --ntasks=2 --ntasks-per-node=1"
    words = [str(Path(python).absolute() if "/" in python else python), "-P", "-m"]
    script = folder / "probe.sh"
    script.write_text(
        f"#!/bin/sh\n{step} {shlex.join([*words, network_probe.__name__, str(folder)])}\n",
        encoding="utf-8",
    )
    options = [
        *request.sbatch_options(),
        *("--nodes=2", f"--time={MINUTES}", "--job-name=servegrid-network", "--parsable"),
        *("--open-mode=append", f"--output={folder / 'log'}"),
    ]
    submitted = run(["sbatch", *options, str(script)])
    if not submitted.ok:
        return f"Slurm refuses the job: {submitted.message}"
    job, _, cluster = submitted.stdout.strip().partition(";")
    on = [f"--clusters={cluster}"] if cluster else []
    try:
        return _wait(job, on, folder, run)
    finally:
        run(["scancel", *on, job])  # also after Ctrl-C; a job that has ended ignores it


def _wait(job: str, on: Sequence[str], folder: Path, run: RunCommand) -> str | None:
    began, asked = time.monotonic(), time.monotonic()
    while not (folder / network_probe.SECOND).exists():
        if time.monotonic() - began > WAIT_S:
            return f"the job {job} did not finish within {WAIT_S / 60:.0f} min"
        if time.monotonic() - asked > ASK_S:
            state = run(["squeue", "--noheader", *on, f"--jobs={job}", "--format=%T"])
            if state.status is not None and not state.stdout.strip():
                if (folder / network_probe.SECOND).exists():
                    break
                log = folder / "log"
                text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
                return f"the job {job} ended without a result: {' '.join(text.split())[-300:]}"
            asked = time.monotonic()
        time.sleep(POLL_S)
    return None
