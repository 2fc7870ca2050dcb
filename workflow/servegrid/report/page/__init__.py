"""The page of a study: one HTML file that opens without a network and shows all results.

The charts are Vega-Lite specifications in charts/. The libraries that draw them come from the
package `vl-convert-python`. The file contains all data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from servegrid import __version__

VEGALITE = "6.4"
LONGEST_NUMBER = 40
"""Maximum characters of a number with its interval; more are a text that starts with a number."""


@dataclass(frozen=True)
class SectionTable:
    """A table of a section. Its rows are texts. `note` says if rows are left out."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @property
    def text_columns(self) -> set[int]:
        """The columns with a text in at least one row. They are left-aligned."""
        return {
            index
            for row in self.rows
            for index, cell in enumerate(row)
            if cell[:1].isalpha() or len(cell) > LONGEST_NUMBER
        }


@dataclass(frozen=True)
class Section:
    """A section below the charts: paragraphs, a list, and tables."""

    id: str
    title: str
    paragraphs: Sequence[str] = ()
    points: Sequence[str] = ()
    tables: Sequence[SectionTable] = ()


@dataclass(frozen=True)
class FormField:
    """An assumption that the reader can change.

    With `choices` (pairs of value and label), the field is a list to select from. A field that is
    not `required` may be empty.
    """

    name: str
    label: str
    value: Any
    minimum: float = 0
    maximum: float | None = None
    step: str = "any"
    required: bool = True
    choices: Sequence[tuple[Any, str]] = ()


@dataclass(frozen=True)
class PageTexts:
    """The sentences of the page that depend on where the data come from.

    `basis` has what the capacity plan rests on, as `capacity_basis.describe_basis` returns it.
    """

    summary: str
    reset: str
    footer: str
    basis: Mapping[str, Sequence[str]]


def render_html(
    payload: Mapping[str, Any],
    texts: PageTexts,
    fields: Sequence[FormField],
    sections: Sequence[Section],
    files: Sequence[tuple[str, str]],
) -> str:
    """The page as HTML. The same arguments give the same bytes.

    `files` are pairs of a relative path and what the file contains.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    links = [
        ("answer", "Capacity"),
        ("workloads", "Workloads"),
        *((section.id, section.title) for section in sections),
        *([("tables", "Files")] if files else []),
    ]
    return environment.from_string(_read("template.html")).render(
        payload=payload,
        payload_json=_script_json(dict(payload) | {"charts": chart_specs()}),
        texts=texts,
        fields=fields,
        links=links,
        sections=sections,
        files=files,
        version=__version__,
        style=Markup(_read("style.css")),
        library=Markup(_library()),
        planner=Markup(_read("planner.js")),
        script=Markup(_read("page.js")),
    )


@cache
def chart_specs() -> dict[str, Any]:
    """The Vega-Lite specifications by name. page.js adds the data."""
    folder = resources.files(__package__) / "charts"
    return {
        file.name.removesuffix(".vl.json"): json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(folder.iterdir(), key=lambda each: each.name)
        if file.name.endswith(".vl.json")
    }


@cache
def _library() -> str:
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGALITE)
    return f"(() => {{ {bundle} }})();"


def _script_json(data: Any) -> Markup:
    """JSON for a script element. `<` is escaped, so that no name can end the element."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _read(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
