"""Bundles: made alike twice, verified, opened; every way to tamper is told with its culprit."""

import hashlib
import json
import resource
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from helpers.bundling import (
    HOST,
    STUDY,
    TOKEN,
    TRIALS,
    USER,
    archive_of,
    bundle_of,
    change_request,
    tampered,
    write_results,
    write_sources,
    write_trial,
)
from servegrid.bundle import limits
from servegrid.bundle.derive import Ground, cells_of, write_tables
from servegrid.bundle.opening import open_bundle
from servegrid.bundle.verify import Check, verify
from servegrid.cli.main import main
from servegrid.errors import BundleError
from servegrid.records import parquet
from servegrid.study.config import study_of

CHECKS = ["integrity", "completeness", "validity", "tables", "figures", "secrets"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    write_results(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(workspace: Path) -> Path:
    return bundle_of(workspace)


@pytest.fixture
def partial(workspace: Path, tmp_path: Path) -> Path:
    """Results without one trial, and with half of another."""
    shutil.copytree(workspace / "results", tmp_path / "results")
    shutil.rmtree(tmp_path / "results" / "cells" / TRIALS[1])
    (tmp_path / "results" / "cells" / TRIALS[3] / "telemetry.parquet").unlink()
    return tmp_path


def opened(bundle: Path, folder: Path) -> Path:
    with tarfile.open(bundle) as tar:
        tar.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


def failed(bundle: Path) -> dict[str, str]:
    """The checks that fail, each with its culprits in a line."""
    return {each.name: "; ".join(each.culprits) for each in verify(bundle) if each.status == "FAIL"}


def statuses(checks: list[Check]) -> dict[str, str]:
    return {each.name: each.status for each in checks}


def test_a_bundle_of_the_same_results_has_the_same_bytes(
    bundle: Path, workspace: Path, tmp_path: Path
) -> None:
    shutil.copytree(workspace / "results" / "cells", tmp_path / "results" / "cells")
    for part in ("logs", "plots", "report", "tables"):
        shutil.copytree(workspace / "results" / part, tmp_path / "results" / part)
    write_sources(tmp_path / "repository")
    (tmp_path / "results" / "logs" / "bundle.log").write_text("of an earlier bundle")
    again = bundle_of(tmp_path)
    assert again.name == bundle.name
    assert again.read_bytes() == bundle.read_bytes()


def test_a_bundle_passes_all_checks_and_is_named_by_its_content(
    bundle: Path, tmp_path: Path
) -> None:
    assert statuses(verify(bundle)) == dict.fromkeys(CHECKS, "PASS")
    root = opened(bundle, tmp_path)
    digest = hashlib.sha256((root / "manifest-sha256.txt").read_bytes()).hexdigest()
    assert root.name == f"small-{digest[:16]}"
    assert bundle.name == f"{root.name}.tar.gz"


def test_sha256sum_alone_can_check_it(bundle: Path, tmp_path: Path) -> None:
    root = opened(bundle, tmp_path)
    command = ["sha256sum", "--check", "--strict", "--quiet", "manifest-sha256.txt"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    listed = {
        line.partition("  ")[2] for line in (root / "manifest-sha256.txt").read_text().splitlines()
    }
    files = {each.relative_to(root).as_posix() for each in root.rglob("*") if each.is_file()}
    assert files - listed == {"manifest-sha256.txt"}
    (root / "results/tables/cells.csv").write_text("")
    assert subprocess.run(command, cwd=root, capture_output=True).returncode == 1


def test_it_holds_what_a_reader_needs(bundle: Path, tmp_path: Path) -> None:
    root = opened(bundle, tmp_path)
    files = {each.relative_to(root).as_posix() for each in root.rglob("*") if each.is_file()}
    assert {f"results/cells/{trial}/requests.parquet" for trial in TRIALS} <= files
    assert {
        *(
            "README.md",
            "Snakefile",
            "LICENSE",
            "workflow/rules/all.smk",
            "profiles/site/config.yaml",
        ),
        *("results/tables/cells.parquet", "results/plots/overview.svg", "results/logs/gather.log"),
        *("results/logs/allocations/d.1.7.json", "config/study.json", "environments.json"),
    } <= files
    assert not [name for name in files if "__pycache__" in name or "bundle.log" in name]
    assert (root / "workflow/envs/create.sh").stat().st_mode & 0o100
    assert json.loads((root / "config/study.json").read_text()) == STUDY
    facts = json.loads((root / "bundle.json").read_text())
    assert facts["source"] == {"commit": None, "changed": None}  # of no repository
    assert (facts["partial"], facts["missing"]) == (False, {})
    assert facts["allocations_without_record"] == []
    (environment,) = json.loads((root / "environments.json").read_text())
    assert environment["environment"]["packages"] == {"vllm": "0.32.0"}
    (bring_up,) = environment["bring_ups"]
    assert bring_up["job"]["SLURM_JOB_ID"] == "7"
    model = json.loads((root / "models.json").read_text())["d"]
    assert model["files"] == {"config.json": {"bytes": 3, "sha256": "0" * 64}}
    assert model["revision"] is None


def test_names_and_tokens_are_not_in_it(bundle: Path, tmp_path: Path) -> None:
    root = opened(bundle, tmp_path)
    texts = []
    for path in (each for each in root.rglob("*") if each.is_file()):
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            texts.append(f"{table.schema.metadata} {table.to_pylist()}")
        else:
            texts.append(path.read_bytes().decode("latin-1"))
    together = "\n".join(texts)
    for name in (HOST, "sirocco14", "sirocco15", "miriel01", USER, TOKEN):
        assert name not in together
    # miriel01, sirocco14, sirocco15
    record = parquet.read_record(root / "results/cells" / TRIALS[0] / "requests.parquet")
    assert record["environment"]["node"] == "node-2"
    assert record["environment"]["job"]["SLURM_JOB_NODELIST"] == "node-2,node-3"
    assert record["engine"]["engine_args"] == ["--model", "/home/user/models/m"]
    assert (root / "results/logs/gather.log").read_text() == (
        "node-2: reads /beegfs/user/x with [a Hugging Face token]\n"
        "node-3: Authorization: [a bearer token]\n"
    )


def test_the_measured_rows_are_in_it_as_they_were(
    bundle: Path, workspace: Path, tmp_path: Path
) -> None:
    root = opened(bundle, tmp_path)
    for trial in TRIALS:
        for name in ("requests.parquet", "telemetry.parquet"):
            place = f"results/cells/{trial}/{name}"
            assert pq.read_table(root / place).equals(pq.read_table(workspace / place))
            spec = parquet.read_record(workspace / place)["spec"]
            assert parquet.read_record(root / place)["spec"] == spec


def test_the_commit_and_what_differs_from_it_are_told(partial: Path, tmp_path: Path) -> None:
    root = write_sources(tmp_path / "repository")

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", str(root), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    clean = opened(bundle_of(partial), tmp_path / "clean")
    head = git("rev-parse", "HEAD")
    told = json.loads((clean / "bundle.json").read_text())["source"]
    assert told == {"commit": head, "changed": False}
    assert not (clean / "source.patch").exists()
    (root / "Snakefile").write_text("# other\n")
    changed = opened(bundle_of(partial), tmp_path / "changed")
    told = json.loads((changed / "bundle.json").read_text())["source"]
    assert told == {"commit": head, "changed": True}
    assert "-# Snakefile\n+# other\n" in (changed / "source.patch").read_text()


def test_a_partial_study_says_so_and_lists_what_is_missing(partial: Path, tmp_path: Path) -> None:
    bundle = bundle_of(partial)
    assert bundle.name.startswith("small-partial-")
    checks = {each.name: each for each in verify(bundle)}
    assert statuses([*checks.values()]) == dict.fromkeys(CHECKS, "PASS") | dict.fromkeys(
        ("validity", "tables", "figures"), "SKIP"
    )
    assert checks["completeness"].culprits == [
        f"{TRIALS[1]}: not measured",
        f"{TRIALS[3]}: its record is missing in part, or damaged",
    ]
    root = opened(bundle, tmp_path / "root")
    assert not (root / "results" / "tables").exists()
    assert not (root / "results" / "cells" / TRIALS[3]).exists()
    graph = {
        each["@id"]: each
        for each in json.loads((root / "ro-crate-metadata.json").read_text())["@graph"]
    }
    assert "partial" in graph["./"]["name"]
    assert graph["#run"]["error"] == f"Not measured: {TRIALS[1]}, {TRIALS[3]}"


def test_allocations_whose_record_is_not_there_yet_are_told(partial: Path, tmp_path: Path) -> None:
    (partial / "results/logs/allocations/d.1.7.json").rename(
        partial / "results/logs/allocations/d.1.8.json"
    )
    kept = partial / "results/logs/allocations/d.1.8.json"
    kept.write_text(kept.read_text().replace('"job_id": "7"', '"job_id": "8"'))
    facts = json.loads((opened(bundle_of(partial), tmp_path / "root") / "bundle.json").read_text())
    assert facts["allocations_without_record"] == ["d.1, job 7"]


def test_nothing_measured_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no trial of the study `small` is there"):
        bundle_of(tmp_path)


def test_a_secret_where_it_cannot_be_redacted_is_refused(tmp_path: Path) -> None:
    deployment = STUDY["deployments"][0]
    for change, told in (
        ({"checkpoint": f"/home/{USER}/m"}, "a user's name in a path"),
        ({"engine_args": {"hf_token": "anything"}}, "a value of `hf_token`"),
        ({"engine_args": {"env": TOKEN}}, "a Hugging Face token"),
        ({"checkpoint": "/data/sirocco14/m"}, "the host 'sirocco14'"),
    ):
        folder = tmp_path / told.replace("/", "")
        study = STUDY | {"deployments": [deployment | change]}
        write_trial(folder / "results" / "cells", study_of(study).trials[0])
        with pytest.raises(BundleError) as caught:
            bundle_of(folder, study)
        assert f"config/study.json: {told}" in str(caught.value)
        assert f"{TRIALS[0]}/requests.parquet: {told}" in str(caught.value)
        assert TOKEN not in str(caught.value)
        assert list((folder / "results" / "bundles").iterdir()) == []


def test_a_secret_in_the_sources_is_refused(partial: Path) -> None:
    root = write_sources(partial / "repository")
    (root / "workflow" / "x.py").write_text(f"token = '{TOKEN}'\n")
    with pytest.raises(BundleError, match=r"workflow/x\.py: a Hugging Face token"):
        bundle_of(partial)


def test_a_bundle_that_would_not_pass_is_not_made(workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "results", tmp_path / "results")
    table = tmp_path / "results/tables/d.md"
    table.write_text(table.read_text().replace("20.0", "19.0"))
    with pytest.raises(BundleError) as caught:
        bundle_of(tmp_path)
    assert "results/tables/d.md: line" in str(caught.value)
    assert not [
        each for each in (tmp_path / "results/bundles").iterdir() if each.name in str(caught)
    ]


def flip(root: Path) -> None:
    path = root / "results/plots/overview.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_is_told_with_its_file(bundle: Path, tmp_path: Path) -> None:
    told = failed(tampered(bundle, tmp_path, flip, rehash=False))
    assert (
        "results/plots/overview.png: is not what manifest-sha256.txt was made of"
        in (told["integrity"])
    )
    assert "overview.png: is not what ro-crate-metadata.json describes" in told["integrity"]
    assert "results/plots/overview.png: is not what follows" in told["figures"]


def test_a_byte_flipped_in_the_archive_is_told(bundle: Path, tmp_path: Path) -> None:
    data = bytearray(bundle.read_bytes())
    data[len(data) // 2] ^= 1
    archive = tmp_path / bundle.name
    archive.write_bytes(data)
    told = failed(archive)["integrity"]
    assert "damaged in or after" in told or "is not what manifest-sha256.txt was made of" in told


def test_files_removed_or_added_without_new_hashes_are_told(bundle: Path, tmp_path: Path) -> None:
    def change(root: Path) -> None:
        (root / "results/tables/d.md").unlink()
        (root / "results/tables/more.md").write_text("more")

    told = failed(tampered(bundle, tmp_path, change, rehash=False))
    assert "results/tables/d.md: is missing" in told["integrity"]
    assert "results/tables/more.md: is not in manifest-sha256.txt" in told["integrity"]
    assert "results/tables/d.md: is in ro-crate-metadata.json and not" in told["integrity"]
    assert "results/tables/more.md: is not in ro-crate-metadata.json" in told["integrity"]


def test_a_name_that_is_of_another_content_is_told(bundle: Path, tmp_path: Path) -> None:
    root = opened(bundle, tmp_path / "root")
    members = [
        (f"small-0123456789abcdef/{each.relative_to(root).as_posix()}", each.read_bytes())
        for each in root.rglob("*")
        if each.is_file()
    ]
    told = failed(archive_of(tmp_path / "b.tar.gz", *members))
    assert list(told) == ["integrity"]
    assert "small-0123456789abcdef: the bundle's name is not of its content" in told["integrity"]


def cells(root: Path) -> Path:
    return root / "results" / "cells"


def edit_csv(root: Path) -> None:
    path = root / "results/tables/summary.csv"
    path.write_text(path.read_text().replace(",10.0,", ",9.0,", 1))


def edit_parquet(root: Path) -> None:
    path = root / "results/tables/cells.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[2]["ttft_s_p50"] = 0.09
    parquet.write(table.from_pylist(rows, schema=table.schema), path)


def edit_validity(root: Path) -> None:
    path = root / "results/tables/cells.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[1] |= {"valid": False, "invalid_rules": ["saturated"], "invalid_evidence": ["x"]}
    parquet.write(table.from_pylist(rows, schema=table.schema), path)


def edit_config(root: Path) -> None:
    path = root / "config/study.json"
    config = json.loads(path.read_text())
    config["deployments"][0]["max_model_len"] = 513
    path.write_text(json.dumps(config))


def edit_record(root: Path) -> None:
    for name in ("requests.parquet", "telemetry.parquet"):
        path = cells(root) / TRIALS[0] / name
        table = pq.read_table(path)
        record = parquet.read_record(path)
        record["spec"]["workload"]["prompts"] = "identical"
        metadata = {parquet.RECORD_KEY: json.dumps(record).encode()}
        parquet.write(table.replace_schema_metadata(metadata), path)


TAMPERED: dict[str, tuple[Callable[[Path], Any], dict[str, str]]] = {
    "a cell removed": (
        lambda root: shutil.rmtree(cells(root) / TRIALS[2]),
        {"completeness": f"{TRIALS[2]}: is missing, and the bundle does not say so"},
    ),
    "a cell added": (
        lambda root: shutil.copytree(
            cells(root) / TRIALS[0], cells(root) / "d/burst-c4-i31-o10/trial-1"
        ),
        {"completeness": "d/burst-c4-i31-o10/trial-1: is no trial of the study"},
    ),
    "a trial added": (
        lambda root: shutil.copytree(
            cells(root) / TRIALS[0], cells(root) / "d/burst-c1-i31-o10/trial-3"
        ),
        {"completeness": "d/burst-c1-i31-o10/trial-3: is no trial of the study"},
    ),
    "a trial that is a copy of another": (
        lambda root: shutil.copytree(
            cells(root) / TRIALS[0], cells(root) / TRIALS[1], dirs_exist_ok=True
        ),
        {"completeness": f"{TRIALS[1]}: requests.parquet is of another specification"},
    ),
    "half a trial removed": (
        lambda root: (cells(root) / TRIALS[0] / "telemetry.parquet").unlink(),
        {"completeness": f"{TRIALS[0]}: telemetry.parquet is missing"},
    ),
    "a file beside a record": (
        lambda root: (cells(root) / TRIALS[0] / "x").write_text("x"),
        {"completeness": f"{TRIALS[0]}: x does not belong there"},
    ),
    "a number in a CSV": (
        edit_csv,
        {"tables": "summary.csv: output_tokens_per_s in line 2 is '9.0', '10.0'"},
    ),
    "a number in a Parquet table": (
        edit_parquet,
        {"tables": f"cells.parquet: ttft_s_p50 of {TRIALS[2]} is 0.09, 0.1 follows"},
    ),
    "a table removed": (
        lambda root: (root / "results/tables/d.csv").unlink(),
        {"tables": "results/tables/d.csv: is missing"},
    ),
    "a trial told to be invalid": (
        edit_validity,
        {
            "validity": f"{TRIALS[1]}: not valid (saturated: x) in the table, valid by its",
            "tables": f"valid of {TRIALS[1]} is False, True follows",
        },
    ),
    "a request": (
        lambda root: change_request(root, TRIALS[3], first_token_ns=90_000_000),
        {"tables": f"cells.parquet: ttft_s_mean of {TRIALS[3]} is 0.1, 0.095 follows"},
    ),
    "the configuration": (
        edit_config,
        {"completeness": f"{TRIALS[0]}: requests.parquet is of another specification"},
    ),
    "a record": (
        edit_record,
        {"completeness": f"{TRIALS[0]}: requests.parquet is of another specification"},
    ),
    "a figure": (flip, {"figures": "results/plots/overview.png: is not what follows"}),
    "a token": (
        lambda root: (root / "results/logs/x.log").write_text(TOKEN),
        {"secrets": "results/logs/x.log: a Hugging Face token"},
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_what_is_tampered_with_is_told_though_every_hash_fits(
    bundle: Path, tmp_path: Path, what: str
) -> None:
    change, told = TAMPERED[what]
    found = failed(tampered(bundle, tmp_path, change, rehash=True))
    assert "integrity" not in found
    for name, culprit in told.items():
        assert culprit in found[name]


def test_a_table_made_of_tampered_requests_is_all_that_cannot_be_told(
    bundle: Path, tmp_path: Path
) -> None:
    """Records that were invented together with their tables need a witness, not a check."""

    def forge(root: Path) -> None:
        change_request(root, TRIALS[0], first_token_ns=90_000_000)
        study = study_of(STUDY)
        found = cells_of(study, cells(root))
        ground = Ground(STUDY, cells(root), root / "config/hardware.yaml", *found)
        write_tables(ground, root / "results" / "tables")

    archive = tampered(bundle, tmp_path, forge, rehash=True)
    assert set(failed(archive)) <= {"figures"}
    assert archive.name != bundle.name


def test_figures_of_another_environment_are_skipped_with_the_reason(
    bundle: Path, tmp_path: Path
) -> None:
    def change(root: Path) -> None:
        facts = json.loads((root / "bundle.json").read_text())
        facts["analysis"]["matplotlib"] = "1.0"
        (root / "bundle.json").write_text(json.dumps(facts))

    checks = {each.name: each for each in verify(tampered(bundle, tmp_path, change, rehash=True))}
    assert checks["figures"].status == "SKIP"
    assert "matplotlib 1.0, here" in checks["figures"].found
    assert checks["tables"].status == "PASS"


def test_tables_that_this_version_does_not_derive_are_named(bundle: Path, tmp_path: Path) -> None:
    def change(root: Path) -> None:
        (root / "results/tables/other.csv").write_text("a\n1\n")

    checks = {each.name: each for each in verify(tampered(bundle, tmp_path, change, rehash=True))}
    assert checks["tables"].status == "PASS"
    assert "not derived again: other.csv" in checks["tables"].found


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        data = json.loads((root / name).read_text())
        (root / name).write_text(json.dumps(data | changes))

    return change


HOSTILE_CONTENT = {
    "a study of 10^12 trials": (
        edit_json("config/study.json", workload=STUDY["workload"] | {"trials": 10**12}),
        "completeness",
        "more than 1,000,000 trials",
    ),
    "nested JSON": (
        lambda root: (root / "config/study.json").write_text("[" * 200_000),
        "completeness",
        "study.json: is not JSON",
    ),
    "no study": (
        edit_json("config/study.json", workload=[1]),
        "completeness",
        "load: [1] is not of type object",
    ),
    "another format": (
        edit_json("bundle.json", format=2),
        "completeness",
        "the bundle's format is 2, this version of servegrid reads 1",
    ),
    "missing is no mapping": (edit_json("bundle.json", missing=3), "completeness", "Error"),
    "a record that is text": (
        lambda root: (cells(root) / TRIALS[0] / "requests.parquet").write_text("x"),
        "tables",
        "requests.parquet is damaged",
    ),
    "a table that is text": (
        lambda root: (root / "results/tables/cells.parquet").write_text("x"),
        "tables",
        "results/tables/cells.parquet: cannot be read",
    ),
}


@pytest.mark.parametrize("what", HOSTILE_CONTENT)
def test_hostile_content_fails_its_check_and_breaks_nothing(
    bundle: Path, tmp_path: Path, what: str
) -> None:
    change, name, told = HOSTILE_CONTENT[what]
    assert told in failed(tampered(bundle, tmp_path, change, rehash=True))[name]


def test_an_archive_that_is_not_safe_fails_and_the_rest_is_skipped(tmp_path: Path) -> None:
    link = tarfile.TarInfo("small-1/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    checks = verify(archive_of(tmp_path / "b.tar.gz", ("small-1/a", b"a"), link))
    assert statuses(checks) == dict.fromkeys(CHECKS, "SKIP") | {"integrity": "FAIL"}
    assert "'small-1/link': is a symbolic link" in checks[0].culprits[0]


def test_the_command_verify_tells_each_check_and_fails_by_its_status(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(bundle)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["PASS", name] for name in CHECKS]
    change = TAMPERED["a cell removed"][0]
    assert main(["verify", str(tampered(bundle, tmp_path, change, rehash=True))]) == 1
    told = capsys.readouterr().out
    assert f"FAIL  completeness  4 of 4 trials\n      {TRIALS[2]}: is missing" in told
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_an_opened_bundle_is_a_repository_with_its_results(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "study"
    assert main(["unpack", str(bundle), str(folder)]) == 0
    assert f"--configfile {folder}/config/study.json" in capsys.readouterr().out
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["study"]
    assert (folder / "Snakefile").read_text() == "# Snakefile\n"
    files = [each for each in folder.rglob("*") if each.is_file()]
    assert {each.stat().st_mtime for each in files} == {1.0}
    assert main(["unpack", str(bundle), str(folder)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_without_a_folder_it_is_opened_under_its_own_name(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_bundle(bundle) == Path(bundle.name.removesuffix(".tar.gz"))
    with pytest.raises(BundleError, match="is there already"):
        open_bundle(bundle)


def test_what_is_not_whole_is_not_opened(bundle: Path, tmp_path: Path) -> None:
    archive = tampered(bundle, tmp_path, flip, rehash=False)
    target = tmp_path / "new" / "study"
    with pytest.raises(BundleError, match=r"overview\.png: is not what"):
        open_bundle(archive, target)
    assert list((tmp_path / "new").iterdir()) == []


def test_the_crate_follows_its_profiles(bundle: Path, tmp_path: Path) -> None:
    """The rules of RO-Crate 1.1, Workflow RO-Crate 1.0 and Workflow Run Crate 0.5 that say MUST."""
    root = opened(bundle, tmp_path)
    crate = json.loads((root / "ro-crate-metadata.json").read_text())
    assert "https://w3id.org/ro/crate/1.1/context" in crate["@context"]
    assert "https://w3id.org/ro/terms/workflow-run/context" in crate["@context"]
    entities = {each["@id"]: each for each in crate["@graph"]}
    assert len(entities) == len(crate["@graph"])

    def references(value: Any) -> list[str]:
        values = value if isinstance(value, list) else [value]
        return [each["@id"] for each in values if isinstance(each, dict)]

    web = ("https://w3id.org/ro/crate/1.1", "http://schema.org/", "https://snakemake.")
    for entity in entities.values():
        for key, value in entity.items():
            for target in references(value) if not key.startswith("@") else []:
                assert target in entities or target.startswith(web), (entity["@id"], key)

    descriptor = entities["ro-crate-metadata.json"]
    assert descriptor["about"] == {"@id": "./"}
    assert references(descriptor["conformsTo"]) == [
        "https://w3id.org/ro/crate/1.1",
        "https://w3id.org/workflowhub/workflow-ro-crate/1.0",
    ]
    dataset = entities["./"]
    assert dataset["@type"] == "Dataset"
    assert dataset["name"] == "Study small"
    assert dataset["description"]
    assert dataset["datePublished"] == "2026-01-01T00:00:02+00:00"  # the end of the last load
    for profile in ("process/0.5", "workflow/0.5"):
        entity = entities[f"https://w3id.org/ro/wfrun/{profile}"]
        assert (entity["@type"], entity["version"]) == ("CreativeWork", "0.5")
        assert f"https://w3id.org/ro/wfrun/{profile}" in references(dataset["conformsTo"])
    workflow = entities[dataset["mainEntity"]["@id"]]
    assert workflow["@type"] == ["File", "SoftwareSourceCode", "ComputationalWorkflow"]
    language = entities[workflow["programmingLanguage"]["@id"]]
    assert language["@type"] == "ComputerLanguage"
    (run,) = (entities[each] for each in references(dataset["mentions"]))
    assert run["@type"] == "CreateAction"
    assert run["instrument"] == {"@id": workflow["@id"]}
    assert references(run["object"]) == ["config/study.json"]
    assert f"results/cells/{TRIALS[0]}/requests.parquet" in references(run["result"])
    assert run["startTime"] == "2026-01-01T00:00:00+00:00"
    assert run["endTime"] == "2026-01-01T00:00:02+00:00"
    files = {each.relative_to(root).as_posix() for each in root.rglob("*") if each.is_file()}
    assert set(references(dataset["hasPart"])) == files - {"ro-crate-metadata.json"}
    for name in files - {"ro-crate-metadata.json", "manifest-sha256.txt"}:
        data = (root / name).read_bytes()
        assert entities[name]["contentSize"] == len(data)
        assert entities[name]["sha256"] == hashlib.sha256(data).hexdigest()


def test_a_table_that_unpacks_to_more_than_memory_fails_its_check(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of 1 MB, once in the file, for each of 600 requests."""

    def change(root: Path) -> None:
        path = cells(root) / TRIALS[0] / "requests.parquet"
        table = pq.read_table(path)
        rows = [table.to_pylist()[0] | {"error": "e" * 10**6}] * 600
        parquet.write(table.from_pylist(rows, schema=table.schema), path)
        assert path.stat().st_size < 10**6

    archive = tampered(bundle, tmp_path, change, rehash=True)
    monkeypatch.setattr(limits, "MEMORY_BYTES", 2**28)
    before = resource.getrlimit(resource.RLIMIT_AS)
    told = failed(archive)
    assert "integrity" not in told
    assert f"{TRIALS[0]}: requests.parquet is damaged" in told["tables"]
    assert "of size" in told["tables"]
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_what_a_bundle_says_cannot_move_a_terminal_s_cursor(bundle: Path, tmp_path: Path) -> None:
    change = edit_json("bundle.json", missing={"\x1b[2Jgone": "why"}, partial=True)
    archive = tampered(bundle, tmp_path, change, rehash=True)
    told = "\n".join(check.told() for check in verify(archive))
    assert "\\x1b[2Jgone: is told to be missing" in told
    assert "\x1b" not in told
