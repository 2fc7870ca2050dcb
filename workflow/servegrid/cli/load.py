"""`servegrid load`."""

from __future__ import annotations

import argparse
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from servegrid import __version__
from servegrid.cli import arguments
from servegrid.cli.progress import show_progress
from servegrid.errors import LoadError
from servegrid.study.endpoint import Endpoint, check_extras, read_api_key, split_url
from servegrid.study.grid import Workload

if TYPE_CHECKING:
    from servegrid.client import Measurement


def add_load(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "load",
        help="benchmark a server under one workload",
        description="Benchmark an OpenAI-compatible server under one workload. Exit status: 0 if "
        "every request was served, 1 if a request failed, for example with another number of "
        "tokens than requested, 2 if nothing was measured.",
    )
    add = parser.add_argument
    add(
        "--url",
        required=True,
        type=arguments.server_url,
        help="http://…, https://… or unix:///path/of/socket",
    )
    add("--model", required=True, help="name of the model on the server")
    add(
        "--protocol",
        required=True,
        choices=["burst", "closed_loop", "poisson"],
        help="burst: waves of simultaneous requests; closed_loop: each user sends the next "
        "request after a response; poisson: requests arrive at a rate",
    )
    intensity = parser.add_mutually_exclusive_group(required=True).add_argument
    positive_int, positive_float = arguments.positive_int, arguments.positive_float
    intensity("--concurrency", type=positive_int, metavar="N", help="requests or users at once")
    intensity("--request-rate", type=positive_float, metavar="X", help="mean requests per second")
    length = parser.add_mutually_exclusive_group(required=True).add_argument
    length("--requests", type=positive_int, metavar="R", help="total number of requests")
    length("--duration", type=positive_float, metavar="S", help="seconds; not for burst")
    add("--input-len", required=True, type=positive_int, metavar="I", help="tokens of each prompt")
    add(
        "--output-len",
        required=True,
        type=positive_int,
        metavar="O",
        help="tokens of each response",
    )
    add(
        "--think-time",
        type=arguments.non_negative_float,
        default=0.0,
        metavar="S",
        help="mean think time of a user in seconds (closed_loop); default: 0",
    )
    add("--output", required=True, type=Path, metavar="FILE", help="Parquet, one row per request")
    add(
        "--api", choices=["completions", "chat"], default="completions", help="default: completions"
    )
    add("--tokenizer", type=Path, metavar="PATH", help="tokenizer.json; default: random token ids")
    add("--api-key-env", metavar="VAR", help="environment variable with the API key")
    add(
        "--extra-body",
        type=arguments.json_object,
        default={},
        metavar="JSON",
        help="further keys of every request",
    )
    add(
        "--extra-header",
        type=arguments.header,
        action="append",
        default=[],
        metavar="'NAME: VALUE'",
        help="a further HTTP header of every request; can be repeated",
    )
    add(
        "--prompts",
        choices=["distinct", "identical"],
        default="distinct",
        help="distinct: every request has its own prompt (default); identical: all have the same",
    )
    add("--seed", type=int, default=0, help="seed of the prompts; default: 0")
    add(
        "--salt",
        type=arguments.salt,
        help="runs with the same salt and seed have the same prompts; default: random",
    )
    add(
        "--warmup-waves",
        type=arguments.non_negative_int,
        default=1,
        metavar="W",
        help="waves of requests that warm the server up and are not recorded; default: 1",
    )
    add(
        "--timeout",
        type=positive_float,
        default=600.0,
        metavar="S",
        help="seconds for the whole workload; default: 600",
    )
    add(
        "--idle-timeout",
        type=positive_float,
        default=120.0,
        metavar="S",
        help="a request fails after so many seconds without a byte; default: 120",
    )
    add(
        "--allow-early-stop",
        action="store_true",
        help="a response may have fewer tokens than requested, for servers without ignore_eos",
    )
    add("--ca-file", metavar="FILE", help="PEM file with certificates to trust, for https")
    add(
        "--insecure",
        action="store_true",
        help="accept every certificate; anybody on the way can then read the API key",
    )
    parser.set_defaults(run=_load)


def _load(options: argparse.Namespace) -> int:
    from servegrid.client import measure
    from servegrid.records import columns, parquet

    _validate(options)
    endpoint = replace(
        _endpoint(options.url, options.model, options.api_key_env),
        api=options.api,
        extra_body=options.extra_body,
        extra_headers=dict(options.extra_header),
        ca_file=options.ca_file,
        verify_tls=not options.insecure,
        output_len_exact=not options.allow_early_stop,
    )
    check_extras(endpoint.extra_body, endpoint.extra_headers)
    workload = Workload(
        protocol=options.protocol,
        concurrency=options.concurrency,
        request_rate=options.request_rate,
        duration_s=options.duration,
        think_time_s=options.think_time,
        input_len=options.input_len,
        output_len=options.output_len,
        requests=options.requests,
        prompts=options.prompts,
        warmup_waves=options.warmup_waves,
        seed=options.seed,
        timeout_s=options.timeout,
        idle_timeout_s=options.idle_timeout,
    )
    parquet.check_writable(options.output.parent)
    # The server could answer prompts of an earlier run from its prefix cache.
    salt = options.salt or secrets.token_hex(4)
    with show_progress(f"Benchmarking {endpoint.model}") as report:

        def report_requests(done: int, total: int) -> None:
            # Only burst has waves, so only burst reports while it runs.
            report("requests", done, total if workload.protocol == "burst" else 0)

        measurement = measure(
            endpoint,
            workload,
            options.tokenizer,
            salt,
            progress=report_requests,
        )
    record = {
        "format": parquet.RECORD_FORMAT,
        "servegrid": __version__,
        "workload": workload.spec,
        "facts": measurement.facts,
        "endpoint": {
            "url": options.url,
            "model": endpoint.model,
            "api": endpoint.api,
            "extra_body": endpoint.extra_body,
            "extra_headers": endpoint.extra_headers,
            "output_len_exact": endpoint.output_len_exact,
        },
    }
    schema = parquet.arrow_schema(columns.REQUESTS, record)
    parquet.write_table(
        measurement.requests.replace_schema_metadata(schema.metadata), options.output
    )
    print(_format_summary(measurement))
    return 1 if any(measurement.errors) else 0


def _validate(options: argparse.Namespace) -> None:
    """Raise LoadError if the options contradict the protocol."""
    protocol = options.protocol
    closed_loop = protocol == "closed_loop"
    for is_wrong, message in (
        (protocol == "poisson" and options.request_rate is None, "use --request-rate"),
        (protocol != "poisson" and options.request_rate is not None, "use --concurrency"),
        (protocol == "burst" and options.duration is not None, "use --requests"),
        (not closed_loop and options.think_time > 0, "--think-time is only for closed_loop"),
    ):
        if is_wrong:
            raise LoadError(f"--protocol {protocol}: {message}.")


def _endpoint(url: str, model: str, key_variable: str | None) -> Endpoint:
    """The endpoint of a URL, with or without the API's `/v1`.

    Raises LoadError if the environment variable contains no API key.
    """
    key = None
    if key_variable is not None:
        key = read_api_key(key_variable, os.environ)
        if key is None:
            raise LoadError(
                f"--api-key-env {key_variable}: this variable contains no API key. Export it first."
            )
    if url.startswith("unix://"):
        return Endpoint("http://localhost", model, key, socket=url.removeprefix("unix://"))
    base_url, api_path = split_url(url)
    return Endpoint(base_url, model, key, api_path=api_path)


def _format_summary(measurement: Measurement) -> str:
    from servegrid.analysis.buffering import describe_buffering

    rows = measurement.requests.to_pylist()
    served = [row for row in rows if row["error"] is None]
    start_ns, end_ns = measurement.facts["window_ns"]
    tokens = sum(row["completion_tokens"] for row in served)
    buffered = describe_buffering(measurement.requests)
    ttft = [row["first_token_ns"] - row["sent_ns"] for row in served]
    e2el = [row["token_ns"][-1] - row["sent_ns"] for row in served]
    tpot = [
        (last - first) / (row["completion_tokens"] - 1)
        for row, last, first in zip(served, e2el, ttft, strict=True)
        if row["completion_tokens"] > 1
    ]
    lines = [
        ("requests", f"{len(rows)}"),
        ("failed", f"{len(rows) - len(served)}"),
        ("ttft, median", "-" if buffered else _format_median_ms(ttft)),
        ("tpot, median", "-" if buffered else _format_median_ms(tpot)),
        ("e2el, median", _format_median_ms(e2el)),
        ("output tokens", f"{tokens / (end_ns - start_ns) * 1e9:.1f} /s"),
    ]
    if early := measurement.facts["stopped_early"]:
        lines.append(("stopped early", f"{early} responses, with fewer tokens than requested"))
    if buffered:
        lines.append(("buffered", f"{buffered}, so ttft, tpot and itl are unknown"))
    failures = sorted(set(filter(None, measurement.errors)))
    lines += [("failure", failure) for failure in failures[:3]]
    return "\n".join(f"{name:<14} {value}" for name, value in lines)


def _format_median_ms(times_ns: Sequence[float]) -> str:
    return f"{median(times_ns) / 1e6:.1f} ms" if times_ns else "-"
