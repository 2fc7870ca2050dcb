"""A configuration expands to the expected trials and ids, or is refused with a clear error."""

import contextlib
import copy
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from servegrid.errors import ConfigError
from servegrid.study.config import (
    from_snakemake,
    load_mapping,
    load_schema,
    load_study,
    parse_study,
)
from servegrid.study.grid import Trial, Workload, digest_json

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


def changed_config(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    config: dict[str, Any] = copy.deepcopy(TWO)
    change(config)
    return config


def test_cells_are_the_product_and_a_deployment_overrides_the_study() -> None:
    assert [trial.id for trial in parse_study(TWO).trials] == [
        "small_fp16_vllm_2xa100-40gb/burst-c1-i31-o100/trial-1",
        "small_fp16_vllm_2xa100-40gb/burst-c4-i31-o100/trial-1",
        "small_fp16_vllm_2xa100-40gb/burst-c1-i119-o100/trial-1",
        "small_fp16_vllm_2xa100-40gb/burst-c4-i119-o100/trial-1",
        "small_q4_1_llamacpp_cpu/burst-c1-i21-o100/trial-1",
        "small_q4_1_llamacpp_cpu/burst-c1-i21-o100/trial-2",
        "small_q4_1_llamacpp_cpu/burst-c4-i21-o100/trial-1",
        "small_q4_1_llamacpp_cpu/burst-c4-i21-o100/trial-2",
    ]


def test_a_burst_is_one_wave_by_default() -> None:
    (workload,) = {
        t.workload for t in parse_study(TWO).trials if t.workload.cell == "burst-c4-i31-o100"
    }
    assert workload.requests == 4
    twice = parse_study(changed_config(lambda c: c["workload"].update(requests_per_user=2)))
    assert {t.workload.requests for t in twice.trials if t.workload.concurrency == 4} == {8}


def workloads_with(**workload: Any) -> list[Workload]:
    config = changed_config(lambda c: (c["workload"].update(workload), c["deployments"].pop()))
    return [trial.workload for trial in parse_study(config).trials]


def test_a_closed_loop_has_64_requests_between_the_first_and_the_last_of_each_user() -> None:
    workloads = workloads_with(protocol="closed_loop", concurrency=[1, 8, 100])[:3]
    assert [workload.requests for workload in workloads] == [2 + 64, 16 + 64, 200 + 600]
    counted = workloads_with(protocol="closed_loop", requests_per_user=3)[0]
    assert (counted.requests, counted.duration_s) == (3, None)
    timed = workloads_with(protocol="closed_loop", duration_s=60, think_time_s=2)[0]
    assert (timed.requests, timed.duration_s, timed.think_time_s) == (None, 60, 2)


def test_a_poisson_workload_has_a_rate_and_no_concurrency() -> None:
    both = workloads_with(
        protocol=["closed_loop", "poisson"], request_rate=[0.5, 4], think_time_s=2
    )
    workloads = [workload for workload in both if workload.protocol == "poisson"]
    assert [workload.cell for workload in workloads] == [
        "poisson-r0.5-i31-o100",
        "poisson-r4-i31-o100",
        "poisson-r0.5-i119-o100",
        "poisson-r4-i119-o100",
    ]
    assert {
        (workload.concurrency, workload.requests, workload.think_time_s) for workload in workloads
    } == {(None, 2000, 0.0)}


def test_a_study_can_have_several_protocols() -> None:
    workloads = workloads_with(protocol=["burst", "closed_loop"], input_len=31)
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
        ({"output_len": 400, "output_spread": 0.5}, "plus output_len 600 is more than"),
        (
            {"protocol": ["burst", "bursts"]},
            "'bursts' is not one of `burst`, `closed_loop`, `poisson`",
        ),
        ({"request_rate": 0}, "0 must be greater than 0"),
    ],
)
def test_invalid_workloads_are_refused(workload: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        workloads_with(**workload)


def test_drift_checks_are_at_the_start_in_the_middle_and_at_the_end() -> None:
    config = changed_config(
        lambda c: c["workload"].update(trials=3)
    )  # 12 trials; 4 of the second, as before
    study = parse_study(config)
    assert [trial.id for trial in study.drift_checks] == [
        f"small_fp16_vllm_2xa100-40gb/drift_check-burst-c4-i31-o100/trial-{number}"
        for number in (1, 2, 3)
    ]
    first, second = study.deployments
    of_first = [trial for trial in study.all_trials if trial.deployment == first]
    assert sorted(map(study.position, of_first)) == list(range(15))
    assert [study.position(trial) for trial in study.drift_checks] == [0, 7, 14]
    of_second = [trial for trial in study.trials if trial.deployment == second]
    assert sorted(map(study.position, of_second)) == list(range(4))
    again = Trial.from_spec(json.loads(study.drift_checks[0].spec_json))
    assert again == study.drift_checks[0]
    assert study.trial(first.name, "drift_check-burst-c4-i31-o100", 2) == study.drift_checks[1]


def test_the_order_is_random_and_reproducible() -> None:
    study = parse_study(changed_config(lambda c: c["workload"].update(concurrency=[*range(1, 17)])))
    positions = [study.position(trial) for trial in study.trials if trial.workload.input_len == 31]
    assert positions != sorted(positions)
    again = parse_study(changed_config(lambda c: c["workload"].update(concurrency=[*range(1, 17)])))
    assert positions == [again.position(t) for t in again.trials if t.workload.input_len == 31]


@pytest.mark.parametrize("wanted", [True, False])
def test_drift_checks_can_be_turned_on_and_off(wanted: bool) -> None:
    config = changed_config(lambda c: c["workload"].update(trials=3, drift_checks=wanted))
    assert len(parse_study(config).drift_checks) == (6 if wanted else 0)


def test_max_concurrency_of_a_deployment() -> None:
    study = parse_study(TWO)
    assert [study.max_concurrency(each) for each in study.deployments] == [4, 4]
    opened = parse_study(
        changed_config(lambda c: c["workload"].update(protocol="poisson", request_rate=1))
    )
    assert {opened.max_concurrency(each) for each in opened.deployments} == {256}


def test_every_copy_of_the_model_runs_max_num_seqs_requests() -> None:
    def change(config: dict[str, Any]) -> None:
        config["workload"].update(protocol="poisson", request_rate=1)
        config["deployments"][0]["engine_args"] = {"data_parallel_size": 2}

    study = parse_study(changed_config(change))
    assert [study.max_concurrency(each) for each in study.deployments] == [512, 256]


def test_defaults_are_the_same_in_schema_and_code() -> None:
    defaults = {
        key: value["default"]
        for key, value in load_schema()["$defs"]["workload"]["properties"].items()
        if "default" in value
    }
    workload = parse_study(TWO).trials[0].workload
    actual = {key: getattr(workload, key) for key in defaults if hasattr(workload, key)}
    assert actual == {key: defaults[key] for key in actual} | {"output_len": 100}
    assert set(defaults) - set(actual) == {"trials", "bring_ups", "order", "grid"}


def test_include_and_exclude_filter_the_trials() -> None:
    kept = parse_study(
        changed_config(
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


def test_a_specification_can_be_read_back_from_json() -> None:
    trial = parse_study(TWO).trials[-1]
    again = Trial.from_spec(json.loads(trial.spec_json))
    assert again == trial
    assert again.digest == trial.digest


def test_digest_is_sha256_of_the_sorted_json() -> None:
    # printf '{"a":[1,2],"b":"é"}' | sha256sum
    assert digest_json({"b": "é", "a": [1, 2]}) == "d902c5ef87c42c33"


def test_digests_are_the_same_in_another_process() -> None:
    program = (
        "import json, sys; from servegrid.study.config import parse_study;"
        "print([t.digest for t in parse_study(json.load(sys.stdin)).trials])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(TWO),
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7"},
    )
    assert done.stdout.strip() == str([trial.digest for trial in parse_study(TWO).trials])


def test_a_new_concurrency_does_not_change_other_specifications() -> None:
    before = {trial.id: trial.digest for trial in parse_study(TWO).trials}
    after = {
        trial.id: trial.digest
        for trial in parse_study(
            changed_config(lambda c: c["workload"].update(concurrency=[1, 2, 4]))
        ).trials
    }
    assert before.items() < after.items()
    assert {key.split("/")[1].split("-")[1] for key in after.keys() - before.keys()} == {"c2"}


def test_more_trials_do_not_change_earlier_ones() -> None:
    before = {trial.id: trial.digest for trial in parse_study(TWO).trials}
    after = parse_study(changed_config(lambda c: c["workload"].update(trials=2)))
    assert before.items() <= {trial.id: trial.digest for trial in after.trials}.items()
    assert len(after.trials) == 12


def test_an_engine_argument_changes_digest_and_allocation_but_not_the_id() -> None:
    before = parse_study(TWO)
    after = parse_study(
        changed_config(lambda c: c["deployments"][0].update(engine_args={"enforce_eager": True}))
    )
    assert [t.id for t in before.trials] == [t.id for t in after.trials]
    assert before.trials[0].digest != after.trials[0].digest
    assert before.trials[0].allocation != after.trials[0].allocation
    assert before.trials[-1].allocation == after.trials[-1].allocation


def test_each_bring_up_has_all_trials_and_an_allocation_of_its_own() -> None:
    before = parse_study(TWO)
    after = parse_study(changed_config(lambda c: c["workload"].update(bring_ups=3)))
    known = {trial.id: (trial.digest, trial.allocation) for trial in before.trials}
    found = {trial.id: (trial.digest, trial.allocation) for trial in after.trials}
    assert known.items() <= found.items()  # more bring-ups only add trials
    assert len(after.trials) == 3 * len(before.trials)
    assert len({trial.digest for trial in after.trials}) == len(after.trials)
    for deployment in after.deployments:
        own = [each for each in after.trials if each.deployment == deployment]
        names = {each.allocation for each in own}
        assert len(names) == 3
        for name in names:
            group = [each for each in own if each.allocation == name]
            assert {each.cell for each in group} == {each.cell for each in own}
            positions = sorted(after.position(each) for each in group)
            assert positions == list(range(len(group)))
    last = after.trials[-1]
    assert (last.bring_up, last.id.rpartition("/")[2]) == (3, f"trial-{last.number}-bring_up-3")
    assert Trial.from_spec(json.loads(last.spec_json)) == last
    assert after.trial(*last.id.replace("/trial-", "/").split("/")) == last


def test_each_bring_up_has_drift_checks() -> None:
    study = parse_study(
        changed_config(lambda c: c["workload"].update(bring_ups=2, drift_checks=True))
    )
    by_allocation = Counter(each.allocation for each in study.drift_checks)
    assert set(by_allocation.values()) == {3}
    assert set(by_allocation) == {each.allocation for each in study.trials}


def test_single_prompts_that_do_not_fit_are_unsupported_before_submission() -> None:
    config = changed_config(lambda c: c["deployments"][0].update(max_model_len=219))
    assert parse_study(config).unsupported == ()  # 119 + 100 tokens fit exactly
    config["deployments"][0]["max_model_len"] = 218
    study = parse_study(config)
    assert {trial.workload.input_len for trial in study.unsupported} == {119}
    assert {trial.deployment.name for trial in study.unsupported} == {study.deployments[0].name}
    assert len(study.trials) == len(parse_study(TWO).trials)


def test_a_drift_check_repeats_a_workload_that_fits() -> None:
    config = changed_config(
        lambda c: c["workload"].update(input_len=[31, 500, 501], drift_checks=True)
    )
    study = parse_study(config)
    first = study.deployments[0]
    lengths = [each.workload.input_len for each in study.drift_checks if each.deployment == first]
    assert lengths == [31] * 3  # the middle of the whole grid is 500


def test_from_light_to_heavy_means_by_tokens_in_flight_and_one_round_after_the_other() -> None:
    settings = {"concurrency": [8, 1, 4], "input_len": [300, 31], "trials": 2}
    study = parse_study(
        changed_config(lambda c: c["workload"].update(settings, order="light_to_heavy"))
    )
    own = [each for each in study.trials if each.deployment == study.deployments[0]]
    order = [
        (each.number, each.workload.concurrency, each.workload.input_len)
        for each in sorted(own, key=study.position)
    ]
    # Tokens in flight: 131, 400, 524, 1048, 1600, 3200.
    one_round = [(1, 31), (1, 300), (4, 31), (8, 31), (4, 300), (8, 300)]
    assert order == [(number, *each) for number in (1, 2) for each in one_round]


def test_dominated_workloads_are_left_out_by_default_from_light_to_heavy_only() -> None:
    for keys, expected in (
        ({}, 0),
        ({"order": "random"}, 0),
        ({"order": "light_to_heavy"}, 1),
        ({"order": "light_to_heavy", "prune": False}, 0),
        ({"order": "random", "prune": True}, 1),
    ):
        changed = changed_config(lambda c, keys=keys: c["workload"].update(keys))
        study = parse_study(changed)
        assert {study.prunes(trial) for trial in study.trials} == {expected}, keys
    # Neither key is part of a specification: nothing is measured again.
    assert [trial.digest for trial in study.trials] == [
        trial.digest for trial in parse_study(TWO).trials
    ]


REFUSED = [
    (
        lambda c: c["workload"].update(concurency=[1]),
        ["workload: unknown key `concurency`", "`concurrency`?", "idle_timeout_s"],
    ),
    (
        lambda c: c["workload"].update(concurrency=0),
        ["workload.concurrency: 0 is less than 1", "simultaneous requests"],
    ),
    (
        lambda c: c["workload"].update(concurrency=[1, 0]),
        ["workload.concurrency[1]: 0 is less than 1"],
    ),
    (lambda c: c["workload"].update(concurrency=[]), ["workload.concurrency: the list is empty"]),
    (
        lambda c: c["workload"].update(concurrency=[2, 2]),
        ["workload.concurrency: [2, 2] contains a duplicate"],
    ),
    (
        lambda c: c["workload"].update(input_len="long"),
        ["workload.input_len: 'long' is not a whole number"],
    ),
    (
        lambda c: c["workload"].update(protocol="brst"),
        ["workload.protocol", "`burst`, `closed_loop`"],
    ),
    (
        lambda c: c["workload"].pop("input_len"),
        ["workload: `input_len` is missing", "Add it: the prompt length"],
    ),
    (lambda c: c["deployments"][1].pop("engine"), ["deployments[1]: `engine` is missing"]),
    (
        lambda c: c["deployments"][0].update(engine="tgi"),
        ["deployments[0].engine", "`vllm`, `llamacpp`"],
    ),
    (
        lambda c: c["deployments"][1].update(gpu_count=1),
        ["deployments[1].gpu_count: 1 is not valid with gpu `cpu`", "Use 0 for `cpu`"],
    ),
    (
        lambda c: c["deployments"][0].update(gpu_count=4, engine_args={"data_parallel_size": 3}),
        [
            "deployments[0]: gpu_count 4 is not a multiple of 3 (data_parallel_size 3",
            "Set it to 3 times the GPUs of tensor parallelism",
        ],
    ),
    (
        lambda c: c["deployments"][0].update(engine_args={"pipeline-parallel-size": "2"}),
        ["deployments[0]: engine_args.pipeline_parallel_size: '2' is not valid", "whole number"],
    ),
    (
        lambda c: c["deployments"][0].update(engine_args={"tensor_parallel_size": None}),
        ["deployments[0]: engine_args.tensor_parallel_size is set by", "`gpu_count`"],
    ),
    (
        lambda c: c["deployments"][0].update(
            engine_args={"data_parallel_size": 2, "data_parallel_size_local": 1}
        ),
        ["deployments[0]: engine_args.data_parallel_size_local spreads", "Remove the argument"],
    ),
    (lambda c: c["deployments"][0].update(gpu_count=0), ["deployments[0].gpu_count", "at least 1"]),
    (
        lambda c: c["deployments"][0].update(name="a/b"),
        ["deployments[0].name: 'a/b' is not a name"],
    ),
    (
        lambda c: c["deployments"][1].update(name="summary"),
        ["deployments[1]: the name `summary` is that of a table", "a different `name`"],
    ),
    (
        lambda c: c["deployments"].append(c["deployments"][0]),
        [
            "deployments[2]: the name `small_fp16_vllm_2xa100-40gb` is already that of "
            "deployments[0]",
            "a different `name`",
        ],
    ),
    (
        lambda c: c["deployments"][0].update(max_model_len=100),
        ["deployments[0]: input_len 31 plus output_len 100", "max_model_len 100", "Shorten"],
    ),
    (
        lambda c: c.update(exclude=[{"model": "small"}]),
        ["the filters remove all 8 trials", "Change the filters"],
    ),
    (
        lambda c: c.update(exclude=[{"gup": "cpu"}]),
        ["exclude[0]: unknown key `gup`", "Did you mean `gpu`?"],
    ),
    (
        lambda c: c.update({"a\nb\x1b": 1}),
        [r"the top level: unknown key `a\nb\x1b`"],
    ),
    (
        lambda c: c["deployments"][0].update(engine_args={"a\nb": 2**63}),
        [r"deployments[0].engine_args.a\nb: 9223372036854775808 is too large"],
    ),
    (
        lambda c: c.update(exclude=[{"gpu": ["cpu", "a100"]}, {"gpu": ["h100", "a100"]}]),
        [
            "exclude[1].gpu: no cell has the value `h100` or `a100`",
            "Values of the study: `a100-40gb`, `cpu`",
        ],
    ),
    (
        lambda c: c.update(include=[{"concurrency": 5}]),
        ["include[0].concurrency: no cell has the value `5`", "Values of the study: `1`, `4`"],
    ),
    (lambda c: c.update(deployments=[]), ["deployments: the list is empty"]),
    (
        lambda c: c.update(capacity={"think_time_s": float("inf")}),
        ["capacity.think_time_s: inf is not a number", "Mean time"],
    ),
    (
        lambda c: c.update(
            capacity={"input_len": 31, "prompt_mix": [{"input_len": 31, "share": 1}]}
        ),
        ["capacity: `input_len` and `prompt_mix` exclude each other", "Remove one"],
    ),
    (
        lambda c: c.update(capacity={"prompt_mix": [{"input_len": 31, "share": 1}] * 2}),
        ["capacity.prompt_mix: an `input_len` occurs twice"],
    ),
    (
        lambda c: c["workload"].update(bring_ups=101),
        ["workload.bring_ups: 101 is more than 100."],
    ),
    # The largest integer that a column of 32 bits holds.
    (
        lambda c: c["workload"].update(concurrency=[1, 2**31]),
        ["workload.concurrency[1]: 2147483648 is more than 2,147,483,647."],
    ),
    (
        lambda c: c["workload"].update(input_len=10**400),
        ["workload.input_len: 1000", "… is more than 2,147,483,647."],
    ),
    (
        lambda c: c["workload"].update(timeout_s=1e300),
        ["workload.timeout_s: 1e+300 is more than 1,000,000,000,000."],
    ),
    (
        lambda c: c["workload"].update(timeout_s=5e-324),
        ["workload.timeout_s: 5e-324 is less than 1e-12."],
    ),
    (
        lambda c: c["deployments"][0].update(engine_args={"seeds": [2**63]}),
        ["deployments[0].engine_args.seeds[0]: 9223372036854775808 is too large"],
    ),
    (
        lambda c: c["workload"].update(concurrency=50_000, requests_per_user=50_000),
        ["deployments[0]: `burst-c50000-i31-o100` has 2,500,000,000 requests", "Lower the load"],
    ),
    (
        lambda c: c["workload"].update(protocol="poisson", request_rate=1e6, duration_s=1e6),
        ["`poisson-r1e+06-i31-o100` has 1,000,000,000,000 requests"],
    ),
    (
        lambda c: c["workload"].update(concurrency=[1_000_000, 1_000_001]),
        ["deployments[0]: the loads 1000000 and 1000001 ", "`burst-c1e+06-i31-o100`", "Remove one"],
    ),
    (
        lambda c: c["workload"].update(protocol="poisson", request_rate=[0.1234567, 0.1234568]),
        ["the loads 0.1234567 and 0.1234568 of `workload` give two cells the same name"],
    ),
    (lambda c: c.update(study="s" * 181), ["study: 'sss", "has more than 180 characters."]),
    (
        lambda c: c["deployments"][0].update(name="d" * 181),
        ["deployments[0]: the name `ddd", "has 181 characters", "shorter `name`"],
    ),
]


def test_the_largest_values_are_allowed() -> None:
    large: dict[str, Any] = {"concurrency": 2**31 - 1, "seed": 2**63 - 1, "timeout_s": 1e12}
    workload = workloads_with(**large)[0]
    assert {key: getattr(workload, key) for key in large} == large


@pytest.mark.parametrize(("change", "expected"), REFUSED)
def test_an_error_is_one_line_with_file_key_and_remedy(
    change: Callable[[dict[str, Any]], Any], expected: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_study(changed_config(change), ["config/two.yaml"])
    message = str(caught.value)
    assert message.startswith("config/two.yaml: ")
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_a_file_without_a_mapping_is_refused(tmp_path: Any) -> None:
    file = tmp_path / "study.yaml"
    with pytest.raises(ConfigError, match="cannot be read"):
        load_study(file)
    file.write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_study(file)
    file.write_text("- a")
    with pytest.raises(ConfigError, match="not a mapping"):
        load_study(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study: a\nworkload: {}\nstudy: b\n", "line 3: the key `study` is a duplicate"),
        (
            "workload:\n  input_len: 1\n  seed: 1\n  input_len: 2\n",
            "line 4: the key `input_len` is a duplicate",
        ),
        ("deployments:\n- gpu: cpu\n  gpu: a100\n", "line 3: the key `gpu` is a duplicate"),
    ],
)
def test_duplicate_keys_are_refused(tmp_path: Any, text: str, message: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    for read in (lambda: load_study(file), lambda: from_snakemake({}, [str(file)])):
        with pytest.raises(ConfigError, match=message) as caught:
            read()
        assert str(caught.value).startswith(str(file))


def test_a_merged_anchor_can_be_overridden(tmp_path: Any) -> None:
    file = tmp_path / "hardware.yaml"
    file.write_text("a: &a {x: 1, y: 1}\nb: {<<: *a, x: 2}\nc: *a\n")
    assert load_mapping(file)["b"] == {"x": 2, "y": 1}


def test_every_key_of_the_schema_has_a_description() -> None:
    names = ("slo", "capacity", "workload", "deployment", "endpoint")
    for described in (load_schema(), *(load_schema()["$defs"][name] for name in names)):
        for key, value in described["properties"].items():
            assert value["description"].endswith("."), key


def test_the_name_of_a_cell() -> None:
    assert Workload("closed_loop", 8, 296, 50, 16).cell == "closed_loop-c8-i296-o50"


def sweep_config(**workload: Any) -> dict[str, Any]:
    keys = {"protocol": "poisson", "request_rate": "sweep", **workload}
    return changed_config(lambda c: (c["workload"].update(keys), c["deployments"].pop()))


def test_a_sweep_has_cells_at_fixed_fractions_and_one_that_finds_the_rate() -> None:
    study = parse_study(sweep_config(input_len=31, trials=2))
    name = "small_fp16_vllm_2xa100-40gb"
    fractions = ("0.25", "0.5", "0.7", "0.8", "0.9", "1", "1.1", "1.3")
    assert [trial.id for trial in study.trials] == [
        *(f"{name}/poisson-x{each}-i31-o100/trial-{n}" for each in fractions for n in (1, 2)),
        f"{name}/closed_loop-c256-i31-o100/trial-1",
    ]
    source = study.trials[-1]
    assert study.position(source) == 0
    waiting = [*study.trials[:-1], *study.drift_checks]
    assert all(study.saturation_trial(each) == source for each in waiting)
    assert study.saturation_trial(source) is None
    assert (source.workload.requests, source.workload.think_time_s) == (2 * 256 + 6 * 256, 0)
    assert study.trials[0].workload.request_rate is None
    assert Trial.from_spec(json.loads(study.trials[0].spec_json)) == study.trials[0]


def test_a_filter_cannot_remove_the_cell_that_finds_the_rate() -> None:
    config = sweep_config() | {"include": [{"protocol": "poisson", "input_len": 31}]}
    kept = parse_study(config).trials
    assert [trial.cell for trial in kept][-1] == "closed_loop-c256-i31-o100"
    assert len(kept) == 9


def test_new_keys_change_no_older_specification() -> None:
    # Both digests are those of the version before the keys.
    assert parse_study(TWO).trials[0].digest == "ead1ad89b2426194"
    older = changed_config(lambda c: c["workload"].update(protocol="poisson", request_rate=2.0))
    assert parse_study(older).trials[0].digest == "3e30658053eb3daf"


def test_gamma_and_profile_are_part_of_the_specification() -> None:
    (gamma, _) = workloads_with(protocol="gamma", request_rate=2, burstiness=0.5, seed=1)
    assert (gamma.cell, gamma.burstiness) == ("gamma-r2-i31-o100", 0.5)
    assert gamma.spec["burstiness"] == 0.5 and "rate_profile" not in gamma.spec
    keys = {"request_rate": 2, "duration_s": 60, "rate_profile": [0, 1]}
    (ramp, _) = workloads_with(protocol="profile", **keys)
    assert (ramp.cell, ramp.rate_profile) == ("profile-r2-i31-o100", (0, 1))
    assert Workload.from_spec(json.loads(json.dumps(ramp.spec))) == ramp


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        ({"protocol": "gamma", "request_rate": 1}, "`gamma` needs `burstiness`"),
        ({"protocol": "gamma", "burstiness": 1}, "`gamma` needs `request_rate`"),
        ({"burstiness": 1}, "`burstiness` is only for the protocol `gamma`"),
        ({"protocol": "profile", "request_rate": 1}, "`profile` needs `rate_profile`"),
        (
            {"protocol": "profile", "request_rate": 1, "rate_profile": [0, 1]},
            "`profile` needs `duration_s`",
        ),
        (
            {"protocol": "profile", "request_rate": "sweep", "rate_profile": [0, 1]}
            | {"duration_s": 60},
            "needs a number as `request_rate`",
        ),
        (
            {"protocol": "profile", "request_rate": 1, "rate_profile": [0, 0], "duration_s": 9},
            "has no factor above 0",
        ),
        ({"protocol": "poisson", "request_rate": "swep"}, "'swep' is not a number"),
        ({"protocol": "gamma", "request_rate": 1, "burstiness": 0}, "0 must be greater than 0"),
    ],
)
def test_rates_that_make_no_sense_are_refused(workload: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_study(changed_config(lambda c: c["workload"].update(workload)))


@pytest.mark.parametrize(
    ("workload", "own", "message"),
    [
        ({"request_rate": "sweep"}, {}, "workload.request_rate: is only for `poisson`, `gamma`"),
        ({"think_time_s": 2}, {}, "workload.think_time_s: is only for `closed_loop`, and the"),
        ({"duration_s": 9}, {}, "and the protocol is `burst`. Write `protocol: closed_loop`, or"),
        (
            {"protocol": "poisson", "request_rate": 1, "requests_per_user": 9},
            {},
            "workload.requests_per_user: is only for `burst` and `closed_loop`",
        ),
        ({}, {"think_time_s": 2}, "deployments[0].workload.think_time_s: is only for"),
        # Of a list, and of all deployments, one protocol is enough; 0 is the default.
        ({"protocol": ["burst", "closed_loop"], "think_time_s": 2}, {}, None),
        ({"think_time_s": 2}, {"protocol": "closed_loop"}, None),
        ({"think_time_s": 0}, {}, None),
    ],
)
def test_a_key_that_no_protocol_uses_is_refused(
    workload: dict[str, Any], own: dict[str, Any], message: str | None
) -> None:
    """`request_rate: sweep` without `protocol: poisson` measured bursts, and said nothing."""

    def change(config: dict[str, Any]) -> None:
        config["workload"].update(workload)
        config["deployments"][0]["workload"] = own

    with (
        contextlib.nullcontext()
        if message is None
        else pytest.raises(ConfigError, match=re.escape(message or ""))
    ):
        parse_study(changed_config(change))


def test_an_error_quotes_only_the_start_of_a_long_description() -> None:
    with pytest.raises(ConfigError) as error:
        parse_study(
            changed_config(lambda c: c["workload"].update(source={"kind": "text", "turns": 0}))
        )
    assert "source.turns: 0 is less than 2. Number of the user's turns in each conv" in str(
        error.value
    )
    assert len(str(error.value)) < 330


@pytest.mark.parametrize(
    ("slo", "message"),
    [
        ({"ttft": 1}, "slo.ttft: 1 is not a mapping. A class of users"),
        ({"chat": {"ttft": 1}}, "slo.chat: unknown key `ttft`. Did you mean `ttft_s`?"),
        ({"chat": {"ttft_s": 1}, "ttft_s": 1}, "slo: `ttft_s` is a limit and `chat` is a class"),
        ({"a b": {"ttft_s": 1}}, "slo: 'a b' is not a name"),
        ({"chat": {"itl_s": 0}}, "slo.chat.itl_s: 0 must be greater than 0"),
    ],
)
def test_an_slo_that_makes_no_sense_is_refused(slo: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_study(changed_config(lambda c: c.update(slo=slo)))
