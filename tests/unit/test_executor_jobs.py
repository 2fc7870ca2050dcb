"""What is read from Snakemake's jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.jobs import JobExecutorInterface

from snakemake_executor_plugin_submitit.jobs import (
    allocation_of,
    argv_of,
    job_order,
    key_of,
    log_of,
    params_of,
    plain,
)


class FakeJob:
    def __init__(self, **properties: Any) -> None:
        self.name = "measure"
        self.params = properties.get("params", {})
        self.resources = properties.get("resources", {})
        self.log = properties.get("log", [])
        self.target = properties.get("target", "measure:x=1")
        self.group = properties.get("group", False)

    def is_group(self) -> bool:
        return bool(self.group)

    def get_target_spec(self) -> str:
        return str(self.target)


def job(**properties: Any) -> JobExecutorInterface:
    return cast(JobExecutorInterface, FakeJob(**properties))


def test_arguments_after_the_module() -> None:
    command = "cd /x && /usr/bin/python3 -m snakemake --snakefile 'a b' --config c='{\"d\": 1}'"
    assert argv_of(command) == ("--snakefile", "a b", "--config", 'c={"d": 1}')


def test_a_key_stands_for_target_and_params() -> None:
    keys = {
        key_of(job()),
        key_of(job(target="measure:x=2")),
        key_of(job(params={"spec": "1"})),
        key_of(job(params={"spec": "2"})),
    }
    assert len(keys) == 4
    assert key_of(job(params={"spec": "1"})) == key_of(
        job(params={"spec": "1"}, resources={"runtime": 3}, log=["elsewhere"])
    )


def test_allocation_and_log() -> None:
    assert allocation_of(job(resources={"allocation": "a/b"})) == "a/b"
    assert allocation_of(job(resources={"allocation": ""})) is None
    assert allocation_of(job()) is None
    assert log_of(job(log=["logs/a.log", "logs/b.log"])) == str(Path("logs/a.log").absolute())
    assert log_of(job()) is None
    assert log_of(job(log=["a.log"], group=True)) is None
    assert params_of(job(params={"a": 1}, group=True)) == {}


def test_plain_data_of_numbers_paths_and_containers() -> None:
    value = {
        "n": np.int64(3),
        "x": np.float64(0.5),
        "p": Path("a/b"),
        "t": (1, True, None),
        4: "four",
    }
    data = plain(value, "here")
    assert data == {"n": 3, "x": 0.5, "p": "a/b", "t": [1, True, None], "4": "four"}
    assert [type(data[key]) for key in ("n", "x")] == [int, float]


def test_what_is_not_plain_is_refused_by_place() -> None:
    with pytest.raises(WorkflowError, match=r"measure: params\.table\.inner: `object` cannot"):
        plain({"inner": object()}, "measure: params.table")


def test_a_turn_is_a_number_and_0_where_none_is_given() -> None:
    assert job_order(job()) == 0
    assert job_order(job(resources={"order": np.int64(12)})) == 12
    for wrong in (-1, 10**6, "first", 1.5):
        with pytest.raises(WorkflowError, match=r"measure: resources\.order: .* is not a number"):
            job_order(job(resources={"order": wrong}))
