"""The page of a study: one HTML file that opens offline and says what the study found.

The charts are Vega-Lite specifications in charts/, drawn by the libraries that `vl-convert-python`
carries; all data is in the file.
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


@dataclass(frozen=True)
class Table:
    """A table of the page: its rows are texts, `left_out` says what has no row in it."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left_out: str = ""


@dataclass(frozen=True)
class Part:
    """A section of the page below the figures."""

    id: str
    title: str
    texts: Sequence[str] = ()
    points: Sequence[str] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Field:
    """An assumption that can be changed in the page. `choices` are its values and their texts, if
    it has but these; one that is not `needed` may be left empty."""

    name: str
    label: str
    value: Any
    least: float = 0
    most: float | None = None
    step: str = "any"
    needed: bool = True
    choices: Sequence[tuple[Any, str]] = ()


def render(
    payload: Mapping[str, Any],
    counts_text: str,
    fields: Sequence[Field],
    parts: Sequence[Part],
    files: Sequence[tuple[str, str]],
) -> str:
    """The page as text. The same arguments give the same bytes."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    sections = [
        ("answer", "Answer"),
        ("loads", "Loads"),
        *((part.id, part.title) for part in parts),
        ("tables", "Tables"),
    ]
    return environment.from_string(_text("template.html")).render(
        payload=payload,
        payload_json=_in_script(dict(payload) | {"charts": charts()}),
        counts_text=counts_text,
        fields=fields,
        sections=sections,
        parts=parts,
        files=files,
        version=__version__,
        style=_safe(_text("style.css")),
        library=_safe(_library()),
        planner=_safe(_text("planner.js")),
        script=_safe(_text("page.js")),
    )


@cache
def charts() -> dict[str, Any]:
    """The Vega-Lite specifications by name; their data is given when they are drawn."""
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


def _in_script(data: Any) -> Markup:
    """JSON that can stand in a script element, whatever names a study has chosen."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return _safe(text.replace("<", "\\u003c"))


def _safe(text: str) -> Markup:
    return Markup(text)


def _text(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
