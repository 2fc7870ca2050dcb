"""`servegrid doctor`: its report, the profile, the study, and the command itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from helpers.doctoring import GROUP, study
from servegrid.cli.main import main
from servegrid.doctor.environments import Environment, check_start
from servegrid.doctor.profile import Profile, check_profile, check_study, parse_minutes
from servegrid.doctor.report import Status, exit_status, format_counts, format_findings
from servegrid.doctor.resources import build_request
from servegrid.doctor.shell import run_command
from servegrid.errors import ConfigError


def profile_in(
    folder: Path,
    options: str = "executor: submitit\nsubmitit-cluster: slurm\n",
    kinds_text: str | None = "v100: {slurm_partition: routage, gpus_of_node: 2, interface: ib0}\n",
) -> Path:
    if kinds_text is not None:
        (folder / "kinds.yaml").write_text(kinds_text)
        options += f"submitit-kinds: {folder}/kinds.yaml\n"
    (folder / "config.yaml").write_text(options)
    return folder


def test_findings_are_aligned_and_counted() -> None:
    findings = [
        GROUP.ok("a", "fine"),
        GROUP.warn("longer", "so\nso", "do this"),
        GROUP.skip("b", "no"),
    ]
    assert format_findings(findings) == (
        "kind v100\n"
        "  OK    a       fine\n"
        "  WARN  longer  so so\n"
        "                remedy: do this\n"
        "  SKIP  b       no"
    )
    assert format_counts(findings) == "1 ok, 1 warning, 0 failures"
    assert exit_status(findings) == 0
    assert exit_status([*findings, GROUP.fail("c", "bad", "mend it")]) == 1


def test_lines_are_wrapped_between_words() -> None:
    path = "/a/very/long/path/that/must/stay/in/one/piece/to/be/copied"
    lines = format_findings(
        [GROUP.warn("x", "word " * 20, f"look at {path} at once")], 60
    ).splitlines()
    assert all(len(line) <= 60 or path in line for line in lines)
    assert any(path in line for line in lines)


# Profile and study


def test_a_profile_is_loaded_with_its_kinds(tmp_path: Path) -> None:
    profile = Profile.load(profile_in(tmp_path))
    assert profile.cluster == "slurm"
    assert [each.status for each in check_profile(profile)] == [Status.OK, Status.OK]


@pytest.mark.parametrize(
    ("options", "kinds_text", "named"),
    [
        ("executor: [", None, r"--profile: .*config\.yaml is not valid YAML.*Correct it"),
        ("- a", None, r"config\.yaml is not a mapping of keys\. Write"),
        ("executor: submitit\n", "v100: 3", r"kinds\.yaml: v100: is not a mapping.*Write"),
        ("executor: submitit\n", "[", r"submitit-kinds: .*kinds\.yaml is not valid YAML"),
    ],
)
def test_an_unreadable_profile_is_one_error_with_file_key_and_remedy(
    tmp_path: Path, options: str, kinds_text: str | None, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        Profile.load(profile_in(tmp_path, options, kinds_text))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--profile: .*config\.yaml cannot be read.*Correct"):
        Profile.load(tmp_path)
    (tmp_path / "config.yaml").write_text("submitit-kinds: no/where.yaml\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: submitit-kinds: no/where\.yaml cannot"):
        Profile.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "kinds_text", "status", "words"),
    [
        ("executor: slurm\n", None, Status.FAIL, "executor is slurm"),
        ("jobs: 3\n", None, Status.FAIL, "executor is not set"),
        ("executor: submitit\nsubmitit-cluster: sge\n", None, Status.FAIL, "`sge`"),
        ("executor: submitit\nsubmitit-cluster: slurm\n", None, Status.WARN, "no submitit-kinds"),
        ("executor: submitit\n", "{}", Status.FAIL, "contains no kind"),
        ("executor: submitit\n", "a: {slurm_partitoin: x}", Status.FAIL, "`slurm_partitoin`"),
        ("executor: submitit\n", "a: {nodes: '2'}", Status.FAIL, "a.nodes: '2' is not a number"),
        ("executor: submitit\n", "a: {slurm_qos: 7}", Status.FAIL, "a.slurm_qos: 7 is not text"),
        ("executor: submitit\n", "a: {slurm_additional_parameters: x}", Status.FAIL, "a mapping"),
        ("executor: submitit\n", "a: {nodes: true}", Status.FAIL, "True is not a number"),
        ("executor: submitit\n", "a: {gpus_of_node: 0}", Status.FAIL, "0 is less than 1"),
    ],
)
def test_a_wrong_profile_is_reported_with_a_remedy(
    tmp_path: Path, options: str, kinds_text: str | None, status: Status, words: str
) -> None:
    profile = Profile.load(profile_in(tmp_path, options, kinds_text))
    bad = [each for each in check_profile(profile) if each.status is not Status.OK]
    assert [each.status for each in bad] == [status]
    assert words in bad[0].found
    assert bad[0].remedy


def test_without_the_plugin_the_keys_are_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "snakemake_executor_plugin_submitit.kinds", None)
    profile = Profile.load(profile_in(tmp_path, kinds_text="a: {slurm_partitoin: x}"))
    findings = [each for each in check_profile(profile) if each.status is not Status.OK]
    assert [each.status for each in findings] == [Status.WARN]
    assert "not installed" in findings[0].found


def test_values_of_a_wrong_type_do_not_stop_the_other_checks(tmp_path: Path) -> None:
    kinds = "v100: {gpus_of_node: two, nodes: [1], mem_gb: x, slurm_additional_parameters: y}"
    profile = Profile.load(profile_in(tmp_path, kinds_text=kinds))
    assert sum(each.status is Status.FAIL for each in check_profile(profile)) == 4
    found = list(check_study(profile, study(4), Path("s.yaml")))
    assert [each.status for each in found] == [Status.OK, Status.OK]
    request = build_request(profile, "v100", study(4).deployments)
    assert (request.memory_mb, request.max_nodes) == (0, 1)
    assert "--nodes=[1]" in request.sbatch_options()


def test_a_misspelt_key_is_corrected(tmp_path: Path) -> None:
    profile = Profile.load(profile_in(tmp_path, kinds_text="a: {slurm_partitoin: x}"))
    remedies = [each.remedy for each in check_profile(profile)]
    assert "Did you mean `slurm_partition`?" in remedies[-1]


@pytest.mark.parametrize(
    ("written", "minutes"),
    [(720, 720), ("720", 720), ("12h", 720), ("1h30m", 90), ("2 days", 2880), ("soon", None)],
)
def test_runtimes_are_parsed_as_snakemake_parses_them(
    written: object, minutes: float | None
) -> None:
    assert parse_minutes(written) == minutes


@pytest.mark.parametrize(
    "resources",
    [
        {"set-resources": {"measure": {"runtime": 60}}},
        {"set-resources": ["plot:runtime=5", "measure:runtime=60"]},
        {"default-resources": ["runtime=60"]},
        {"default-resources": {"runtime": 5}, "set-resources": {"measure": {"runtime": 60}}},
    ],
)
def test_the_runtime_is_found_wherever_the_profile_sets_it(resources: dict[str, object]) -> None:
    profile = Profile(Path("config.yaml"), resources, None, {})
    assert build_request(profile, "v100", ()).minutes == 60


def test_a_kind_of_the_study_must_be_in_the_profile(tmp_path: Path) -> None:
    profile = Profile.load(profile_in(tmp_path, kinds_text="a100: {slurm_partition: x}"))
    bad = list(check_study(profile, study(), Path("s.yaml")))[-1]
    assert (bad.status, bad.subject) == (Status.FAIL, "kind v100")
    assert "a100" in bad.remedy


@pytest.mark.parametrize(
    ("gpu_count", "engine", "status", "words"),
    [
        (2, "vllm", Status.OK, "one node"),
        (3, "vllm", Status.WARN, "m_fp16_vllm_3xv100"),  # 3 workers on 2 nodes
        (4, "vllm", Status.OK, "up to 2 nodes"),
        (4, "emulated", Status.OK, "up to 2 nodes"),
        (4, "llamacpp", Status.WARN, "on one node only"),
    ],
)
def test_more_gpus_than_a_node_has_are_reported(
    tmp_path: Path, gpu_count: int, engine: str, status: Status, words: str
) -> None:
    profile = Profile.load(profile_in(tmp_path))
    last = list(check_study(profile, study(gpu_count, engine), Path("s.yaml")))[-1]
    assert last.status is status
    assert words in last.found


def test_a_fixed_number_of_nodes_with_too_few_gpus_is_reported(tmp_path: Path) -> None:
    profile = Profile.load(profile_in(tmp_path, kinds_text="v100: {gpus_of_node: 2, nodes: 1}"))
    last = list(check_study(profile, study(4, "vllm"), Path("s.yaml")))[-1]
    assert (last.status, last.subject) == (Status.FAIL, "kind v100")
    assert "v100.nodes: 1 × gpus_of_node 2 is less than the 4 GPUs" in last.found
    assert last.remedy.startswith("Remove `nodes`")


@pytest.mark.parametrize(
    ("version", "nodes", "statuses"),
    [
        ("0.10.1.1", 2, [Status.FAIL]),
        ("0.32.0", 2, [Status.OK]),
        ("0.10.1.1", 1, []),
        (None, 2, []),  # a missing package is another finding
    ],
)
def test_an_old_vllm_for_several_nodes_is_reported(
    version: str | None, nodes: int, statuses: list[Status]
) -> None:
    (deployment,) = study(4, "vllm").deployments
    environment = Environment((3, 12, 0), {"vllm": version})
    on_nodes = [(deployment, nodes)] if nodes > 1 else []
    found = list(check_start("v100", environment, on_nodes, "kinds.yaml"))
    assert [each.status for each in found] == statuses
    if Status.FAIL in statuses:
        assert "vLLM 0.10.1.1 of the kind `v100` cannot start on several nodes" in found[0].found
        assert "Correct `python` of `v100` in kinds.yaml" in found[0].remedy


def test_several_nodes_need_the_name_of_their_network(tmp_path: Path) -> None:
    profile = Profile.load(profile_in(tmp_path, kinds_text="v100: {gpus_of_node: 2}"))
    last = list(check_study(profile, study(4, "vllm"), Path("s.yaml")))[-1]
    assert last.status is Status.FAIL
    assert "Set `interface` of `v100`" in last.remedy


# Programs, and the command itself


def test_a_program_that_fails_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    late = run_command(["sleep", "5"], 0.1)
    assert (late.ok, late.message) == (False, "no answer within 0.1 s")
    assert "cannot be run" in run_command(["/no/such/program"]).message
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    seen = run_command(["env"]).stdout.splitlines()
    assert "SLURM_CONF=/etc/slurm.conf" in seen
    assert not any(line.startswith("SLURM_JOB_ID") for line in seen)


def test_a_slurm_profile_without_slurm_is_one_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = profile_in(tmp_path, kinds_text="cpu: {slurm_partition: x, timeout_min: 60}\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["doctor", "--profile", str(folder), "--directory", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.count("FAIL") == 1
    assert "SKIP  controller" in out
    assert out.splitlines()[-1].endswith("1 failure")


def test_a_local_profile_needs_no_slurm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "executor: submitit\nsubmitit-cluster: local\n"
    folder = profile_in(tmp_path, options, None)
    assert main(["doctor", "--profile", str(folder), "--directory", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "SKIP  Slurm  not needed" in out
    assert out.splitlines()[-1].endswith("0 failures")


def test_an_unreadable_profile_ends_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--profile", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(
        f"servegrid: --profile: {tmp_path / 'config.yaml'} cannot be read"
    )
