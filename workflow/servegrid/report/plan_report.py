"""The plan of a study, and its review, as text and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from servegrid.analysis.capacity import HardwarePrices
from servegrid.analysis.feasibility import CANNOT, FITS, GIB, QUEUES, UNKNOWN
from servegrid.analysis.plan import CellPlan, DeploymentPlan, Range, StudyPlan
from servegrid.analysis.review import DeploymentReview
from servegrid.study.few_requests import describe_few_requests
from servegrid.study.text import pluralize

MAX_EVIDENCE = 2
"""So many reasons of a deployment are shown, unless all cells are."""
_MARKS = {FITS: " ", QUEUES: "q", CANNOT: "x", UNKNOWN: "?"}
_HEAD = ("deployment", "GiB/GPU", "KV tokens", "fit", "queue", "can't", "done", "GPU-h", "hours")


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
    missing = sum(cell.missing for cell in plan.cells)
    hours = [each.seconds for each in plan.allocations]
    return (
        plan.deployment.name,
        weights,
        "?" if plan.kv_tokens is None else f"{max(0.0, plan.kv_tokens):,.0f}",
        *(str(counts[status]) for status in (FITS, QUEUES, CANNOT)),
        str(sum(cell.trials for cell in plan.cells) - missing),
        _interval(plan.gpu_hours) if plan.allocations else "-",
        " + ".join("?" if each is None else _interval(each * (1 / 3600)) for each in hours) or "-",
    )


def _totals(plan: StudyPlan, prices: HardwarePrices) -> Iterator[str]:
    known = [each for each in plan.deployments if each.gpu_hours is not None]
    rest = len(plan.deployments) - len(known)
    unknown = f", without {pluralize(rest, 'deployment')} that are not predicted" if rest else ""
    hours = _sum(each.gpu_hours for each in known)
    if any(each.deployment.gpu_count for each in plan.deployments):
        yield f"GPU-hours: {_interval(hours)} (95% interval){unknown}."
    else:
        yield f"GPU-hours: 0, because no deployment has a GPU{unknown}."
    if energy := _sum(each.energy_kwh for each in known):
        yield f"Energy of the GPUs: {_interval(energy)} kWh, at 70% (40 to 100%) of their limits."
    if cost := _sum(each.cost(prices) for each in known):
        yield (
            f"Cost: {_interval(cost)} {prices.currency}: electricity, and the GPUs' price over "
            f"{prices.years_in_use:g} years."
        )


def _sum(ranges: Iterable[Range | None]) -> Range | None:
    known = [each for each in ranges if each is not None]
    return sum(known[1:], known[0]) if known else None


def _block(plan: DeploymentPlan, study: StudyPlan, all_cells: bool) -> Iterator[str]:
    yield f"{plan.deployment.name}  (model: {plan.source})"
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
    if plan.search is not None:
        yield (
            f"  the search will measure about {len(plan.search)} of {len(plan.cells)} cells: "
            "hours, energy and cost are for these"
        )
    for each in plan.allocations:
        if (parts := each.parts(study.site.runtime_s)) > 1 and study.site.runtime_s:
            yield (
                f"  bring-up {each.bring_up} may need {parts} allocations of "
                f"{study.site.runtime_s / 3600:g} h"
            )
    if few := describe_few_requests(cell.workload for cell in plan.cells if cell.missing):
        yield f"  {few}"
    if plan.teach:
        yield f"  cells that teach most: {', '.join(plan.teach)}"
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
    usable = "" if plan.kv_tokens is None else f" of {placement.usable / GIB:.1f} usable"
    yield (
        f"  weights: {placement.weights / GIB:.1f} GiB{per_gpu}{usable}; KV cache: "
        f"{shape.kv_bytes_per_token / 1024:g} KiB per token"
        + (
            ""
            if plan.kv_tokens is None
            else f", {max(0.0, plan.kv_tokens):,.0f} tokens in requests of "
            f"{plan.deployment.max_model_len}"
        )
    )


def _origin(plan: DeploymentPlan) -> str:
    own = f", and {pluralize(plan.observed, 'measured cell')} of its own" if plan.observed else ""
    text = f"published tables{own}"
    if plan.labels:
        text += f". They have no data of {', '.join(plan.labels)}: the intervals are wide"
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
        load_title = "rate / rate at saturation" if swept else "load"
        loads = sorted({load for load, _ in cells})
        prompts = sorted({prompt for _, prompt in cells})
        yield (
            f"  {protocol}, {length} output tokens: seconds per 100 tokens, × ÷ "
            f"{_typical_factor(cells.values()):.2g}; rows: {load_title}, columns: prompt "
            "tokens"
        )
        rows = [["", *map(str, prompts)]]
        for load in loads:
            row = [cells.get((load, prompt)) for prompt in prompts]
            rows.append([f"{load:g}", *("" if each is None else _value(each) for each in row)])
        yield from (f"    {line}" for line in _table(rows))
    yield "    q: will queue, x: cannot work, *: measured"


def _typical_factor(cells: Iterable[CellPlan]) -> float:
    """The median ratio of the interval's upper end to the expected value."""
    ratios = sorted(
        cell.expected_s.high / cell.expected_s.value for cell in cells if cell.expected_s
    )
    return ratios[len(ratios) // 2] if ratios else float("nan")


def _value(cell: CellPlan) -> str:
    done = "*" if not cell.missing else ""
    value = "" if cell.expected_s is None else f"{cell.expected_s.value:.3g}"
    return f"{value}{_MARKS[cell.outlook.status].strip()}{done}"


def _cell_lines(plan: DeploymentPlan) -> Iterator[str]:
    head = ("cell", "outlook", "bound", "expected (95% interval)", "missing", "why")
    yield "  seconds per 100 tokens:"
    rows = [
        (
            cell.workload.cell,
            cell.outlook.status,
            "-" if cell.bound_s is None else f"{cell.bound_s:.3g}",
            "-" if cell.expected_s is None else _interval(cell.expected_s),
            f"{cell.missing}/{cell.trials}",
            cell.outlook.why or "",
        )
        for cell in plan.cells
    ]
    yield from (f"    {line}" for line in _table([head, *rows]))


def _interval(value: Range | None) -> str:
    if value is None:
        return "?"
    if value.low == value.high:
        return f"{value.value:.3g}"
    return f"{value.value:.3g} ({value.low:.3g} to {value.high:.3g})"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns, the first one to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if not column or column == len(widths) - 1 else cell.rjust(width)
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
        "run_s": _range_data(cell.run_s),
    }


def _range_data(value: Range | None) -> dict[str, float] | None:
    return None if value is None else {"value": value.value, "low": value.low, "high": value.high}


_REVIEW_HEAD = (
    *("deployment", "cells", "predicted / measured", "error median / p90"),
    *("in interval", "measured / bound"),
)


def render_review(name: str, reviews: Sequence[DeploymentReview]) -> str:
    """The review as text."""
    rows = [_REVIEW_HEAD, *map(_review_row, reviews)]
    lines = [
        f"Study {name}: predictions from published tables against the finished cells.",
        "",
        *_table(rows),
    ]
    for review in reviews:
        lines += [f"  {review.deployment}: {each}" for each in review.surprises]
        if review.below_bound:
            lines.append(
                f"  {review.deployment}: {pluralize(review.below_bound, 'cell')} faster than the "
                "bound. Check the kind of GPU, and that no prefix cache was on."
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
