"""The rules that analyse rerun when anything that they import or read from the package changes.

The digest of these files is a parameter of each rule.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import grimp
import pytest

from servegrid.study.expand import STUDY_TABLES

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "workflow" / "servegrid"
RULES = ROOT / "workflow" / "rules"


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("servegrid")


def functions(root: Path) -> dict[str, Any]:
    """The last functions in common.smk, for a checkout in `root`."""
    namespace: dict[str, Any] = {"Path": Path, "cache": cache, "hashlib": hashlib}
    namespace["workflow"] = type("Workflow", (), {"basedir": root})
    text = (RULES / "common.smk").read_text()
    exec(text[text.index("PACKAGES") :], namespace)
    return namespace


def package_files(name: str) -> set[Path]:
    return set(map(Path, functions(ROOT)["package_files"](name)))


def imported(graph: grimp.ImportGraph, script: str) -> set[str]:
    """The modules of the package that a script imports, itself or through others."""
    text = (ROOT / "workflow" / "scripts" / f"{script}.py").read_text()
    direct: set[str] = set()
    for module, names in re.findall(r"^from (servegrid[\w.]*) import (.+)$", text, re.MULTILINE):
        below = {f"{module}.{name.strip()}" for name in names.split(",")}
        direct |= {module} | (below & graph.modules)
    return direct.union(*(graph.find_upstream_modules(each) for each in direct))


def rules_with_package_files() -> dict[str, str]:
    found: dict[str, str] = {}
    for file in RULES.glob("*.smk"):
        for rule in re.split(r"(?m)^(?=rule )", file.read_text()):
            script = re.search(r'"../scripts/(\w+)\.py"', rule)
            package = re.search(r'params:\n +code=.*package_digest\("(\w+)"\)', rule)
            if rule.startswith("rule ") and script and package:
                found[script[1]] = package[1]
    return found


@pytest.mark.parametrize(
    "script",
    [
        "gather",
        "summarise",
        "tabulate",
        "plot",
        "findings",
        "plan_capacity",
        "render",
    ],
)
def test_a_rule_has_all_that_its_script_imports_as_input(
    graph: grimp.ImportGraph, script: str
) -> None:
    files = package_files(rules_with_package_files()[script])
    # `run.jobscript` only redirects the output of a script to its log.
    modules = imported(graph, script) - {"servegrid.run", "servegrid.run.jobscript"}
    paths = {
        path
        for module in modules
        for path in (
            PACKAGE.parent / f"{module.replace('.', '/')}.py",
            PACKAGE.parent / module.replace(".", "/") / "__init__.py",
        )
        if path.exists()
    }
    assert len(paths) > 5
    assert paths <= files


def test_data_files_of_the_package_are_inputs_as_well() -> None:
    files = package_files("report")
    assert PACKAGE / "reference" / "inria-2024.csv" in files
    assert PACKAGE / "report" / "page" / "template.html" in files
    assert PACKAGE / "study" / "schemas" / "study.yaml" in files


def test_a_changed_file_changes_the_digest_of_its_package_and_of_those_above(
    tmp_path: Path,
) -> None:
    for package in ("analysis", "report", "study"):
        folder = tmp_path / "workflow/servegrid" / package
        folder.mkdir(parents=True)
        (folder / "module.py").write_text("1", encoding="utf-8")

    def digests() -> list[str]:
        return [functions(tmp_path)["package_digest"](name) for name in ("analysis", "report")]

    analysis, report = digests()
    assert digests() == [analysis, report]
    (tmp_path / "workflow/servegrid/report/module.py").write_text("2", encoding="utf-8")
    assert digests()[0] == analysis
    assert digests()[1] != report
    (tmp_path / "workflow/servegrid/study/new.txt").write_text("3", encoding="utf-8")
    assert digests()[0] != analysis


def test_no_deployment_can_have_the_name_of_a_table_of_the_whole_study() -> None:
    """Two rules would write the same file."""
    texts = [file.read_text(encoding="utf-8") for file in RULES.glob("*.smk")]
    tables = {name for text in texts for name in re.findall(r'"results/tables/(\w+)\.', text)}
    assert len(tables) > 5
    assert tables == STUDY_TABLES
