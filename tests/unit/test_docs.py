"""The generated documentation says what the code says."""

import importlib.util
from pathlib import Path

GENERATOR = Path(__file__).parents[2] / "docs" / "generate.py"


def test_generated_documents_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate", GENERATOR)
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    behind = [str(path) for path, text in generate.documents().items() if path.read_text() != text]
    assert behind == [], "run `make docs`"
