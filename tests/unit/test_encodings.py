"""No file is read or written in the locale's encoding. Ruff's rule misses paths without a type."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for name in ("workflow", "plugin") for path in (ROOT / name).rglob("*.py")]
BINARY_MODULES = ("os", "tarfile", "zipfile", "webbrowser")
"""`open` of these modules is not for text files."""


def calls_without_encoding(source: str) -> Iterator[int]:
    """The lines that open a text file, or a pipe to a program, in the locale's encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if "encoding" not in given and _takes_text(node, given):
            yield node.lineno


def _takes_text(call: ast.Call, given: dict[str | None, ast.expr]) -> bool:
    if "text" in given or "universal_newlines" in given:
        return True
    match call.func:
        case ast.Attribute(value=ast.Name(id=module), attr="open") if module in BINARY_MODULES:
            return False
        case ast.Attribute(value=ast.Name(id="os"), attr="fdopen") | ast.Name(id="open"):
            mode = call.args[1:2]
        case ast.Attribute(attr="open"):
            mode = call.args[:1]
        case ast.Attribute(attr="read_text"):
            return True
        case ast.Attribute(attr="write_text"):
            return len(call.args) < 2
        case _:
            return False
    match given.get("mode", mode[0] if mode else None):
        case ast.Constant(value=str(text)):
            return "b" not in text
        case None:
            return True
    return False


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("path.read_text()", [1]),
        ("path.read_text(encoding='utf-8')", []),
        ("a = 1\npath.write_text(text)", [2]),
        ("path.open()", [1]),
        ("path.open('a')", [1]),
        ("path.open('rb', buffering=0)", []),
        ("open(path)", [1]),
        ("open(path, mode='wb')", []),
        ("os.open(path, os.O_RDONLY)", []),
        ("os.fdopen(descriptor, 'w')", [1]),
        ("subprocess.run(command, text=True)", [1]),
        ("subprocess.run(command, encoding='utf-8')", []),
    ],
)
def test_calls_without_an_encoding_are_found(source: str, found: list[int]) -> None:
    assert list(calls_without_encoding(source)) == found


def test_every_text_file_is_opened_with_an_encoding() -> None:
    assert len(SOURCES) > 100
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        for line in calls_without_encoding(path.read_text(encoding="utf-8"))
    ]
    assert found == []
