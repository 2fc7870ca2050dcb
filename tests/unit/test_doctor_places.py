"""`servegrid doctor`: files, environments and models; each check passes and fails."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers.doctoring import GROUP, result, study
from helpers.tokenizing import make_tokenizer
from servegrid.doctor import environments, files, models
from servegrid.doctor.report import Finding, Status
from servegrid.errors import ModelError

# Files

MOUNTS = files.parse_mounts(
    "/dev/sda / ext4 rw 0 0\n"
    "tmpfs /dev/shm tmpfs rw 0 0\n"
    "beegfs_nodev /beegfs beegfs rw 0 0\n"
    "srv:/my\\040home /my\\040home nfs4 rw 0 0\n"
    "auto /net autofs rw 0 0\n"
    "srv:/net /net nfs rw 0 0\n"
)


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/beegfs/me/study", Status.OK, "beegfs on /beegfs"),
        ("/my home/study", Status.OK, "nfs4 on /my home"),
        ("/net/a", Status.OK, "nfs on /net"),
        ("/dev/shm/a", Status.WARN, "a file system in local memory"),
        ("/tmp/a", Status.WARN, "a local file system of each node"),
        ("/beegfs2/a", Status.WARN, "may not see it"),
    ],
)
def test_shared_and_local_file_systems_are_told_apart(
    path: str, status: Status, words: str
) -> None:
    found = files.check_shared(GROUP, "file system", Path(path), MOUNTS, "the study")
    assert found.status is status
    assert words in found.found
    assert bool(found.remedy) is (status is Status.WARN)


def test_an_unknown_file_system_is_a_warning() -> None:
    assert files.check_shared(GROUP, "x", Path("/a"), [], "it").status is Status.WARN


@pytest.mark.parametrize(
    ("free", "status"),
    [(0.9e9, Status.FAIL), (1e9, Status.WARN), (9.9e9, Status.WARN), (10e9, Status.OK)],
)
def test_free_space(free: float, status: Status) -> None:
    assert files.check_space(Path("/x"), free).status is status


def test_the_check_leaves_no_files(tmp_path: Path) -> None:
    found = list(files.check_files(tmp_path, shared=False))
    assert [each.status for each in found[:3]] == [Status.OK, Status.OK, Status.SKIP]
    assert list(tmp_path.iterdir()) == []


def test_a_file_instead_of_a_folder_fails(tmp_path: Path) -> None:
    (tmp_path / "results").touch()
    found = {each.subject: each.status for each in files.check_files(tmp_path, shared=True)}
    assert found["results/"] is Status.FAIL
    assert found[".snakemake/"] is Status.OK
    assert [each.status for each in files.check_files(tmp_path / "no", True)] == [Status.FAIL]


# Environments


def check_one(output: str, engines: Sequence[str] = ("vllm",)) -> Finding:
    environment = environments.parse_environment(result(stdout=f"a module's greeting\n{output}\n"))
    assert environment is not None
    return environments.check_environment("v100", ".venv-v100/bin/python", environment, engines)


COMPLETE = (
    '{"python": [3, 11, 2], "packages": {"servegrid": "0.1", "submitit": "1.5.4", '
    '"snakemake": "9.27", "vllm": "0.9"}}'
)


def test_a_complete_environment_is_reported_with_its_versions() -> None:
    found = check_one(COMPLETE)
    assert found.status is Status.OK
    assert "Python 3.11.2" in found.found
    assert "vllm 0.9" in found.found


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [('"0.9"', "null", "missing: vllm"), ("3, 11, 2", "3, 9, 1", "Python 3.9.1")],
)
def test_an_incomplete_environment_fails(old: str, new: str, words: str) -> None:
    found = check_one(COMPLETE.replace(old, new))
    assert found.status is Status.FAIL
    assert words in found.found
    assert "`make env-v100`" in found.remedy


def test_an_unused_engine_can_be_missing() -> None:
    assert check_one(COMPLETE.replace('"0.9"', "null"), ()).status is Status.OK


def test_interpreters_are_run(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such library >&2\nexit 127\n")
    broken.chmod(0o755)
    missing = tmp_path / ".venv-a100" / "bin" / "python"
    pythons = {"cpu": None, "b": str(broken), "a100": str(missing), "bare": "no-such-python"}
    cpu, bad, none, bare = environments.check_environments(pythons, {})
    assert cpu.status is Status.OK
    assert sys.executable in cpu.found
    assert bad.status is Status.FAIL
    assert "no such library" in bad.found
    assert none.status is Status.FAIL
    assert "`make env-a100`" in none.remedy
    assert bare.status is Status.SKIP


# Models


def test_models_are_looked_up(tmp_path: Path) -> None:
    (deployment,) = study().deployments

    def check() -> list[tuple[Status, str]]:
        found = models.check_deployment_models(
            deployment, lambda *_: tmp_path, tmp_path, Path("s.yaml")
        )
        return [(each.status, each.found) for each in found]

    found, without_tokenizer = check()
    assert found == (Status.OK, f"checkpoint {tmp_path}")
    assert without_tokenizer[0] is Status.FAIL
    assert "tokenizer.json: this file does not exist" in without_tokenizer[1]
    make_tokenizer(tmp_path)
    assert check()[1] == (Status.OK, "tokenizer encodes text")

    def refuse(name: str, _: Path) -> Path:
        raise ModelError(name)

    (lost,) = models.check_deployment_models(deployment, refuse, tmp_path, Path("s.yaml"))
    assert lost.status is Status.FAIL
    assert "`hf download org/m`" in lost.remedy


@pytest.mark.parametrize(
    ("name", "words"),
    [("demo:x", "`make model`"), ("./a/b", "Correct `checkpoint`"), ("/a/b", "Correct")],
)
def test_a_remedy_depends_on_the_kind_of_model_name(name: str, words: str) -> None:
    assert words in models.model_remedy(name, "checkpoint", Path("s.yaml"))


def test_emulated_deployments_need_no_model() -> None:
    found = list(models.check_models(study(2, "emulated").deployments, Path("s.yaml"), []))
    assert [each.status for each in found] == [Status.OK]


def test_settings_and_cache_of_models_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/dev/shm/hf")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    found = list(models.check_models(study().deployments, Path("s.yaml"), MOUNTS))
    assert "HF_HOME=/dev/shm/hf" in found[0].found
    assert (found[1].subject, found[1].status) == ("cache", Status.WARN)
    assert "/dev/shm/hf/hub" in found[1].found


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
    ],
)
def test_the_cache_is_found_from_the_environment(environ: dict[str, str], folder: str) -> None:
    assert models.hub_cache(environ) == Path(folder)
