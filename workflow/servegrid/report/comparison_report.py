"""A comparison of two studies as Markdown and as a page. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources

import jinja2
import pandas as pd
from markupsafe import Markup

from servegrid.analysis.comparison import FALSE_DISCOVERIES, INDIFFERENT, Comparison, Ratio, power
from servegrid.report import forest_plot
from servegrid.report.markup import as_markdown, bullets

MOST_LEFT_OUT = 20

METHOD = (
    "Ratio: output tokens/s of the second study / of the first, with its 95% interval. A "
    "deployment is tested by Student's t over its cells' ratios, a cell by Welch's t over its "
    f"trials, if it has two or more in both. A change of up to {INDIFFERENT:.0%} counts as none: "
    "another bring-up makes as much. Of all verdicts, on average at most "
    f"{FALSE_DISCOVERIES:.0%} are wrong (Benjamini and Hochberg). Each deployment was brought up "
    "once or a few times in a study: what differs between bring-ups by more than that is taken for "
    "a difference."
)


def markdown(names: Sequence[str], found: Comparison) -> str:
    """The comparison as Markdown; `names` are those of the two studies."""
    blocks = [f"# {names[1]} against {names[0]}", METHOD, *(f"**{each}**" for each in found.notes)]
    for title, table in _tables(found).items():
        blocks += [f"## {title}", as_markdown(table).rstrip()]
    return "\n\n".join([*blocks, *_left_out(found)]) + "\n"


def page(names: Sequence[str], found: Comparison) -> str:
    """The same as a page that opens offline."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    folder = resources.files("servegrid.report.page")
    return environment.from_string(_TEMPLATE).render(
        title=f"{names[1]} against {names[0]}",
        style=Markup((folder / "style.css").read_text(encoding="utf-8")),
        method=METHOD,
        notes=found.notes,
        figure=Markup(forest_plot.svg(found.deployments, INDIFFERENT)),
        tables=_tables(found),
        left_out=found.left_out,
    )


def _tables(found: Comparison) -> Mapping[str, pd.DataFrame]:
    shown = {"Deployments": pd.DataFrame([_row(each, "cells") for each in found.deployments])}
    shown["What would be found in four of five cases"] = pd.DataFrame(
        [
            {"deployment": name}
            | {
                f"slow-down, with {trials} trial{'s' * (trials > 1)}": "–"
                if least is None
                else f"{least:.1%}"
                for trials, least in by_trials.items()
            }
            for name, by_trials in power(found).items()
        ]
    )
    cells: dict[str, list[dict[str, str]]] = {}
    for each in found.cells:
        deployment, _, workload = each.name.partition(", ")
        cells.setdefault(deployment, []).append(_row(each, "trials", workload))
    return shown | {f"Cells of {name}": pd.DataFrame(rows) for name, rows in cells.items()}


def _row(each: Ratio, counted: str, workload: str | None = None) -> dict[str, str]:
    around = "" if each.low is None else f" [{each.low:.3f}, {each.high:.3f}]"
    return {
        "deployment" if workload is None else "workload": workload or each.name,
        counted: str(each.count),
        "ratio": f"{each.ratio:.3f}{around}",
        "p": "–" if each.p is None else f"{each.p:.2g}",
        "verdict": each.verdict,
    }


def _left_out(found: Comparison) -> list[str]:
    if not found.left_out:
        return []
    more = len(found.left_out) - MOST_LEFT_OUT
    lines = [*found.left_out[:MOST_LEFT_OUT], *([f"and {more} more"] if more > 0 else [])]
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
<figcaption>Output tokens/s of the second study / of the first, per deployment, with 95% intervals;
logarithmic. In the grey band a change counts as none.</figcaption>
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
