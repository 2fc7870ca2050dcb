"""Expands the keys of `workload` to workloads. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from servegrid.errors import ConfigError
from servegrid.study.grid import (
    COPIED_KEYS,
    OPEN_LOOPS,
    SWEEP,
    SWEEP_FRACTIONS,
    Workload,
    count_requests,
)
from servegrid.study.source import NEEDS_FILE, FileFacts, Source, parse_source
from servegrid.study.text import pluralize


def expand_workloads(keys: Mapping[str, Any], where: str) -> list[Workload]:
    source = parse_source(keys["source"], f"{where}: workload.source") if "source" in keys else None
    if source is not None and source.kind == "trace":
        return _expand_trace(keys, source, where)
    if source is not None and source.file is not None and source.kind not in NEEDS_FILE:
        _check_absent(keys, ("input_len", "output_len", "output_spread"), "the file", where)
        keys = {
            **keys,
            "input_len": source.file.input_len,
            "output_len": source.file.output_len,
        }
    _check_workload_keys(keys, where)
    workloads = _expand_lengths(keys, source)
    if source is not None:
        _check_source_fits(source, workloads, where)
    return workloads


def _expand_lengths(keys: Mapping[str, Any], source: Source | None) -> list[Workload]:
    is_sweep = keys.get("request_rate") == SWEEP
    rates = list(SWEEP_FRACTIONS) if is_sweep else as_list(keys.get("request_rate"))
    return [
        Workload(
            protocol=protocol,
            source=source,
            concurrency=None if protocol in OPEN_LOOPS else intensity,
            request_rate=intensity if protocol in OPEN_LOOPS and not is_sweep else None,
            input_len=input_len,
            output_len=output_len,
            requests=count_requests(
                keys, protocol, intensity, 1.0 if source is None else source.mean_turns
            ),
            duration_s=None if protocol == "burst" else keys.get("duration_s"),
            think_time_s=keys.get("think_time_s", 0.0) if protocol == "closed_loop" else 0.0,
            burstiness=float(keys["burstiness"]) if protocol == "gamma" else None,
            rate_profile=tuple(keys["rate_profile"]) if protocol == "profile" else None,
            rate_fraction=intensity if protocol in OPEN_LOOPS and is_sweep else None,
            **{key: keys[key] for key in COPIED_KEYS if key in keys},
        )
        for protocol in as_list(keys.get("protocol", "burst"))
        for output_len in as_list(keys.get("output_len", 100))
        for input_len, intensity in itertools.product(
            as_list(keys["input_len"]),
            rates if protocol in OPEN_LOOPS else as_list(keys["concurrency"]),
        )
    ]


def _expand_trace(keys: Mapping[str, Any], source: Source, where: str) -> list[Workload]:
    """One workload per `speedup`: the trace has the lengths, the times and their number."""
    absent = ("input_len", "output_len", "output_spread", "concurrency", "request_rate")
    more = ("requests_per_user", "duration_s", "think_time_s", "prompts")
    _check_absent(keys, (*absent, *more), "the trace", where)
    if as_list(keys.get("protocol", "trace")) != ["trace"]:
        raise ConfigError(
            f"{where}: workload.source: a trace has its own times, so its protocol is `trace`. "
            "Write `protocol: trace`, or remove `protocol`."
        )
    facts = source.file
    assert facts is not None
    if facts.rows < 2 or not facts.span_s:
        raise ConfigError(
            f"{where}: workload.source: the trace has {pluralize(facts.rows, 'row')} within "
            f"{facts.span_s:g} s, so it has no rate. Name a longer trace, or raise `first_s`."
        )
    rate = (facts.rows - 1) / facts.span_s
    return [
        Workload(
            protocol="trace",
            concurrency=None,
            request_rate=float(f"{speedup * rate:.4g}"),
            input_len=facts.input_len,
            output_len=facts.output_len,
            requests=facts.rows,
            source=replace(source, speedup=float(speedup)),
            **{key: keys[key] for key in COPIED_KEYS if key in keys},
        )
        for speedup in as_list(keys["source"].get("speedup", 1.0))
    ]


def _check_absent(keys: Mapping[str, Any], absent: Sequence[str], owner: str, where: str) -> None:
    for key in absent:
        if key in keys:
            raise ConfigError(
                f"{where}: workload.{key}: comes from {owner} of `workload.source`. Remove the key."
            )


def _check_source_fits(source: Source, workloads: Sequence[Workload], where: str) -> None:
    """Raise ConfigError if a workload cannot take its requests from the source."""
    for workload in workloads:
        place = f"{where}: workload.source"
        if workload.prompts == "identical" and (source.kind == "file" or source.prefix_len):
            raise ConfigError(
                f"{place}: its prompts differ, so they are not `identical`. Remove `prompts`."
            )
        if workload.prompts == "identical" and not source.has_fixed_lengths:
            raise ConfigError(
                f"{place}: prompts of different lengths are not `identical`. Remove `prompts`, or "
                "the distribution of the lengths."
            )
        if source.has_turns and workload.protocol != "closed_loop":
            raise ConfigError(
                f"{place}.turns: a user's next turn waits for the answer to the last one, so the "
                f"protocol is `closed_loop`, not `{workload.protocol}`. Write `protocol: "
                "closed_loop`, or remove `turns`."
            )
        if source.output_lens is not None and workload.output_spread:
            raise ConfigError(
                f"{place}.output_lens: `output_spread` is a second distribution. Remove one of the "
                "two."
            )
        if source.prefix_len >= workload.input_len:
            raise ConfigError(
                f"{place}.prefix_len: {source.prefix_len} leaves nothing of input_len "
                f"{workload.input_len}, which includes the prefix. Shorten the prefix."
            )
        for key, drawn, mean in (
            ("input_lens", source.input_lens, workload.input_len),
            ("output_lens", source.output_lens, workload.output_len),
        ):
            if drawn is not None and drawn.max < mean:
                raise ConfigError(
                    f"{place}.{key}.max: {drawn.max} is less than the mean {mean}. Raise it, or "
                    f"lower `{key[:-1]}`."
                )
        if source.kind == "file" and source.file:
            _check_enough(source, source.file, workload, place)


def _check_enough(source: Source, file: FileFacts, workload: Workload, place: str) -> None:
    """Raise ConfigError if a file has too few rows, or too few turns, for a workload."""
    has, what = (file.turns, "user turn") if source.has_turns else (file.rows, "usable row")
    if (workload.requests or 1) > has:
        raise ConfigError(
            f"{place}: the file has {pluralize(has, what)}, and `{workload.cell}` needs "
            f"{workload.requests}: no row is sent twice. Lower `concurrency` or "
            "`requests_per_user`, or add rows."
        )


def _check_workload_keys(keys: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError if a key that a protocol needs is missing."""
    protocols = as_list(keys.get("protocol", "burst"))
    if "input_len" not in keys:
        raise ConfigError("workload: `input_len` is missing. Add it: the prompt length in tokens.")
    for protocol in protocols:
        if protocol == "trace":
            raise ConfigError(
                f"{where}: the protocol `trace` needs a trace. Add `source` under `workload`, "
                "with `kind: trace` and `path`."
            )
        needed = ["request_rate" if protocol in OPEN_LOOPS else "concurrency"]
        needed += {"gamma": ["burstiness"], "profile": ["rate_profile", "duration_s"]}.get(
            protocol, []
        )
        for key in needed:
            if key not in keys:
                raise ConfigError(
                    f"{where}: the protocol `{protocol}` needs `{key}`. "
                    f"Add `{key}` under `workload`."
                )
    for key, protocol in (("burstiness", "gamma"), ("rate_profile", "profile")):
        if key in keys and protocol not in protocols:
            raise ConfigError(
                f"{where}: `{key}` is only for the protocol `{protocol}`. Write "
                f"`protocol: {protocol}`, or remove `{key}`."
            )
    if "profile" in protocols and keys["request_rate"] == SWEEP:
        raise ConfigError(
            f"{where}: the protocol `profile` needs a number as `request_rate`: its rate changes, "
            "so it has no saturation. Run a sweep with `poisson` first."
        )
    if "profile" in protocols and not any(keys["rate_profile"]):
        raise ConfigError(f"{where}: `rate_profile` has no factor above 0. Add one.")


_PROTOCOLS_OF = {
    "request_rate": ("poisson", "gamma", "profile"),
    "think_time_s": ("closed_loop",),
    "requests_per_user": ("burst", "closed_loop"),
    "duration_s": ("closed_loop", "poisson", "gamma", "profile"),
}
"""Keys that other protocols would silently ignore."""


def check_used(given: Mapping[str, Any], protocols: Collection[str], where: str) -> None:
    """Raise ConfigError if none of the protocols uses one of the keys `given` in `where`."""
    for key in given.keys() & _PROTOCOLS_OF.keys():
        if given[key] and not set(_PROTOCOLS_OF[key]) & set(protocols):
            names = [f"`{name}`" for name in _PROTOCOLS_OF[key]]
            kinds = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
            raise ConfigError(
                f"{where}.{key}: is only for {kinds}, and the protocol is "
                f"{' and '.join(f'`{each}`' for each in sorted(protocols))}. Write "
                f"`protocol: {_PROTOCOLS_OF[key][0]}`, or remove `{key}`."
            )


def protocols_of(keys: Mapping[str, Any]) -> list[str]:
    """The protocols of a workload with these keys."""
    is_trace = keys.get("source", {}).get("kind") == "trace"
    return as_list(keys.get("protocol", "trace" if is_trace else "burst"))


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
