"""The plan of a study, and its review, as text and as JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from servegrid.analysis.capacity import HardwarePrices
from servegrid.analysis.feasibility import CANNOT, FITS, GIB, QUEUES, UNKNOWN
from servegrid.analysis.plan import (
    CellPlan,
    DeploymentPlan,
    Range,
    StudyPlan,
    charged_gpus,
)
from servegrid.analysis.review import DeploymentReview
from servegrid.analysis.titles import intensity_title
from servegrid.study.few_requests import describe_few_requests
from servegrid.study.text import pluralize

HOUR_S = 3600
MAX_EVIDENCE = 2
"""So many reasons of a deployment are shown, unless all cells are."""
_MARKS = {FITS: "", QUEUES: "q", CANNOT: "x", UNKNOWN: "?"}
_LEGEND = (
    ("q", "will queue"),
    ("x", "cannot work"),
    ("*", "measured"),
    ("-", "not served, or not run"),
)
_HEAD = (
    *("deployment", "weights GiB/GPU", "KV tokens", "cells: fit", "queue", "can't", "done"),
    *("GPU-hours", "time"),
)


def render_plan(plan: StudyPlan, prices: HardwarePrices, all_cells: bool) -> str:
    """The plan as text: one table of the deployments, then one block for each of them."""
    lines = [
        f"Study {plan.name}: {pluralize(len(plan.deployments), 'deployment')}, "
        f"{pluralize(sum(len(each.cells) for each in plan.deployments), 'cell')}, "
        f"{pluralize(plan.trials, 'measurement')}, {plan.measured} of them done.",
        "",
        *_table([_HEAD, *map(_overview, plan.deployments)]),
        "",
        *_totals(plan, prices),
    ]
    for each in plan.deployments:
        lines += ["", *_block(each, plan, all_cells)]
    return "\n".join(lines) + "\n"


def _overview(plan: DeploymentPlan) -> tuple[str, ...]:
    counts = Counter(cell.outlook.status for cell in plan.cells)
    weights = "?" if plan.placement is None else f"{plan.placement.weights / GIB:.1f}"
    times = [each.seconds for each in plan.allocations]
    return (
        plan.deployment.name,
        weights,
        "?" if plan.kv_tokens is None else f"{max(0.0, plan.kv_tokens):,.0f}",
        *(str(counts[status]) for status in (FITS, QUEUES, CANNOT)),
        str(sum(not cell.missing for cell in plan.cells)),
        _interval(plan.gpu_hours) if plan.allocations else "-",
        " + ".join("?" if each is None else _duration(each) for each in times) or "-",
    )


def _totals(plan: StudyPlan, prices: HardwarePrices) -> Iterator[str]:
    known = [each for each in plan.deployments if each.gpu_hours is not None]
    rest = len(plan.deployments) - len(known)
    unknown = f", without {pluralize(rest, 'deployment')} not predicted" if rest else ""
    if not any(each.allocations for each in plan.deployments):
        yield f"Nothing is left to measure{unknown}."
        return
    if any(each.deployment.gpu_count for each in plan.deployments):
        hours = _interval(_sum(each.gpu_hours for each in known))
        yield f"GPU-hours: {hours}{unknown}.{_whole_nodes(plan)}"
    else:
        yield f"GPU-hours: 0, because no deployment has a GPU{unknown}."
    yield from _time(known)
    if energy := _sum(each.energy_kwh for each in known):
        yield f"Energy: {_interval(energy)} kWh, at 70% (40 to 100%) of the GPUs' power limits."
    if cost := _sum(each.cost(prices) for each in known):
        yield (
            f"Cost: {_interval(cost)} {prices.currency}: electricity, and the GPUs' price over "
            f"{prices.years_in_use:g} years."
        )
    if known:
        yield (
            "In brackets: 95% intervals. Those of sums, energy and cost have all ends at once, so "
            "they are wider."
        )


def _whole_nodes(plan: StudyPlan) -> str:
    """The sentence that whole nodes count, if a deployment does not use all their GPUs."""
    charged = any(
        charged_gpus(each.deployment, plan.site) > each.deployment.node_gpus
        for each in plan.deployments
    )
    return " All GPUs of a node count, because the profile takes whole nodes." if charged else ""


def _time(known: Sequence[DeploymentPlan]) -> Iterator[str]:
    """The time of all allocations, one after another and all at once, without waiting."""
    seconds = [each.seconds for plan in known for each in plan.allocations if each.seconds]
    if len(seconds) > 1 and (total := _sum(seconds)):
        longest = max(seconds, key=lambda each: each.value)
        yield (
            f"Time: {_duration(total)} if one deployment runs after another, "
            f"{_duration(longest)} if all run at the same time, without the wait for nodes."
        )


def _sum(ranges: Iterable[Range | None]) -> Range | None:
    known = [each for each in ranges if each is not None]
    return sum(known[1:], known[0]) if known else None


def _block(plan: DeploymentPlan, study: StudyPlan, all_cells: bool) -> Iterator[str]:
    yield f"{plan.deployment.name}  (shape of the model: {plan.source})"
    if (nodes := study.site.nodes.get(plan.deployment.name, 1)) > 1:
        yield f"  nodes: {nodes}"
    if plan.deployment.replicas > 1:
        yield f"  replicas: {plan.deployment.replicas}"
    if plan.unknown:
        yield f"  not predicted: {plan.unknown}"
        return
    yield from _memory_lines(plan)
    if plan.problem:
        yield f"  cannot work: {plan.problem}"
        return
    yield f"  predicted from: {_origin(plan)}"
    if plan.search is not None and plan.allocations:
        yield (
            f"  the search will measure about {len(plan.search)} of {len(plan.cells)} cells: "
            "times, energy and cost are for these"
        )
    for each in plan.allocations:
        if (parts := each.parts(study.site.runtime_s)) > 1 and study.site.runtime_s:
            yield (
                f"  bring-up {each.bring_up} may need {parts} allocations of "
                f"{study.site.runtime_s / 3600:g} h"
            )
    if few := describe_few_requests(cell.workload for cell in plan.cells if cell.missing):
        yield f"  {few}"
    if plan.teach and plan.search is None:
        yield f"  measured first, these narrow the intervals most: {', '.join(plan.teach)}"
    yield from (_cell_lines(plan) if all_cells else _grids(plan))
    reasons = [cell.outlook.why for cell in plan.cells if cell.outlook.why]
    for reason in [] if all_cells else reasons[:MAX_EVIDENCE]:
        yield f"  {reason}"
    if not all_cells and len(reasons) > MAX_EVIDENCE:
        yield f"  … and {len(reasons) - MAX_EVIDENCE} more; --cells shows them"


def _memory_lines(plan: DeploymentPlan) -> Iterator[str]:
    if plan.placement is None:
        return
    placement, shape = plan.placement, plan.placement.shape
    per_gpu = " per GPU" if plan.deployment.gpu_count else ""
    weights = f"  weights: {placement.weights / GIB:.1f} GiB{per_gpu}"
    per_token = f"KV cache: {shape.kv_bytes_per_token / 1024:g} KiB per token"
    if plan.kv_tokens is None:
        yield f"{weights}; {per_token}"
        return
    yield (
        f"{weights}, and {max(0.0, placement.kv_pool) / GIB:.1f} for the KV cache, of "
        f"{placement.usable / GIB:.1f} usable; the rest is for CUDA and activations"
    )
    window = f", in requests of {plan.deployment.max_model_len}" if shape.sliding_layers else ""
    yield f"  {per_token}, {max(0.0, plan.kv_tokens):,.0f} tokens in all{window}"


def _origin(plan: DeploymentPlan) -> str:
    own = f", and {pluralize(plan.observed, 'measured cell')} of its own" if plan.observed else ""
    text = f"published tables{own}"
    if plan.labels:
        text += f". They have no data for {', '.join(plan.labels)}: the intervals are wide"
    return text


def _grids(plan: DeploymentPlan) -> Iterator[str]:
    """One table per protocol and output length: seconds per 100 tokens, load × prompt length."""
    groups: dict[tuple[str, int], dict[tuple[float, int], CellPlan]] = {}
    for cell in plan.cells:
        workload = cell.workload
        group = groups.setdefault((workload.protocol, workload.output_len), {})
        group[workload.intensity, workload.input_len] = cell
    for (protocol, length), cells in groups.items():
        swept = any(cell.workload.rate_fraction is not None for cell in cells.values())
        load_title = "rate / rate at saturation" if swept else intensity_title(protocol)
        loads = sorted({load for load, _ in cells})
        prompts = sorted({prompt for _, prompt in cells})
        factor = _typical_factor(cells.values())
        interval = (
            ""
            if math.isnan(factor)
            else f" (95% interval: mostly ÷ {factor:.2g} to × {factor:.2g})"
        )
        yield f"  {protocol}, {length} output tokens: seconds per 100 tokens{interval};"
        yield f"  rows: {load_title}, columns: prompt tokens"
        rows = [["", *map(str, prompts)]]
        for load in loads:
            row = [cells.get((load, prompt)) for prompt in prompts]
            rows.append([f"{load:g}", *("" if each is None else _value(each) for each in row)])
        yield from (f"    {line}" for line in _table(rows))
        # Only at the end of a value: 1e-05 is not a value that is not served.
        ends = {value[at:] for row in rows[1:] for value in row[1:] for at in (-2, -1)}
        signs = [f"{sign}: {text}" for sign, text in _LEGEND if ends & {sign, f"{sign}*"}]
        if signs:
            yield f"    {', '.join(signs)}"


def _typical_factor(cells: Iterable[CellPlan]) -> float:
    """The median ratio of the interval's upper end to the expected value, of missing cells."""
    ratios = sorted(
        cell.expected_s.high / cell.expected_s.value
        for cell in cells
        if cell.expected_s and cell.missing
    )
    return ratios[len(ratios) // 2] if ratios else float("nan")


def _value(cell: CellPlan) -> str:
    """What was measured, or `-` for a verdict without a time; else what is expected."""
    mark = _MARKS[cell.outlook.status]
    if cell.measured_s is not None:
        return f"{cell.measured_s:.3g}{mark}*"
    if not cell.missing:
        return "-"
    return "" if cell.expected_s is None else f"{cell.expected_s.value:.3g}{mark}"


def _cell_lines(plan: DeploymentPlan) -> Iterator[str]:
    head = (
        *("cell", "outlook", "lower bound", "expected (95% interval)", "measured"),
        *("missing trials", "why"),
    )
    yield "  seconds per 100 tokens; no engine is faster than the lower bound:"
    rows = [
        (
            cell.workload.cell,
            cell.outlook.status,
            "-" if cell.bound_s is None else f"{cell.bound_s:.3g}",
            "-" if cell.expected_s is None else _interval(cell.expected_s),
            "-" if cell.measured_s is None else f"{cell.measured_s:.3g}",
            f"{cell.missing} of {cell.trials}",
            cell.outlook.why or "",
        )
        for cell in plan.cells
    ]
    yield from (f"    {line}" for line in _table([head, *rows], (0, len(head) - 1)))


def _interval(value: Range | None) -> str:
    if value is None:
        return "?"
    if value.low == value.high:
        return f"{value.value:.3g}"
    return f"{value.value:.3g} ({value.low:.3g} to {value.high:.3g})"


def _duration(seconds: Range) -> str:
    """In minutes, or in hours from one hour on."""
    if seconds.value < HOUR_S:
        return f"{_interval(seconds * (1 / 60))} min"
    return f"{_interval(seconds * (1 / HOUR_S))} h"


def _table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Aligned columns: those in `left` to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def plan_json(plan: StudyPlan, prices: HardwarePrices) -> str:
    """The plan as JSON. Sizes are in bytes, times in seconds, energy in kWh."""
    data = {
        "study": plan.name,
        "measurements": plan.trials,
        "measured": plan.measured,
        "currency": prices.currency,
        "deployments": [_deployment_data(each, plan, prices) for each in plan.deployments],
    }
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)


def _deployment_data(
    plan: DeploymentPlan, study: StudyPlan, prices: HardwarePrices
) -> dict[str, Any]:
    placement = plan.placement
    memory = None
    if placement is not None:
        memory = {
            "weights_bytes_per_gpu": placement.weights,
            "usable_bytes_per_gpu": None if plan.kv_tokens is None else placement.usable,
            "kv_bytes_per_token": placement.shape.kv_bytes_per_token,
            "kv_cache_tokens": plan.kv_tokens,
        }
    return {
        "deployment": plan.deployment.name,
        "model_source": plan.source,
        "nodes": study.site.nodes.get(plan.deployment.name),
        "problem": plan.problem,
        "unknown": plan.unknown,
        "memory": memory,
        "never_seen": plan.labels,
        "measured_cells_used": plan.observed,
        "cells_that_teach_most": plan.teach,
        "cells_that_the_search_takes": None if plan.search is None else sorted(plan.search),
        "gpu_hours": _range_data(plan.gpu_hours),
        "energy_kwh": _range_data(plan.energy_kwh),
        "cost": _range_data(plan.cost(prices)),
        "allocations": [
            {
                "bring_up": each.bring_up,
                "measurements": each.trials,
                "walltime_s": _range_data(each.seconds),
                "parts": each.parts(study.site.runtime_s),
            }
            for each in plan.allocations
        ],
        "cells": [_cell_data(cell) for cell in plan.cells],
    }


def _cell_data(cell: CellPlan) -> dict[str, Any]:
    return {
        "cell": cell.workload.cell,
        "outlook": cell.outlook.status,
        "why": cell.outlook.why,
        "trials": cell.trials,
        "missing": cell.missing,
        "bound_s_per_100_tokens": cell.bound_s,
        "expected_s_per_100_tokens": _range_data(cell.expected_s),
        "measured_s_per_100_tokens": cell.measured_s,
        "run_s": _range_data(cell.run_s),
    }


def _range_data(value: Range | None) -> dict[str, float] | None:
    return None if value is None else {"value": value.value, "low": value.low, "high": value.high}


_REVIEW_HEAD = (
    *("deployment", "trials", "predicted / measured", "error median / p90"),
    *("in 95% interval", "measured / lower bound"),
)
_REVIEW_NOTE = (
    "Seconds per 100 tokens; both ratios are medians. An error of 100% is a factor of 2, in either "
    "direction."
)


def render_review(name: str, reviews: Sequence[DeploymentReview]) -> str:
    """The review as text."""
    rows = [_REVIEW_HEAD, *map(_review_row, reviews)]
    lines = [
        f"Study {name}: predictions from published tables against the finished cells.",
        "",
        *_table(rows),
        "",
        _REVIEW_NOTE,
    ]
    for review in reviews:
        lines += [f"{review.deployment}: {each}" for each in review.surprises]
        if review.below_bound:
            lines.append(
                f"{review.deployment}: {pluralize(review.below_bound, 'trial')} faster than the "
                "lower bound. Check the kind of GPU, and that no prefix cache was on."
            )
    return "\n".join(lines) + "\n"


def _review_row(review: DeploymentReview) -> tuple[str, ...]:
    predicted = review.median_ratio is not None
    return (
        review.deployment,
        str(review.finished),
        f"{review.median_ratio:.2f}" if predicted else "-",
        f"{review.median:.1f}% / {review.p90:.1f}%" if predicted else "-",
        f"{review.covered} of {review.cells}" if predicted else "-",
        "-" if review.over_bound is None else f"{review.over_bound:.2f}",
    )


def review_json(name: str, reviews: Sequence[DeploymentReview]) -> str:
    """The review as JSON."""
    data = {"study": name, "deployments": [asdict(each) for each in reviews]}
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
