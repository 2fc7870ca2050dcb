"""Models are fetched from a hub of the tests' own, with pinned revisions, and found offline."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from helpers.hub import Hub, Repository, running_hub
from helpers.tokenizing import make_tokenizer
from servegrid.cli.main import main
from servegrid.engines.base import Site
from servegrid.errors import ModelError
from servegrid.records import columns, parquet
from servegrid.run import service
from servegrid.run.preflight import check_ready
from servegrid.run.revisions import read_pinned
from servegrid.study import hub as hubs
from servegrid.study import models
from servegrid.study.config import load_study
from servegrid.study.grid import Study
from servegrid.study.revisions import add_revisions, read_revisions

NAME = "org/small"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode()
WANTED = {
    *("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"),
    *("model.safetensors.index.json", *SHARDS),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return (folder / "tokenizer.json").read_bytes()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub, which `huggingface_hub` uses in this process with a cache of its own."""
    with running_hub() as hub:
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        yield hub


def model_files(tokenizer: bytes, weights: bytes = b"w" * 3000) -> dict[str, bytes]:
    """A repository as many have it: the same weights several times."""
    return {
        "config.json": b'{"model_type": "llama"}',
        "generation_config.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "tokenizer.json": tokenizer,
        "model.safetensors.index.json": INDEX,
        SHARDS[0]: weights,
        SHARDS[1]: weights + b"2",
        "consolidated.safetensors": weights * 2,
        "pytorch_model.bin": weights * 2,
        "pytorch_model.bin.index.json": b"{}",
        "original/consolidated.00.pth": weights * 2,
        "original/params.json": b"{}",
        "onnx/model.onnx": weights,
        "README.md": b"# Small",
        ".gitattributes": b"*.bin filter=lfs",
    }


def write_study(folder: Path, checkpoint: str = NAME, **deployment: Any) -> Path:
    entry = {"name": "d", "model": "small", "quantization": "bf16", "gpu": "cpu", "engine": "vllm"}
    study = {
        "study": "s",
        "workload": {"concurrency": [1, 2], "input_len": 40, "output_len": 5},
        "deployments": [{**entry, "checkpoint": checkpoint, "max_model_len": 100, **deployment}],
    }
    (folder / "study.yaml").write_text(json.dumps(study))
    return folder / "study.yaml"


def fetch(study: Path) -> int:
    return main(["fetch", "--configfile", str(study)])


def fetch_first(hub: Hub, folder: Path, tokenizer: bytes) -> tuple[Repository, str, Study]:
    """Fetch the first commit of a repository for a study in `folder`."""
    repository = hub.repository(NAME)
    first = repository.commit(model_files(tokenizer, b"first"))
    study = load_study(write_study(folder))
    assert fetch(folder / "study.yaml") == 0
    return repository, first, study


def snapshot(folder: Path, commit: str) -> Path:
    return folder / "cache/models--org--small/snapshots" / commit


def test_a_study_is_fetched_from_a_mirror_with_what_the_engine_needs_only(
    tmp_path: Path, tokenizer: bytes
) -> None:
    with running_hub() as hub:
        commit = hub.repository(NAME).commit(model_files(tokenizer))
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_good",
            "HF_HUB_DISABLE_XET": "1",
        }
        for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE"):
            environment.pop(name, None)
        command = [sys.executable, "-m", "servegrid.cli.main", "fetch"]
        done = subprocess.run(
            [*command, "--configfile", write_study(tmp_path), "--directory", tmp_path],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert hub.files() == WANTED
        assert "Bearer hf_good" in hub.tokens
    folder = tmp_path / "home/hub/models--org--small/snapshots" / commit
    assert {path.name for path in folder.iterdir()} == WANTED
    assert read_revisions(tmp_path / "results") == {NAME: commit}
    assert "org/small: 7 files, " in done.stdout
    assert f"revision {commit} in " in done.stdout


def test_a_repeated_fetch_downloads_nothing(
    hub: Hub, tmp_path: Path, tokenizer: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repository(NAME).commit(model_files(tokenizer))
    assert fetch(write_study(tmp_path)) == 0
    hub.downloads.clear()
    capsys.readouterr()
    assert fetch(write_study(tmp_path)) == 0
    assert hub.downloads == []
    assert "(0 B downloaded)" in capsys.readouterr().out


def test_a_dropped_connection_is_resumed_where_it_ended(
    hub: Hub, tmp_path: Path, tokenizer: bytes
) -> None:
    weights = bytes(range(250)) * 120_000  # the client writes 10 MiB at a time
    commit = hub.repository(NAME).commit(model_files(tokenizer, weights))
    hub.drop_once.add(SHARDS[0])
    assert fetch(write_study(tmp_path)) == 0
    spans = [span for file, span in hub.downloads if file == SHARDS[0]]
    assert spans == [None, f"bytes={10 << 20}-"]
    assert (snapshot(tmp_path, commit) / SHARDS[0]).read_bytes() == weights


def test_an_interrupted_fetch_keeps_complete_files_and_continues(
    hub: Hub, tmp_path: Path, tokenizer: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.repository(NAME).commit(model_files(tokenizer))
    hub.fail.add(SHARDS[1])
    study = write_study(tmp_path)
    assert fetch(study) == 2
    assert "it continues" in capsys.readouterr().err
    assert read_revisions(tmp_path / "results") == {}
    with pytest.raises(ModelError, match=rf"{SHARDS[1]} is missing.*`servegrid fetch"):
        hubs.check_weights(snapshot(tmp_path, commit))
    hub.fail.clear()
    before = {file for file, _ in hub.downloads} - {SHARDS[1]}
    hub.downloads.clear()
    assert fetch(study) == 0
    assert SHARDS[1] in hub.files()
    assert SHARDS[0] not in hub.files() or SHARDS[0] not in before


def test_a_revision_that_moves_stays_pinned_for_a_study(
    hub: Hub, tmp_path: Path, tokenizer: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = hub.repository(NAME)
    first = repository.commit(model_files(tokenizer, b"first"))
    study = write_study(tmp_path)
    assert fetch(study) == 0
    second = repository.commit(model_files(tokenizer, b"second"))
    shutil.rmtree(tmp_path / "cache")
    capsys.readouterr()
    assert fetch(study) == 0
    printed = capsys.readouterr().out
    assert f"the Hub has the newer revision {second}" in printed
    assert f"`org/small@{second}`" in printed
    assert (snapshot(tmp_path, first) / SHARDS[0]).read_bytes() == b"first"
    assert not snapshot(tmp_path, second).exists()
    assert read_revisions(tmp_path / "results") == {NAME: first}


@pytest.mark.parametrize("revision", ["v1.0", "commit"])
def test_a_name_can_have_a_revision(
    hub: Hub, tmp_path: Path, tokenizer: bytes, revision: str
) -> None:
    repository = hub.repository(NAME)
    tagged = repository.commit(model_files(tokenizer, b"tagged"), ref="v1.0")
    repository.commit(model_files(tokenizer, b"newest"))
    name = f"{NAME}@{tagged if revision == 'commit' else revision}"
    study = write_study(tmp_path, name)
    assert fetch(study) == 0
    assert read_revisions(tmp_path / "results") == {name: tagged}
    located = models.locate(name, tmp_path, read_revisions(tmp_path / "results"))
    assert (located / SHARDS[0]).read_bytes() == b"tagged"
    check_ready(load_study(study), tmp_path / "results/cells")


def test_a_tokenizer_alone_needs_no_weights(hub: Hub, tmp_path: Path, tokenizer: bytes) -> None:
    hub.repository(NAME).commit(model_files(tokenizer))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    study = write_study(tmp_path, str(tmp_path / "model.gguf"), tokenizer=NAME)
    assert fetch(study) == 0
    assert hub.files() == {
        *("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"),
    }
    check_ready(load_study(study), tmp_path / "results/cells")


def refusal(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], name: str = NAME) -> str:
    capsys.readouterr()
    assert fetch(write_study(folder, name)) == 2
    assert hub.downloads == [], "told before anything is downloaded"
    return capsys.readouterr().err


def test_a_gated_model_is_told_with_the_page_where_access_is_asked_for(
    hub: Hub,
    tmp_path: Path,
    tokenizer: bytes,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.repository(NAME).commit(model_files(tokenizer))
    hub.repository(NAME).gated = True
    error = refusal(hub, tmp_path, capsys)
    assert f"`org/small` is gated. Ask for access at {hub.url}/org/small" in error
    assert "`hf auth login` or set HF_TOKEN" in error
    (tmp_path / "token").write_text("hf_good")  # where `hf auth login` stores it
    assert fetch(tmp_path / "study.yaml") == 0
    assert "Bearer hf_good" in hub.tokens


def test_what_the_hub_does_not_have_is_told_with_a_remedy(
    hub: Hub, tmp_path: Path, tokenizer: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repository(NAME).commit(model_files(tokenizer))
    hub.repository("org/empty").commit({"config.json": b"{}"})
    unknown = refusal(hub, tmp_path, capsys, "org/unknown")
    assert f"{hub.url}/org/unknown does not exist, or is private, or the token" in unknown
    revision = refusal(hub, tmp_path, capsys, f"{NAME}@v9")
    assert "has no revision `v9`" in revision
    assert f"{hub.url}/org/small/tree/main" in revision
    assert "`org/empty` has no weights" in refusal(hub, tmp_path, capsys, "org/empty")


def test_a_small_disk_is_told_before_the_download(
    hub: Hub,
    tmp_path: Path,
    tokenizer: bytes,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.repository(NAME).commit(model_files(tokenizer, b"w" * 1_000_000))
    usage = SimpleNamespace(total=10**9, used=0, free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    # A small file, the index, is read to know which shards the engine loads.
    assert fetch(write_study(tmp_path)) == 2
    error = capsys.readouterr().err
    assert "the download needs 2.0 MB, but only 1.0 MB are free" in error
    assert "HF_HOME" in error
    assert not hub.files() & set(SHARDS)


def test_an_unreachable_hub_and_the_offline_mode_are_told(
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids it" in refusal(hub, tmp_path, capsys)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    error = refusal(hub, tmp_path, capsys)
    assert "cannot be fetched from http://127.0.0.1:9" in error
    assert "HF_ENDPOINT for a mirror" in error


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["consolidated.safetensors", "params.json"], ["consolidated.safetensors"]),
        (
            ["pytorch_model.bin", "training_args.bin"],
            ["pytorch_model.bin"],
        ),
        (["model.safetensors", "model.Q4.gguf", "metal/model.bin"], ["model.safetensors"]),
        (["model.Q4.gguf"], ["model.Q4.gguf"]),
        (["model.Q4.gguf", "model.Q8.gguf"], []),
        (["tf_model.h5", "flax_model.msgpack", "rust_model.ot"], []),
    ],
)
def test_the_weights_that_an_engine_loads_are_selected(
    files: list[str], weights: list[str]
) -> None:
    small = ["config.json", "tekken.json", "tokenizer.model", "modeling_x.py"]
    chosen = hubs.select_files([*files, *small, "README.md", "logo.png"], weights=True)
    assert set(chosen) == {*weights, *small, *(["params.json"] if "params.json" in files else [])}
    assert not set(hubs.select_files([*files, *small], weights=False)) & set(weights)


def write_cell(study: Study, results: Path, number: int = 0, **engine: Any) -> None:
    """The record of a trial, the first one by default, as a job writes it."""
    trial = study.trials[number]
    record = {"format": parquet.RECORD_FORMAT, "spec": trial.spec, "engine": engine}
    file = results / "cells" / trial.id / "requests.parquet"
    file.parent.mkdir(parents=True)
    table = parquet.arrow_table(columns.REQUESTS, [], record)
    assert isinstance(table, pa.Table)
    parquet.write_table(table, file)


def test_a_run_pins_the_revision_that_it_finds_and_keeps_it(
    hub: Hub, tmp_path: Path, tokenizer: bytes
) -> None:
    repository, first, study = fetch_first(hub, tmp_path, tokenizer)
    results = tmp_path / "results"
    (results / "models.lock.json").unlink()
    refs = tmp_path / "cache/models--org--small/refs"
    refs.mkdir(exist_ok=True)
    (refs / "main").write_text(first)  # as `hf download` leaves it
    check_ready(study, results / "cells")
    assert read_revisions(results) == {NAME: first}
    # Somebody downloads a newer one: the study stays with the first.
    second = repository.commit(model_files(tokenizer, b"second"))
    (refs / "main").write_text(second)
    check_ready(study, results / "cells")
    assert read_revisions(results) == {NAME: first}
    site = Site(models=tmp_path, revisions=read_revisions(results))
    (deployment,) = study.deployments
    assert models.locate(NAME, tmp_path, site.revisions) == snapshot(tmp_path, first)
    assert service._revisions(deployment, site) == {
        "revision": first,
        "tokenizer_revision": first,
    }


def test_cells_of_another_revision_are_not_continued(
    hub: Hub, tmp_path: Path, tokenizer: bytes
) -> None:
    _, first, study = fetch_first(hub, tmp_path, tokenizer)
    results = tmp_path / "results"
    write_cell(study, results, revision=first, tokenizer_revision=first)
    check_ready(study, results / "cells")
    # The lock file is lost: the records know the revision.
    (results / "models.lock.json").unlink()
    check_ready(study, results / "cells")
    assert read_revisions(results) == {NAME: first}
    other = "0" * 40
    (results / "models.lock.json").unlink()
    add_revisions(results, {NAME: other})
    with pytest.raises(ModelError) as caught:
        check_ready(study, results / "cells")
    message = str(caught.value)
    assert f"measured with revision {first} of `org/small`" in message
    assert f"models.lock.json says {other}" in message
    # Nor are finished ones, of which a run may measure some again: their seed can have changed.
    write_cell(study, results, 1, revision=first, tokenizer_revision=first)
    with pytest.raises(ModelError, match=r"Correct this entry of the lock file"):
        check_ready(study, results / "cells")


@pytest.mark.parametrize("finished", [1, 2])
@pytest.mark.parametrize("form", ["commit", "branch"])
def test_finished_cells_are_not_measured_over_with_another_revision(
    hub: Hub,
    tmp_path: Path,
    tokenizer: bytes,
    form: str,
    finished: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    repository, first, study = fetch_first(hub, tmp_path, tokenizer)
    results = tmp_path / "results"
    for number in range(finished):
        write_cell(study, results, number, revision=first, tokenizer_revision=first)
    second = repository.commit(model_files(tokenizer, b"second"), ref="next")
    name = f"{NAME}@{second if form == 'commit' else 'next'}"
    hub.downloads.clear()
    changed = write_study(tmp_path, name)
    capsys.readouterr()
    assert fetch(changed) == 2, "refused before the download"
    refused = capsys.readouterr().err
    assert hub.files() <= {"model.safetensors.index.json"}
    # `hf download` has fetched it.
    target = snapshot(tmp_path, second)
    target.mkdir(exist_ok=True)
    for file in snapshot(tmp_path, first).iterdir():
        (target / file.name).unlink(missing_ok=True)
        shutil.copy(file, target, follow_symlinks=False)
    refs = tmp_path / "cache/models--org--small/refs"
    refs.mkdir(exist_ok=True)
    (refs / "next").write_text(second)
    with pytest.raises(ModelError) as caught:
        check_ready(load_study(changed), results / "cells")
    for message in (refused, str(caught.value)):
        assert "deployment `d`: its cells were measured with revision " in message
        assert f"{first} of `org/small` (" in message
        assert "results/cells/d/burst-c1-i40-o5/trial-1/requests.parquet), " in message
        assert f"the study's `checkpoint: {name}` is {second}" in message
        assert f"write `checkpoint: org/small@{first}`, or give the deployment another" in message
        assert "first delete " in message and "results/cells/d." in message
    assert read_revisions(results) == {NAME: first}
    # Each remedy of the message works.
    check_ready(load_study(write_study(tmp_path, f"{NAME}@{first}")), results / "cells")
    check_ready(load_study(write_study(tmp_path, name, name="second")), results / "cells")
    shutil.rmtree(results / "cells/d")
    check_ready(load_study(write_study(tmp_path, name)), results / "cells")
    assert read_revisions(results) == {NAME: first, f"{NAME}@{first}": first, name: second}


def test_another_model_is_measured_over_as_every_changed_specification(
    hub: Hub, tmp_path: Path, tokenizer: bytes
) -> None:
    _, first, study = fetch_first(hub, tmp_path, tokenizer)
    write_cell(study, tmp_path / "results", revision=first, tokenizer_revision=first)
    hub.repository("org/other").commit(model_files(tokenizer, b"other"))
    assert fetch(write_study(tmp_path, "org/other")) == 0
    check_ready(load_study(tmp_path / "study.yaml"), tmp_path / "results/cells")


def test_a_fetch_without_the_lock_file_takes_the_revision_of_the_cells(
    hub: Hub, tmp_path: Path, tokenizer: bytes
) -> None:
    repository, first, study = fetch_first(hub, tmp_path, tokenizer)
    results = tmp_path / "results"
    write_cell(study, results, revision=first, tokenizer_revision=first)
    repository.commit(model_files(tokenizer, b"second"))
    (results / "models.lock.json").unlink()
    assert fetch(tmp_path / "study.yaml") == 0
    assert read_revisions(results) == {NAME: first}


def test_an_allocation_measures_only_what_the_lock_file_pins(
    hub: Hub, tmp_path: Path, tokenizer: bytes
) -> None:
    _, first, study = fetch_first(hub, tmp_path, tokenizer)
    results = tmp_path / "results"
    (deployment,) = study.deployments
    refs = tmp_path / "cache/models--org--small/refs"
    refs.mkdir(exist_ok=True)
    (refs / "main").write_text(first)
    assert read_pinned(deployment, results) == {NAME: first}
    # While the allocation waited, the file was deleted or edited.
    (results / "models.lock.json").unlink()
    with pytest.raises(
        ModelError, match=r"lock\.json has no entry for its `checkpoint: org/small`"
    ):
        read_pinned(deployment, results)
    add_revisions(results, {NAME: "0" * 40})
    write_cell(study, results, revision=first, tokenizer_revision=first)
    with pytest.raises(ModelError, match=rf"with revision {first} .*lock\.json says {'0' * 40}"):
        read_pinned(deployment, results)


def test_a_pinned_revision_that_is_not_in_the_cache_is_named(hub: Hub, tmp_path: Path) -> None:
    add_revisions(tmp_path / "results", {NAME: "0" * 40})
    study = load_study(write_study(tmp_path))
    with pytest.raises(ModelError, match=rf"revision {'0' * 40} in the .*`servegrid fetch"):
        check_ready(study, tmp_path / "results/cells")


def test_an_entry_of_the_lock_file_is_never_changed(tmp_path: Path) -> None:
    add_revisions(tmp_path, {"org/a": "1"})
    with pytest.raises(ModelError, match=r"lock\.json: `org/a` has revision 1, not 2: another"):
        add_revisions(tmp_path, {"org/a": "2", "org/b": "3"})
    assert read_revisions(tmp_path) == {"org/a": "1"}
    add_revisions(tmp_path, {"org/a": "1", "org/b": "3"})
    assert read_revisions(tmp_path) == {"org/a": "1", "org/b": "3"}
    assert {path.name for path in tmp_path.iterdir()} == {
        *("models.lock.json", ".models.lock.json.lock"),
    }
    (tmp_path / "models.lock.json").write_text("{")
    with pytest.raises(ModelError, match=r"models\.lock\.json: is damaged .* Remove it"):
        read_revisions(tmp_path)


def test_a_lock_file_that_contradicts_a_name_is_refused(tmp_path: Path) -> None:
    add_revisions(tmp_path, {f"org/a@{'1' * 40}": "2" * 40})
    with pytest.raises(ModelError, match=r"damaged \(`org/a@1+` has the other revision 2+\)"):
        read_revisions(tmp_path)


WRITER = """
import sys
from pathlib import Path
from servegrid.study.revisions import add_revisions
for number in range(20):
    add_revisions(Path(sys.argv[1]), {f"org/m{sys.argv[2]}-{number}": "1"})
"""


def test_several_processes_write_the_lock_file_one_after_another(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, str(number)])
        for number in range(4)
    ]
    assert [writer.wait(timeout=250) for writer in writers] == [0] * 4
    assert len(read_revisions(tmp_path)) == 4 * 20


def test_a_file_system_without_locks_gets_the_lock_file_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    add_revisions(tmp_path, {"org/a": "1"})
    assert read_revisions(tmp_path) == {"org/a": "1"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", hubs.HubName("org/name")),
        ("org/name@v1.0", hubs.HubName("org/name", "v1.0")),
        ("org/name@refs/pr/1", hubs.HubName("org/name", "refs/pr/1")),
        ("org/name@../../x", None),
        ("org/name@", None),
        ("name@v1", None),
        ("./a/b", None),
        ("a/b/c", None),
        ("~/model", None),
    ],
)
def test_names_are_parsed(text: str, expected: hubs.HubName | None) -> None:
    assert hubs.HubName.parse(text) == expected
