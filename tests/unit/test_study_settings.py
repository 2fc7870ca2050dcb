"""Sweeps over settings of an engine, and what each setting is worth."""

from __future__ import annotations

import copy
import re
from typing import Any

import pandas as pd
import pytest

from servegrid.analysis.setting_comparison import compare_settings
from servegrid.analysis.tables import cast_columns
from servegrid.errors import ConfigError
from servegrid.records import columns
from servegrid.study.config import parse_study
from servegrid.study.settings import swept_settings

STUDY: dict[str, Any] = {
    "study": "settings",
    "workload": {"concurrency": 4, "input_len": 31},
    "deployments": [
        {
            "model": "small",
            "checkpoint": "models/small",
            "quantization": "fp16",
            "engine": "vllm",
            "gpu": "a100-40gb",
            "max_model_len": 512,
        }
    ],
}
NAME = "small_fp16_vllm_1xa100-40gb"


def study_with(sweep: Any, **keys: Any) -> dict[str, Any]:
    study = copy.deepcopy(STUDY)
    study["deployments"][0] |= {"sweep": sweep, **keys}
    return study


def test_each_combination_is_a_deployment_with_a_readable_name() -> None:
    study = study_with({"max_num_seqs": [16, 64], "enable_chunked_prefill": [True, False]})
    found = parse_study(study).deployments
    assert [each.name for each in found] == [
        f"{NAME}_max_num_seqs-16_enable_chunked_prefill-on",
        f"{NAME}_max_num_seqs-16_enable_chunked_prefill-off",
        f"{NAME}_max_num_seqs-64_enable_chunked_prefill-on",
        f"{NAME}_max_num_seqs-64_enable_chunked_prefill-off",
    ]
    last = found[-1]
    assert (last.max_num_seqs, last.engine_args) == (64, {"enable_chunked_prefill": False})
    assert swept_settings(study)[last.name] == (
        NAME,
        {"max_num_seqs": 64, "enable_chunked_prefill": False},
    )
    assert swept_settings(STUDY) == {}


def test_tensor_parallel_size_sets_the_number_of_gpus() -> None:
    study = study_with({"tensor_parallel_size": [1, 2]}, engine_args={"data_parallel_size": 2})
    found = parse_study(study).deployments
    assert [(each.gpu_count, each.parallelism.tensor) for each in found] == [(2, 1), (4, 2)]
    assert found[1].name == "small_fp16_vllm_4xa100-40gb_tensor_parallel_size-2"
    on_cpu = study_with({"tensor_parallel_size": [1, 2]}, gpu="cpu")
    assert [each.engine_args for each in parse_study(on_cpu).deployments] == [
        {"tensor_parallel_size": 1},
        {"tensor_parallel_size": 2},
    ]


@pytest.mark.parametrize(
    ("sweep", "keys", "message"),
    [
        ({"max_num_seqs": []}, {}, "deployments[0].sweep.max_num_seqs: the list is empty."),
        ({}, {}, "deployments[0].sweep: "),
        ({"max_num_seq": [1]}, {}, "unknown setting `max_num_seq`. Did you mean `max_num_seqs`?"),
        ({"model": ["a"]}, {}, "`model` is no setting of the engine. Write one deployment per"),
        ({"max_num_seqs": [1, 1]}, {}, "contains a duplicate"),
        ({"block_size": [16, "16"]}, {}, f"the name `{NAME}_block_size-16` is already that of"),
        ({"max_num_seqs": [1]}, {"max_num_seqs": 2}, "sets `max_num_seqs` itself too"),
        ({"block_size": [1]}, {"engine_args": {"block_size": 2}}, "sets `block_size` itself too"),
        ({"tensor_parallel_size": [1]}, {"gpu_count": 2}, "Remove `gpu_count`."),
        ({"max_num_seqs": 8}, {}, "deployments[0].sweep.max_num_seqs: 8 is not a list"),
        ({"max num": [8]}, {}, "'max num' is not a name"),
        ({"max_num_seqs": [0]}, {}, "sweep.max_num_seqs: 0 is not a whole number of at least 1."),
        ({"max_num_seqs": [True]}, {}, "max_num_seqs: True is not a whole number of at least 1."),
        ({"max_num_seqs": [16.0]}, {}, "max_num_seqs: 16.0 is not a whole number"),
        ({"replicas": ["2"]}, {"gpu_count": 2}, "sweep.replicas: '2' is not a whole number"),
        ({"replicas": [1, "all"]}, {}, "sweep.replicas: 'all' is not a whole number"),
        ({"tensor_parallel_size": ["a"]}, {}, "tensor_parallel_size: 'a' is not a whole number"),
        ({"pipeline_parallel_size": [0]}, {}, "pipeline_parallel_size: 0 is not a whole number"),
        ({"dtype": ["half" * 50]}, {}, "has 234 characters, and at most 180 are possible"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(
    sweep: Any, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_study(study_with(sweep, **keys))


def cells(speeds: dict[str, list[float]]) -> pd.DataFrame:
    """One cell per deployment, whose bring-ups have these speeds."""
    rows = [
        {
            "deployment": name,
            "model": "m",
            "quantization": "q",
            "gpu": "cpu",
            "gpu_count": 0,
            "engine": "vllm",
            "origin": "servegrid",
            "allocation": f"{name} {number}",
            "protocol": "burst",
            "concurrency": 4,
            "input_len": 31,
            "output_len": 100,
            "requests": 4,
            "verdict": "ok",
            "valid": True,
            "output_tokens_per_s": speed,
        }
        for name, values in speeds.items()
        for number, speed in enumerate(values)
    ]
    frame = pd.DataFrame(rows, columns=[column.name for column in columns.CELLS])
    return cast_columns(frame, columns.CELLS)


def test_a_setting_is_worth_the_ratio_of_deployments_that_differ_only_in_it() -> None:
    settings = {
        "a": ("base", {"x": 1, "y": "on"}),
        "b": ("base", {"x": 2, "y": "on"}),
        "c": ("base", {"x": 2, "y": "off"}),
        "d": ("other", {"x": 1, "y": "on"}),
    }
    speeds = {"a": [100.0, 101.0], "b": [200.0, 202.0], "c": [200.0, 202.0], "d": [50.0, 50.0]}
    found = compare_settings(cells(speeds), settings).to_dict("records")
    assert [(row["setting"], row["change"], row["other settings"]) for row in found] == [
        ("x", "1 → 2", "y on"),
        ("y", "on → off", "x 2"),
    ]
    # ln 1.01 between the bring-ups of a side: s = 0.00995 / √2, error s √(2 / 2), t at 2 degrees of
    # freedom is 4.302653: the ends are 2 exp(± 0.030274).
    assert found[0]["speed, second / first"] == "2.000 [1.940, 2.061]"
    assert (found[0]["verdict"], found[1]["verdict"]) == ("faster", "no evidence")


def test_with_one_bring_up_there_is_no_verdict() -> None:
    settings = {"a": ("base", {"x": 1}), "b": ("base", {"x": 2})}
    (row,) = compare_settings(cells({"a": [100.0], "b": [150.0]}), settings).to_dict("records")
    assert (row["speed, second / first"], row["verdict"]) == ("1.500", "not tested")


def test_a_queue_is_an_effect_of_a_setting_but_other_broken_rules_are_not() -> None:
    settings = {"a": ("base", {"max_num_seqs": 1}), "b": ("base", {"max_num_seqs": 4})}
    table = cells({"a": [100.0], "b": [300.0]})
    queued = table.assign(valid=[False, True])
    for rules, expected in (
        (["server_queueing"], ["3.000"]),
        (["server_queueing", "drift"], []),
        (["drift"], []),
    ):
        frame = queued.assign(invalid_rules=pd.Series([rules, None], dtype=object))
        found = compare_settings(frame, settings)
        assert found["speed, second / first"].tolist() == expected
