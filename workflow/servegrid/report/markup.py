"""Markdown and LaTeX tables from frames whose cells are texts. Pure, except `write_texts`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from servegrid.records import parquet

LATEX_HEAD = "% Needs \\usepackage{booktabs}.\n"


def as_markdown(table: pd.DataFrame) -> str:
    """A Markdown table. The first column is left-aligned, the others are right-aligned."""
    head = [str(name) for name in table.columns]
    rows = [[str(cell) for cell in row] for row in table.itertuples(index=False)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def as_latex(table: pd.DataFrame, caption: str, label: str) -> str:
    """A LaTeX table with booktabs rules. LaTeX's special characters are escaped."""
    plain = table.rename(columns=str).map(_replace_symbols).rename(columns=_replace_symbols)
    styled = plain.style.format(escape="latex").format_index(axis="columns", escape="latex")
    text: str = styled.hide(axis="index").to_latex(
        hrules=True,
        caption=_escape_latex(caption),
        label=label,
        position_float="centering",
        column_format="l" + "r" * (len(table.columns) - 1),
    )
    return LATEX_HEAD + text


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write each text to its path. A file is either complete or not written.

    Raises RecordError if a file cannot be written.
    """
    for path, text in texts.items():
        with parquet.atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def bullets(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _replace_symbols(text: object) -> str:
    """Replace the symbols that LaTeX's usual fonts do not have."""
    return str(text).replace("×", "x").replace("–", "--").replace("·", ",").replace("≥", ">=")


def _escape_latex(text: str) -> str:
    styled = pd.DataFrame({"text": [_replace_symbols(text)]}).style.format(escape="latex")
    return (
        str(styled.hide(axis="index").hide(axis="columns").to_latex()).split("\n")[1].strip(" \\")
    )
