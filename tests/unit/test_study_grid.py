"""Expansion of a configuration: which trials, which ids, which refusals."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from servegrid.errors import ConfigError
from servegrid.study.config import read_mapping, read_study, schema, study_from, study_of
from servegrid.study.grid import Trial, Workload, digest_of

TWO = {
    "study": "two",
    "workload": {"concurrency": [1, 4], "input_len": [31, 119]},
    "deployments": [
        {
            "model": "small",
            "checkpoint": "models/small",
            "quantization": "fp16",
            "engine": "vllm",
            "gpu": "a100-40gb",
            "gpu_count": 2,
            "max_model_len": 512,
        },
        {
            "model": "small",
            "checkpoint": "models/small.gguf",
            "quantization": "q4_1",
            "engine": "llamacpp",
            "gpu": "cpu",
            "max_model_len": 512,
            "workload": {"input_len": 21, "trials": 2},
        },
    ],
}


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    config: dict[str, Any] = copy.deepcopy(TWO)
    change(config)
    return config


def test_cells_are_the_product_and_a_deployment_overrides_the_study() -> None:
    assert [trial.id for trial in study_of(TWO).trials] == [
        "small_fp16_vllm_2xa100-40gb/burst-c1-i31-o100/trial-1",
        "small_fp16_vllm_2xa100-40gb/burst-c4-i31-o100/trial-1",
        "small_fp16_vllm_2xa100-40gb/burst-c1-i119-o100/trial-1",
        "small_fp16_vllm_2xa100-40gb/burst-c4-i119-o100/trial-1",
        "small_q4_1_llamacpp_cpu/burst-c1-i21-o100/trial-1",
        "small_q4_1_llamacpp_cpu/burst-c1-i21-o100/trial-2",
        "small_q4_1_llamacpp_cpu/burst-c4-i21-o100/trial-1",
        "small_q4_1_llamacpp_cpu/burst-c4-i21-o100/trial-2",
    ]


def test_a_burst_is_one_wave_unless_more_are_asked_for() -> None:
    (workload,) = {
        t.workload for t in study_of(TWO).trials if t.workload.cell == "burst-c4-i31-o100"
    }
    assert workload.requests == 4
    twice = study_of(changed(lambda c: c["workload"].update(requests_per_user=2)))
    assert {t.workload.requests for t in twice.trials if t.workload.concurrency == 4} == {8}


def loads_of(**workload: Any) -> list[Workload]:
    config = changed(lambda c: (c["workload"].update(workload), c["deployments"].pop()))
    return [trial.workload for trial in study_of(config).trials]


def test_a_steady_load_has_64_requests_between_the_first_and_the_last_of_each_user() -> None:
    workloads = loads_of(protocol="closed_loop", concurrency=[1, 8, 100])[:3]
    assert [workload.requests for workload in workloads] == [2 + 64, 16 + 64, 200 + 600]
    told = loads_of(protocol="closed_loop", requests_per_user=3)[0]
    assert (told.requests, told.duration_s) == (3, None)
    timed = loads_of(protocol="closed_loop", duration_s=60, think_time_s=2)[0]
    assert (timed.requests, timed.duration_s, timed.think_time_s) == (None, 60, 2)


def test_an_open_loop_has_a_rate_and_no_concurrency() -> None:
    workloads = loads_of(protocol="poisson", request_rate=[0.5, 4], think_time_s=2)
    assert [workload.cell for workload in workloads] == [
        "poisson-r0.5-i31-o100",
        "poisson-r4-i31-o100",
        "poisson-r0.5-i119-o100",
        "poisson-r4-i119-o100",
    ]
    assert {
        (workload.concurrency, workload.requests, workload.think_time_s) for workload in workloads
    } == {(None, 128, 0.0)}


def test_several_protocols_side_by_side() -> None:
    workloads = loads_of(protocol=["burst", "closed_loop"], input_len=31)
    assert [workload.cell for workload in workloads] == [
        "burst-c1-i31-o100",
        "burst-c4-i31-o100",
        "closed_loop-c1-i31-o100",
        "closed_loop-c4-i31-o100",
    ]


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        ({"protocol": "poisson"}, "the protocol `poisson` needs `request_rate`"),
        ({"protocol": "closed_loop", "duration_s": 9, "warmup_waves": 0}, "needs `warmup_waves`"),
        ({"output_len": 300, "output_spread": 0.5}, "plus output_len 450 is more than"),
        (
            {"protocol": ["burst", "bursts"]},
            "'bursts' is not one of `burst`, `closed_loop`, `poisson`",
        ),
        ({"request_rate": 0}, "0 must be greater than 0"),
    ],
)
def test_loads_that_do_not_fit_are_refused(workload: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        loads_of(**workload)


def test_sentinels_are_measured_at_the_start_in_the_middle_and_at_the_end() -> None:
    config = changed(
        lambda c: c["workload"].update(trials=3)
    )  # 12 trials; 4 of the second, as before
    study = study_of(config)
    assert [trial.id for trial in study.drift_checks] == [
        f"small_fp16_vllm_2xa100-40gb/sentinel-burst-c4-i31-o100/trial-{number}"
        for number in (1, 2, 3)
    ]
    first, second = study.deployments
    of_first = [trial for trial in study.measured if trial.deployment == first]
    assert sorted(map(study.position, of_first)) == list(range(15))
    assert [study.position(trial) for trial in study.drift_checks] == [0, 7, 14]
    of_second = [trial for trial in study.trials if trial.deployment == second]
    assert sorted(map(study.position, of_second)) == list(range(4))
    again = Trial.from_spec(json.loads(study.drift_checks[0].spec_json))
    assert again == study.drift_checks[0]
    assert study.trial(first.name, "sentinel-burst-c4-i31-o100", 2) == study.drift_checks[1]


def test_the_order_is_random_and_always_the_same() -> None:
    study = study_of(changed(lambda c: c["workload"].update(concurrency=[*range(1, 17)])))
    positions = [study.position(trial) for trial in study.trials if trial.workload.input_len == 31]
    assert positions != sorted(positions)
    again = study_of(changed(lambda c: c["workload"].update(concurrency=[*range(1, 17)])))
    assert positions == [again.position(t) for t in again.trials if t.workload.input_len == 31]


@pytest.mark.parametrize("wanted", [True, False])
def test_sentinels_can_be_asked_for_and_left_out(wanted: bool) -> None:
    config = changed(lambda c: c["workload"].update(trials=3, drift_checks=wanted))
    assert len(study_of(config).drift_checks) == (6 if wanted else 0)


def test_the_most_streams_of_a_deployment() -> None:
    study = study_of(TWO)
    assert [study.max_concurrency(each) for each in study.deployments] == [4, 4]
    opened = study_of(changed(lambda c: c["workload"].update(protocol="poisson", request_rate=1)))
    assert {opened.max_concurrency(each) for each in opened.deployments} == {256}


def test_defaults_are_the_same_in_schema_and_code() -> None:
    defaults = {
        key: value["default"]
        for key, value in schema()["$defs"]["workload"]["properties"].items()
        if "default" in value
    }
    workload = study_of(TWO).trials[0].workload
    told = {key: getattr(workload, key) for key in defaults if hasattr(workload, key)}
    assert told == {key: defaults[key] for key in told} | {"output_len": 100}
    assert set(defaults) - set(told) == {"trials"}


def test_filters_keep_and_drop() -> None:
    kept = study_of(
        changed(
            lambda c: c.update(
                include=[{"engine": "vllm", "concurrency": [4, 9]}, {"gpu": "cpu"}],
                exclude=[{"input_len": 119}, {"engine": "llamacpp", "concurrency": 1}],
            )
        )
    )
    assert [trial.id.partition("_")[2] for trial in kept.trials] == [
        "fp16_vllm_2xa100-40gb/burst-c4-i31-o100/trial-1",
        "q4_1_llamacpp_cpu/burst-c4-i21-o100/trial-1",
        "q4_1_llamacpp_cpu/burst-c4-i21-o100/trial-2",
    ]


def test_a_specification_survives_json() -> None:
    trial = study_of(TWO).trials[-1]
    again = Trial.from_spec(json.loads(trial.spec_json))
    assert again == trial
    assert again.digest == trial.digest


def test_digest_is_sha256_of_the_sorted_json() -> None:
    # printf '{"a":[1,2],"b":"é"}' | sha256sum
    assert digest_of({"b": "é", "a": [1, 2]}) == "d902c5ef87c42c33"


def test_same_configuration_same_digests_in_another_process() -> None:
    program = (
        "import json, sys; from servegrid.study.config import study_of;"
        "print([t.digest for t in study_of(json.load(sys.stdin)).trials])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(TWO),
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7"},
    )
    assert done.stdout.strip() == str([trial.digest for trial in study_of(TWO).trials])


def test_a_new_concurrency_level_leaves_the_other_specifications_alone() -> None:
    before = {trial.id: trial.digest for trial in study_of(TWO).trials}
    after = {
        trial.id: trial.digest
        for trial in study_of(changed(lambda c: c["workload"].update(concurrency=[1, 2, 4]))).trials
    }
    assert before.items() < after.items()
    assert {key.split("/")[1].split("-")[1] for key in after.keys() - before.keys()} == {"c2"}


def test_more_trials_only_add() -> None:
    before = {trial.id: trial.digest for trial in study_of(TWO).trials}
    after = study_of(changed(lambda c: c["workload"].update(trials=2)))
    assert before.items() <= {trial.id: trial.digest for trial in after.trials}.items()
    assert len(after.trials) == 12


def test_an_engine_argument_changes_digest_and_allocation_but_no_id() -> None:
    before = study_of(TWO)
    after = study_of(
        changed(lambda c: c["deployments"][0].update(engine_args={"enforce_eager": True}))
    )
    assert [t.id for t in before.trials] == [t.id for t in after.trials]
    assert before.trials[0].digest != after.trials[0].digest
    assert before.deployments[0].allocation != after.deployments[0].allocation
    assert before.deployments[1].allocation == after.deployments[1].allocation


REFUSED = [
    (
        lambda c: c["workload"].update(concurency=[1]),
        ["load: unknown key `concurency`", "`concurrency`?", "idle_timeout_s"],
    ),
    (
        lambda c: c["workload"].update(concurrency=0),
        ["load.concurrency: 0 is less than 1", "in flight"],
    ),
    (lambda c: c["workload"].update(concurrency=[1, 0]), ["load.concurrency[1]: 0 is less than 1"]),
    (lambda c: c["workload"].update(concurrency=[]), ["load.concurrency: the list is empty"]),
    (
        lambda c: c["workload"].update(concurrency=[2, 2]),
        ["load.concurrency: [2, 2] names something twice"],
    ),
    (
        lambda c: c["workload"].update(input_len="long"),
        ["load.input_len: 'long' is not of type integer"],
    ),
    (lambda c: c["workload"].update(protocol="brst"), ["load.protocol", "`burst`, `steady`"]),
    (lambda c: c["workload"].pop("input_len"), ["load: `input_len` is missing", "Prompt lengths"]),
    (lambda c: c["deployments"][1].pop("engine"), ["deployments[1]: `engine` is missing"]),
    (
        lambda c: c["deployments"][0].update(engine="tgi"),
        ["deployments[0].engine", "`vllm`, `llamacpp`"],
    ),
    (
        lambda c: c["deployments"][1].update(gpu_count=1),
        ["deployments[1].gpu_count", "`cpu` has 0 GPUs"],
    ),
    (lambda c: c["deployments"][0].update(gpu_count=0), ["deployments[0].gpu_count", "at least 1"]),
    (
        lambda c: c["deployments"][0].update(name="a/b"),
        ["deployments[0].name: 'a/b' is not a name"],
    ),
    (
        lambda c: c["deployments"].append(c["deployments"][0]),
        [
            "deployments[2]: deployments[0] has the name `small_fp16_vllm_2xa100-40gb`",
            "`name` of its own",
        ],
    ),
    (
        lambda c: c["deployments"][0].update(max_model_len=200),
        ["deployments[0]: input_len 119 plus output_len 100", "max_model_len 200", "Shorten"],
    ),
    (lambda c: c.update(exclude=[{"model": "small"}]), ["none of the 8 cells", "Loosen"]),
    (
        lambda c: c.update(exclude=[{"gup": "cpu"}]),
        ["exclude[0]: unknown key `gup`", "Did you mean `gpu`?"],
    ),
    (lambda c: c.update(deployments=[]), ["deployments: the list is empty"]),
    (
        lambda c: c.update(capacity={"think_time_s": float("inf")}),
        ["capacity.think_time_s: inf is not of type number", "Mean seconds"],
    ),
]


@pytest.mark.parametrize(("change", "told"), REFUSED)
def test_bad_input_is_one_line_with_file_key_and_remedy(
    change: Callable[[dict[str, Any]], Any], told: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        study_of(changed(change), ["config/two.yaml"])
    message = str(caught.value)
    assert message.startswith("config/two.yaml: ")
    assert "\n" not in message
    for part in told:
        assert part in message


def test_a_file_that_is_no_study_is_refused(tmp_path: Any) -> None:
    file = tmp_path / "study.yaml"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_study(file)
    file.write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_study(file)
    file.write_text("- a")
    with pytest.raises(ConfigError, match="not a mapping"):
        read_study(file)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("study: a\nload: {}\nstudy: b\n", "line 3 gives `study` a second time"),
        ("load:\n  input_len: 1\n  seed: 1\n  input_len: 2\n", "line 4 gives `input_len`"),
        ("deployments:\n- gpu: cpu\n  gpu: a100\n", "line 3 gives `gpu`"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(tmp_path: Any, text: str, told: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    for read in (lambda: read_study(file), lambda: study_from({}, [str(file)])):
        with pytest.raises(ConfigError, match=told) as caught:
            read()
        assert str(caught.value).startswith(str(file))


def test_keys_of_an_anchor_may_be_given_again(tmp_path: Any) -> None:
    file = tmp_path / "hardware.yaml"
    file.write_text("a: &a {x: 1, y: 1}\nb: {<<: *a, x: 2}\nc: *a\n")
    assert read_mapping(file)["b"] == {"x": 2, "y": 1}


def test_every_key_of_the_schema_has_a_description() -> None:
    definitions = schema()["$defs"]
    for keys in (
        schema(),
        definitions["workload"],
        definitions["deployment"],
        definitions["endpoint"],
    ):
        for key, value in keys["properties"].items():
            assert value["description"].endswith("."), key


def test_a_cell_is_named_after_what_it_varies() -> None:
    assert Workload("closed_loop", 8, 296, 50, 16).cell == "closed_loop-c8-i296-o50"
