"""The comparison of two studies as Markdown and as an HTML page. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources

import jinja2
import pandas as pd
from markupsafe import Markup

from servegrid.analysis.comparison import (
    ASSUMED_STDEV,
    FALSE_DISCOVERY_RATE,
    MIN_BRING_UPS,
    MIN_EFFECT,
    Comparison,
    Ratio,
    power_analysis,
)
from servegrid.report.forest_plot import MAX_RATIO, forest_plot_svg
from servegrid.report.markup import as_markdown, bullets
from servegrid.study.text import pluralize

MAX_LEFT_OUT = 20
"""Maximum number of cells that Markdown lists as left out."""

METHOD = (
    "Ratio: output tokens/s of the second study divided by the first, with its 95% interval. At a "
    "request rate, and if users think, the users decide on the tokens/s of all requests: there, "
    "they are those of one request, with its time to first token. The unit of the tests is the "
    "bring-up: all cells and trials of one start of the engine share its "
    "node and its memory, so they are one sample. Deployments and cells are tested with "
    f"Student's t over their bring-ups. Changes of up to {MIN_EFFECT:.0%} count as no change. On "
    f"average, at most {FALSE_DISCOVERY_RATE:.0%} of the verdicts are wrong (false discovery rate, "
    "Benjamini and Hochberg)."
)

FIGURE_CAPTION = (
    "Output tokens/s of the second study divided by the first, per deployment, with 95% intervals; "
    f"logarithmic axis. Changes inside the grey band count as no change. Ratios beyond "
    f"1/{MAX_RATIO:g} and {MAX_RATIO:g} are drawn at the edge."
)

NOT_TESTED_NOTE = (
    f"Not tested: a study with fewer than {MIN_BRING_UPS} bring-ups cannot show how much bring-ups "
    "of the same deployment differ. For a verdict, set `bring_ups: 3` under `workload` in both "
    "studies and run them again. Only the new bring-ups are measured."
)

_POWER = "Smallest slowdown that the test detects with a power of 80%"


def render_comparison_markdown(names: Sequence[str], comparison: Comparison) -> str:
    """The comparison as Markdown. `names` are the names of the two studies."""
    blocks = [f"# {names[1]} compared with {names[0]}", METHOD]
    blocks += [f"**{note}**" for note in _notes(comparison)]
    for title, table in _tables(comparison).items():
        blocks += [f"## {title}", as_markdown(table).rstrip()]
    return "\n\n".join([*blocks, *_left_out(comparison)]) + "\n"


def render_comparison_page(names: Sequence[str], comparison: Comparison) -> str:
    """The comparison as an HTML page that needs no network."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    folder = resources.files("servegrid.report.page")
    return environment.from_string(_TEMPLATE).render(
        title=f"{names[1]} compared with {names[0]}",
        style=Markup((folder / "style.css").read_text(encoding="utf-8")),
        method=METHOD,
        notes=_notes(comparison),
        figure=Markup(forest_plot_svg(comparison.deployments, MIN_EFFECT)),
        caption=FIGURE_CAPTION,
        tables=_tables(comparison),
        left_out=comparison.left_out,
    )


def _notes(comparison: Comparison) -> list[str]:
    untested = any(each.p is None for each in comparison.deployments)
    return [*comparison.notes, *([NOT_TESTED_NOTE] if untested else [])]


def _tables(comparison: Comparison) -> Mapping[str, pd.DataFrame]:
    tables = {
        "Deployments": pd.DataFrame([_row(each) for each in comparison.deployments]),
        _POWER: _power_table(comparison),
    }
    cells: dict[str, list[dict[str, str]]] = {}
    for each in comparison.cells:
        deployment, _, workload = each.name.partition(", ")
        cells.setdefault(deployment, []).append(_row(each, workload))
    return tables | {f"Cells of {name}": pd.DataFrame(rows) for name, rows in cells.items()}


def _power_table(comparison: Comparison) -> pd.DataFrame:
    power = power_analysis(comparison)
    return pd.DataFrame(
        [
            {
                "deployment": each.name,
                "standard deviation between bring-ups": f"{ASSUMED_STDEV:.1%} (assumed)"
                if each.stdev is None
                else f"{each.stdev:.1%}",
            }
            | {
                f"with {pluralize(count, 'bring-up')}": "–"
                if slowdown is None
                else f"{slowdown:.1%}"
                for count, slowdown in power[each.name].items()
            }
            for each in comparison.deployments
        ]
    )


def _row(each: Ratio, workload: str | None = None) -> dict[str, str]:
    interval = "" if each.low is None else f" [{each.low:.3f}, {each.high:.3f}]"
    return {
        "deployment" if workload is None else "workload": workload or each.name,
        "bring-ups (the fewer)": str(each.count),
        "ratio [95% interval]": f"{each.ratio:.3f}{interval}",
        "p": "–" if each.p is None else f"{each.p:.2g}",
        "verdict": each.verdict,
    }


def _left_out(comparison: Comparison) -> list[str]:
    if not comparison.left_out:
        return []
    more = len(comparison.left_out) - MAX_LEFT_OUT
    lines = [*comparison.left_out[:MAX_LEFT_OUT], *([f"and {more} more"] if more > 0 else [])]
    return ["## Left out", bullets(lines).rstrip()]


_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} · servegrid</title>
<link rel="icon" href="data:,">
<style>{{ style }}</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for note in notes %}<p class="mark">{{ note }}</p>
{% endfor %}<p>{{ method }}</p>
<figure>
{{ figure }}
<figcaption>{{ caption }}</figcaption>
</figure>
{% for name, table in tables.items() %}
<section>
<h2>{{ name }}</h2>
<div class="wide" tabindex="0" role="region" aria-label="{{ name }}">
<table class="figures">
<thead><tr>{% for head in table.columns %}<th scope="col">{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.itertuples(index=False) %}<tr>
{%- for cell in row %}{% if loop.first %}<th scope="row">{{ cell }}</th>
{%- else %}<td>{{ cell }}</td>{% endif %}{% endfor %}</tr>
{% endfor %}</tbody>
</table>
</div>
</section>
{% endfor %}
{% if left_out %}<section><h2>Left out</h2>
<ul>{% for line in left_out %}<li>{{ line }}</li>{% endfor %}</ul></section>{% endif %}
</body>
</html>
"""
