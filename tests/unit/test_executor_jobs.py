"""What the executor reads from Snakemake's jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.jobs import JobExecutorInterface

from snakemake_executor_plugin_submitit.jobs import (
    allocation_name,
    job_key,
    job_log,
    job_order,
    job_params,
    parse_arguments,
    to_json_data,
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


def test_snakemakes_arguments_are_parsed() -> None:
    command = "cd /x && /usr/bin/python3 -m snakemake --snakefile 'a b' --config c='{\"d\": 1}'"
    assert parse_arguments(command) == ("--snakefile", "a b", "--config", 'c={"d": 1}')


def test_a_key_depends_on_target_and_params_only() -> None:
    keys = {
        job_key(job()),
        job_key(job(target="measure:x=2")),
        job_key(job(params={"spec": "1"})),
        job_key(job(params={"spec": "2"})),
    }
    assert len(keys) == 4
    assert job_key(job(params={"spec": "1"})) == job_key(
        job(params={"spec": "1"}, resources={"runtime": 3}, log=["elsewhere"])
    )


def test_allocation_and_log() -> None:
    assert allocation_name(job(resources={"allocation": "a/b"})) == "a/b"
    assert allocation_name(job(resources={"allocation": ""})) is None
    assert allocation_name(job()) is None
    assert job_log(job(log=["logs/a.log", "logs/b.log"])) == str(Path("logs/a.log").absolute())
    assert job_log(job()) is None
    assert job_log(job(log=["a.log"], group=True)) is None
    assert job_params(job(params={"a": 1}, group=True)) == {}


def test_numbers_paths_and_containers_become_json_data() -> None:
    value = {
        "n": np.int64(3),
        "x": np.float64(0.5),
        "p": Path("a/b"),
        "t": (1, True, None),
        4: "four",
    }
    data = to_json_data(value, "here")
    assert data == {"n": 3, "x": 0.5, "p": "a/b", "t": [1, True, None], "4": "four"}
    assert [type(data[key]) for key in ("n", "x")] == [int, float]


def test_an_unsupported_type_is_refused_with_its_location() -> None:
    with pytest.raises(WorkflowError, match=r"measure: params\.table\.inner: a `object` cannot"):
        to_json_data({"inner": object()}, "measure: params.table")


def test_the_order_is_an_integer_and_0_by_default() -> None:
    assert job_order(job()) == 0
    assert job_order(job(resources={"order": np.int64(12)})) == 12
    for wrong in (-1, 10**6, "first", 1.5):
        with pytest.raises(WorkflowError, match=r"measure: resources\.order: .* is not an integer"):
            job_order(job(resources={"order": wrong}))
