"""The parameters of a submission, down to the text of the batch script."""

from __future__ import annotations

import inspect
import os
import shlex
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from snakemake_interface_common.exceptions import WorkflowError
from submitit.slurm.slurm import _make_sbatch_string

from snakemake_executor_plugin_submitit.kinds import KIND_KEYS
from snakemake_executor_plugin_submitit.manager import slug
from snakemake_executor_plugin_submitit.submission import (
    Parameters,
    cancel,
    check_folder,
    check_function_name,
    check_python,
    choose_cluster,
    import_function,
    load_kinds,
    resolve_python,
    submit,
)


def build(resources: dict[str, Any], kind: dict[str, Any] | None = None) -> Parameters:
    return Parameters.build("slurm", {"runtime": 90, "_cores": 1, **resources}, kind or {})


def test_resources_become_parameters() -> None:
    resources = {
        "mem_mb": 4000,
        "gpus": 2,
        "cpus_per_task": 8,
        "slurm_partition": "routage",
        "slurm_account": "me",
        "slurm_constraint": "sirocco&a100",
        "slurm_qos": "long",
    }
    assert build(resources).for_slurm() == {
        "time": 90,
        "signal_delay_s": 60,
        "nodes": 1,
        "cpus_per_task": 8,
        "srun_args": ["--nodes=1", "--ntasks=1", "--cpus-per-task=8"],
        "stderr_to_stdout": True,
        "gpus_per_node": 2,
        "mem": "4000M",
        "partition": "routage",
        "account": "me",
        "constraint": "sirocco&a100",
        "qos": "long",
    }


def test_a_kind_s_values_win_over_resources() -> None:
    kind = {
        "timeout_min": 30,
        "slurm_mem": 0,
        "slurm_gres": "gpu:a100:2",
        "slurm_exclusive": True,
        "cpus_per_task": 32,
    }
    values = build({"mem_mb": 1000, "gpus": 1}, kind).for_slurm()
    assert (values["time"], values["mem"], values["cpus_per_task"]) == (30, 0, 32)
    assert values["gres"] == "gpu:a100:2"
    assert values["exclusive"] is True
    assert "gpus_per_node" not in values


def test_zero_gpus_request_nothing() -> None:
    assert "gpus_per_node" not in build({"gpus": 0}).for_slurm()


def test_gpus_are_divided_among_the_nodes() -> None:
    values = build({"nodes": 2, "gpus": 4}).for_slurm()
    assert (values["nodes"], values["gpus_per_node"]) == (2, 2)


@pytest.mark.parametrize(("gpus", "nodes", "each"), [(1, 1, 1), (2, 1, 2), (4, 2, 2), (3, 2, 2)])
def test_more_gpus_than_a_node_has_need_several_nodes(gpus: int, nodes: int, each: int) -> None:
    values = build({"gpus": gpus}, {"gpus_of_node": 2}).for_slurm()
    assert (values["nodes"], values["gpus_per_node"]) == (nodes, each)


def test_nodes_can_be_requested_without_naming_gpus() -> None:
    values = build({"gpus": 4}, {"gpus_of_node": 2, "gpus_per_node": 0}).for_slurm()
    assert values["nodes"] == 2
    assert "gpus_per_node" not in values


NETWORK = {"gpus_of_node": 2, "interface": "ib0"}


def test_each_node_runs_a_task_if_the_service_has_a_part_there() -> None:
    def build_all(gpus: int) -> Parameters:
        return Parameters.build("slurm", {"runtime": 90, "gpus": gpus}, NETWORK, True)

    values = build_all(4).for_slurm()
    tasks = ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
    assert values["srun_args"] == tasks
    assert "interface" not in values
    assert build_all(4).values["interface"] == "ib0"
    assert build_all(2).for_slurm()["srun_args"] == build({}).for_slurm()["srun_args"]
    assert (build_all(4).on_all_nodes, build_all(2).on_all_nodes) == (True, False)


def test_a_kind_whose_nodes_have_too_few_gpus_is_refused() -> None:
    build({"gpus": 4}, {"nodes": 2, "gpus_of_node": 2})
    with pytest.raises(WorkflowError, match=r"nodes: 1 × gpus_of_node 2 is less than the 4 GPUs"):
        build({"gpus": 4}, {"nodes": 1, "gpus_of_node": 2})


def test_nodes_without_a_network_are_refused() -> None:
    resources = {"runtime": 90, "gpus": 4}
    with pytest.raises(WorkflowError, match=r"needs 2 nodes.*Set `interface` of the kind"):
        Parameters.build("slurm", resources, {"gpus_of_node": 2}, True)
    Parameters.build("slurm", resources, {"gpus_of_node": 2}, False)


def test_this_machine_is_one_node() -> None:
    with pytest.raises(WorkflowError, match="needs 2 nodes, but this machine is one"):
        Parameters.build("local", {"gpus": 4}, NETWORK, True)


def test_a_kind_s_python_is_relative_to_the_launch_folder(tmp_path: Path) -> None:
    def python(kind: dict[str, Any], **resources: Any) -> dict[str, str]:
        return resolve_python(kind, resources, tmp_path, "kinds.yaml: v100")

    (tmp_path / "python").touch()
    assert python({"python": "./python"}) == {"python": str(tmp_path / "python")}
    assert python({"python": "python3.12"}) == {"python": "python3.12"}
    assert python({}) == {}
    with pytest.raises(WorkflowError, match=r"kinds.yaml: v100.python: .*/gone/python does not"):
        python({"python": "gone/python"})
    assert python({"python": "gone/python"}, environment="main") == {}


def test_a_kind_s_srun_arguments_come_last() -> None:
    values = build({}, {"srun_args": ["--mpi=none"]}).for_slurm()
    assert values["srun_args"] == ["--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--mpi=none"]


@pytest.mark.parametrize(("minutes", "seconds"), [(1, 15), (2, 30), (4, 60), (720, 60)])
def test_the_warning_comes_a_minute_or_a_quarter_before_the_limit(
    minutes: int, seconds: int
) -> None:
    assert build({"runtime": minutes}).signal_delay_s == seconds


def test_memory_in_gigabytes_is_not_rounded() -> None:
    assert build({}, {"mem_gb": 1.5}).for_slurm()["mem"] == "1536M"


def test_only_slurm_needs_a_time_limit() -> None:
    with pytest.raises(WorkflowError, match="needs a time limit"):
        Parameters.build("slurm", {}, {})
    assert Parameters.build("local", {}, {}).time_limit_s == 7 * 24 * 3600


def test_a_local_allocation_ignores_the_gpu_type() -> None:
    kind = {"gpus_per_node": "a100:2"}
    assert Parameters.build("local", {}, kind).for_local()["gpus_per_node"] == 2


def test_submitit_knows_every_slurm_key_of_a_kind() -> None:
    known = set(inspect.signature(_make_sbatch_string).parameters)
    assert {key.removeprefix("slurm_") for key in KIND_KEYS if key.startswith("slurm_")} <= known


def test_a_kinds_file_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "kinds.yaml"
    path.write_text('a100: {slurm_constraint: "sirocco&a100", setup: [module load cuda]}\n')
    assert load_kinds(path) == {
        "a100": {"slurm_constraint": "sirocco&a100", "setup": ["module load cuda"]}
    }


WRONG_KINDS = {
    "a100: {slurm_partitoin: x}": r"a100.slurm_partitoin: unknown key.*mean `slurm_partition`",
    "a100: {gpus_of_node: 0}": r"a100\.gpus_of_node: 0 is less than 1",
    "a100: {nodes: two}": r"a100\.nodes: 'two' is not a number",
    "a100: {setup: module load}": r"a100\.setup: 'module load' is not a list",
    "a100: 3": "a100 must map parameters",
    "[a100]": "must map kinds",
    "a: [": "cannot be read",
}


@pytest.mark.parametrize("text", WRONG_KINDS)
def test_a_wrong_kinds_file_is_refused_with_the_location(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kinds.yaml"
    path.write_text(text)
    with pytest.raises(WorkflowError, match=WRONG_KINDS[text]) as refused:
        load_kinds(path)
    assert str(path) in str(refused.value)


def test_a_slug_is_a_safe_and_unique_file_name() -> None:
    assert slug("smollm2_bf16_1xcpu_vllm.3f2a9c1d") == "smollm2_bf16_1xcpu_vllm.3f2a9c1d"
    odd = [slug(name) for name in ("a/b", "a b", "../a", ".", "x" * 300, "x" * 301)]
    assert len(set(odd)) == len(odd)
    assert all(len(name) < 120 and "/" not in name and name[0] != "." for name in odd)


@pytest.mark.parametrize("service", ["module", "module:", ":function", "a b:c", "m:f()"])
def test_a_service_has_the_form_module_function(service: str) -> None:
    with pytest.raises(WorkflowError, match="module:function"):
        check_function_name(service, "submitit-service")
    assert check_function_name("a_package.of.mine:serve", "x") == "a_package.of.mine:serve"


def test_a_check_must_be_importable() -> None:
    assert import_function("os.path:join", "submitit-check") is os.path.join
    assert import_function(None, "submitit-check") is None
    for name in ("os.path:joint", "no_such_module:f"):
        with pytest.raises(WorkflowError, match=f"submitit-check: `{name}` cannot be imported"):
            import_function(name, "submitit-check")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake Slurm programs that record their arguments, environment and input file."""
    programs = tmp_path / "bin"
    programs.mkdir()
    answers = {"sbatch": "Submitted batch job 4711", "scancel": "", "squeue": "", "srun": ""}
    for name, answer in answers.items():
        path = programs / name
        path.write_text(
            f'#!/bin/sh\necho "$@" >{path}.args\nenv >{path}.env\n'
            f'[ -n "$1" ] && cp "$1" {path}.file 2>/dev/null\necho {answer}\n'
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return programs


def test_slurm_is_chosen_if_it_is_installed(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(slurm))
    assert choose_cluster(None) == "slurm"
    assert choose_cluster("local") == "local"
    (slurm / "squeue").unlink()
    assert choose_cluster(None) == "local"
    with pytest.raises(WorkflowError, match="needs squeue on the PATH"):
        choose_cluster("slurm")


GOLDEN = """\
#!/bin/bash

# Parameters
#SBATCH --constraint='sirocco&a100'
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --gpus-per-node=2
#SBATCH --job-name=tiny-5e1f0c2a
#SBATCH --mem=0
#SBATCH --nodes=1
#SBATCH --open-mode=append
#SBATCH --output=FOLDER/%j_0_log.out
#SBATCH --partition=routage
#SBATCH --signal=USR2@60
#SBATCH --time=90
#SBATCH --wckey=submitit

# setup
module load compiler/cuda

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output FOLDER/%j_%t_log.out --nodes=1 --ntasks=1 --cpus-per-task=8 \
PYTHON -P -u -m submitit.core._submit FOLDER
"""


def test_the_batch_script(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")  # as inside another job
    monkeypatch.setenv("SBATCH_PARTITION", "unwanted")
    kind = {
        "slurm_partition": "routage",
        "slurm_constraint": "sirocco&a100",
        "slurm_exclusive": True,
        "slurm_mem": "0",
        "gpus_per_node": 2,
        "setup": ["module load compiler/cuda"],
    }
    folder = tmp_path / "submitit"
    submission, _ = submit(
        "tiny", "slurm", "tiny-5e1f0c2a", folder, build({"cpus_per_task": 8}, kind), print
    )
    text = (slurm / "sbatch.file").read_text()
    assert text == GOLDEN.replace("FOLDER", str(folder)).replace("PYTHON", sys.executable)
    assert (submission.job_id, submission.job_name) == ("4711", "tiny-5e1f0c2a")
    assert submission.log == f"{folder}/4711_0_log.out"
    environment = (slurm / "sbatch.env").read_text()
    assert "SLURM_JOB_ID" not in environment
    assert "SBATCH_PARTITION" not in environment
    assert os.environ["SLURM_JOB_ID"] == "1"
    cancel(submission)
    assert (slurm / "scancel.args").read_text() == "--name=tiny-5e1f0c2a 4711\n"


def test_a_kind_s_python_is_data_for_the_shell(slurm: Path, tmp_path: Path) -> None:
    kind = {"python": f"{tmp_path}/my envs/$(touch x);`y`/python"}
    submit("tiny", "slurm", "tiny-1", tmp_path / "submitit", build({}, kind), print)
    (line,) = [
        line
        for line in (slurm / "sbatch.file").read_text().splitlines()
        if "submitit.core._submit" in line
    ]
    assert shlex.split(line)[-6:] == [
        *(f"{tmp_path}/my envs/$(touch x);`y`/python", "-P", "-u", "-m"),
        *("submitit.core._submit", f"{tmp_path}/submitit"),
    ]


def test_a_refusal_of_sbatch_is_reported_with_its_reason(slurm: Path, tmp_path: Path) -> None:
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'invalid partition specified' >&2\nexit 1\n")
    with pytest.raises(WorkflowError, match=r"slurm refused the allocation tiny[\s\S]*partition"):
        submit("tiny", "slurm", "tiny-1", tmp_path / "submitit", build({}), print)


def test_submitting_does_not_change_the_signal_mask(slurm: Path, tmp_path: Path) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    submit("tiny", "slurm", "tiny-1", tmp_path / "submitit", build({}), print)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.parametrize(
    ("answer", "clusters"),
    [("Submitted batch job 4711", "gpu,cpu"), ("Submitted batch job 4711 on cluster cpu", "cpu")],
)
def test_the_cluster_that_took_the_job_is_asked_from_then_on(
    slurm: Path, tmp_path: Path, answer: str, clusters: str
) -> None:
    (slurm / "sbatch").write_text(f"#!/bin/sh\ncp $1 {slurm}/sbatch.file\necho {answer}\n")
    kind = {"slurm_additional_parameters": {"clusters": "gpu,cpu"}}
    submission, _ = submit("a", "slurm", "a-1", tmp_path / "submitit", build({}, kind), print)
    assert "#SBATCH --clusters=gpu,cpu\n" in (slurm / "sbatch.file").read_text()
    assert (submission.job_id, submission.clusters) == ("4711", clusters)
    assert cancel(submission) is None
    expected = f"--clusters={clusters} --name=a-1 4711\n"
    assert (slurm / "scancel.args").read_text() == expected


def test_without_clusters_the_machine_s_own_is_asked(slurm: Path, tmp_path: Path) -> None:
    (slurm / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 4711 on cluster here\n")
    submission, _ = submit("a", "slurm", "a-1", tmp_path / "submitit", build({}), print)
    assert submission.clusters is None


def test_a_failed_scancel_gives_its_reason(slurm: Path, tmp_path: Path) -> None:
    submission, _ = submit("a", "slurm", "a-1", tmp_path / "submitit", build({}), print)
    (slurm / "scancel").write_text("#!/bin/sh\necho 'Socket timed out' >&2\nexit 1\n")
    assert cancel(submission) == "Socket timed out"


@pytest.mark.parametrize("path", ["/my envs/bin/python", "/a$b/python", "/it's/python"])
def test_a_python_that_a_shell_would_not_find_is_refused(path: str) -> None:
    with pytest.raises(WorkflowError, match="Create the environment in a folder whose path has"):
        check_python(path)


@pytest.mark.parametrize("path", ["/opt/py-3.12+x/bin/python3", "/home/josé/.venv/bin/python"])
def test_other_pythons_are_accepted(path: str) -> None:
    check_python(path)


def test_a_folder_with_a_percent_sign_is_refused() -> None:
    with pytest.raises(WorkflowError, match="/50%true/x contains `%`, which Slurm replaces"):
        check_folder(Path("/50%true/x"))
    check_folder(Path("/50/x"))
