"""The plugin's documentation explains every setting, resource and key of a kind."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from snakemake_executor_plugin_submitit import ExecutorSettings, submission
from snakemake_executor_plugin_submitit.kinds import KIND_KEYS

TEXT = (Path(__file__).parents[2] / "plugin" / "docs" / "further.md").read_text()


def table(title: str) -> dict[str, str]:
    """The cells of a section's table behind the first one, by the names in the first one."""
    section = TEXT.partition(f"\n# {title}\n")[2].partition("\n# ")[0] or TEXT
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", section, flags=re.MULTILINE)
    return {name: cells for names, cells in rows for name in re.findall("`(.*?)`", names)}


def test_every_setting_is_explained() -> None:
    explained = {name.removeprefix("--submitit-") for name in table("Settings")}
    assert explained == {field.name.replace("_", "-") for field in fields(ExecutorSettings)}


@pytest.mark.parametrize(("setting", "default"), [("idle-timeout", 15), ("folder", "`.snakemake")])
def test_defaults_are_those_of_the_settings(setting: str, default: object) -> None:
    assert f"| {default}" in table("Settings")[f"--submitit-{setting}"]


def test_every_resource_is_explained() -> None:
    explained = set(table("Resources of a job"))
    read = {"allocation", "order", "kind", "environment", "runtime", "gpus", "mem_mb"}
    read |= {"expected_s", "expected_start_s"}
    assert read | set(submission._COPIED_RESOURCES) == explained


def test_every_key_of_a_kind_is_explained() -> None:
    rows = table("Kinds of nodes")
    assert list(rows) == list(KIND_KEYS)
    for name, key in KIND_KEYS.items():
        assert rows[name].endswith(f" | {key.meaning}")


def test_every_key_of_the_progress_is_explained() -> None:
    from snakemake_executor_plugin_submitit.progress import Progress

    assert list(table("Progress for logger plugins")) == list(Progress("a", "b", "c").to_dict())
