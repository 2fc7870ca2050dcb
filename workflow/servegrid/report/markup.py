"""Tables for people: Markdown and LaTeX of frames whose cells are texts. Pure but for `write`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from servegrid.records import parquet

LATEX_HEAD = "% Needs \\usepackage{booktabs}.\n"


def as_markdown(table: pd.DataFrame) -> str:
    """A Markdown table, its first column to the left, the others to the right."""
    head = [str(name) for name in table.columns]
    rows = [[str(cell) for cell in row] for row in table.itertuples(index=False)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def as_latex(table: pd.DataFrame, caption: str, label: str) -> str:
    """A LaTeX table with booktabs' rules; what LaTeX would take for its own is escaped."""
    plain = table.rename(columns=str).map(_plain).rename(columns=_plain)
    styled = plain.style.format(escape="latex").format_index(axis="columns", escape="latex")
    text: str = styled.hide(axis="index").to_latex(
        hrules=True,
        caption=_escaped(caption),
        label=label,
        position_float="centering",
        column_format="l" + "r" * (len(table.columns) - 1),
    )
    return LATEX_HEAD + text


def write(texts: Mapping[Path, str]) -> None:
    """Write each text whole or not at all. Raises RecordError where that is not possible."""
    for path, text in texts.items():
        with parquet.written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def bullets(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _plain(text: object) -> str:
    """Without signs that LaTeX's usual fonts lack."""
    return str(text).replace("×", "x").replace("–", "--").replace("·", ",").replace("≥", ">=")


def _escaped(text: str) -> str:
    styled = pd.DataFrame({"text": [_plain(text)]}).style.format(escape="latex")
    return (
        str(styled.hide(axis="index").hide(axis="columns").to_latex()).split("\n")[1].strip(" \\")
    )
