"""The generated documentation says what the code says."""

import importlib.util
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
GENERATOR = ROOT / "docs" / "generate.py"


def test_generated_documents_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate", GENERATOR)
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    behind = [str(path) for path, text in generate.documents().items() if path.read_text() != text]
    assert behind == [], "run `make docs`"


def test_the_conda_environment_has_the_packages_of_the_list() -> None:
    environment = yaml.safe_load((ROOT / "workflow/envs/cpu.yaml").read_text())
    pip = environment["dependencies"][-1]["pip"]
    assert pip == (ROOT / "workflow/envs/cpu.txt").read_text().splitlines()
