"""The generated documentation matches the code."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GENERATOR = ROOT / "docs" / "generate.py"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", GENERATOR)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_documents_are_up_to_date(generate: ModuleType) -> None:
    outdated = [
        str(path) for path, text in generate.documents().items() if path.read_text() != text
    ]
    assert outdated == [], "run `make docs`"


def test_a_missing_mark_is_an_error(generate: ModuleType) -> None:
    text = (ROOT / "config/README.md").read_text()
    with pytest.raises(ValueError, match="generated: slo --> is missing"):
        generate.render_config_readme(text.replace("<!-- generated: slo -->", ""))


def test_the_conda_environment_has_the_packages_of_the_list() -> None:
    environment = yaml.safe_load((ROOT / "workflow/envs/cpu.yaml").read_text())
    pip = environment["dependencies"][-1]["pip"]
    assert pip == (ROOT / "workflow/envs/cpu.txt").read_text().splitlines()
