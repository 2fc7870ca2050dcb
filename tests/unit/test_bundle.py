"""Bundles are reproducible, can be verified and unpacked, and every way to tamper is detected."""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from helpers.bundling import (
    HARDWARE,
    HOST,
    STUDY,
    TOKEN,
    TRIALS,
    USER,
    change_request,
    make_bundle,
    tamper,
    write_results,
    write_sources,
    write_tar,
    write_trial,
)
from servegrid.analysis.tables import gather_study
from servegrid.bundle.check import PASS, SKIP, Check
from servegrid.bundle.derive import AnalysisInputs, write_tables
from servegrid.bundle.pack import Sources, pack
from servegrid.bundle.unpack import unpack_bundle
from servegrid.bundle.verify import verify
from servegrid.cli.main import main
from servegrid.errors import BundleError
from servegrid.records import parquet
from servegrid.study.config import parse_study

CHECKS = ["integrity", "completeness", "validity", "tables", "figures", "secrets"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    write_results(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(workspace: Path) -> Path:
    return make_bundle(workspace)


@pytest.fixture
def partial(workspace: Path, tmp_path: Path) -> Path:
    """Results without one trial, and with half of another."""
    shutil.copytree(workspace / "results", tmp_path / "results")
    shutil.rmtree(tmp_path / "results" / "cells" / TRIALS[1])
    (tmp_path / "results" / "cells" / TRIALS[3] / "telemetry.parquet").unlink()
    return tmp_path


def extract(bundle: Path, folder: Path) -> Path:
    """The root folder of the bundle."""
    with tarfile.open(bundle) as tar:
        tar.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


def failed(bundle: Path) -> dict[str, str]:
    """The checks that fail, each with its details in one line."""
    checks = verify(bundle)
    return {check.name: "; ".join(check.details) for check in checks if check.status == "FAIL"}


def statuses(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


def test_a_bundle_of_the_same_results_has_the_same_bytes(
    bundle: Path, workspace: Path, tmp_path: Path
) -> None:
    shutil.copytree(workspace / "results" / "cells", tmp_path / "results" / "cells")
    for part in ("logs", "plots", "report", "tables"):
        shutil.copytree(workspace / "results" / part, tmp_path / "results" / part)
    write_sources(tmp_path / "repository")
    (tmp_path / "results" / "logs" / "bundle.log").write_text("log of an earlier bundle")
    again = make_bundle(tmp_path)
    assert again.name == bundle.name
    assert again.read_bytes() == bundle.read_bytes()


def test_a_bundle_passes_all_checks_and_its_name_has_the_digest(
    bundle: Path, tmp_path: Path
) -> None:
    assert statuses(verify(bundle)) == dict.fromkeys(CHECKS, "PASS")
    root = extract(bundle, tmp_path)
    digest = hashlib.sha256((root / "manifest-sha256.txt").read_bytes()).hexdigest()
    assert root.name == f"small-{digest[:16]}"
    assert bundle.name == f"{root.name}.tar.gz"


def test_sha256sum_alone_can_check_a_bundle(bundle: Path, tmp_path: Path) -> None:
    root = extract(bundle, tmp_path)
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


def test_a_bundle_contains_what_a_reader_needs(bundle: Path, tmp_path: Path) -> None:
    root = extract(bundle, tmp_path)
    files = {each.relative_to(root).as_posix() for each in root.rglob("*") if each.is_file()}
    assert {f"results/cells/{trial}/requests.parquet" for trial in TRIALS} <= files
    assert {
        *(
            "README.md",
            "source/Snakefile",
            "source/LICENSE",
            "source/workflow/rules/all.smk",
            "source/profiles/site/config.yaml",
        ),
        *("results/tables/cells.parquet", "results/plots/overview.svg", "results/logs/gather.log"),
        *("results/logs/allocations/d.1.7.json", "config/study.json", "environments.json"),
    } <= files
    assert not [name for name in files if "__pycache__" in name or "bundle.log" in name]
    assert not [name for name in files if (root / name).stat().st_mode & 0o111]
    assert json.loads((root / "config/study.json").read_text()) == STUDY
    metadata = json.loads((root / "bundle.json").read_text())
    assert metadata["source"] == {"commit": None, "changed": None}  # no repository
    assert (metadata["partial"], metadata["missing"]) == (False, {})
    assert metadata["allocations_without_record"] == []
    (environment,) = json.loads((root / "environments.json").read_text())
    assert environment["environment"]["packages"] == {"vllm": "0.32.0"}
    (bring_up,) = environment["bring_ups"]
    assert bring_up["job"]["SLURM_JOB_ID"] == "7"
    model = json.loads((root / "models.json").read_text())["d"]
    assert model["files"] == {"config.json": {"bytes": 3, "sha256": "0" * 64}}
    assert model["revision"] is None


def test_a_bundle_contains_no_names_and_no_tokens(bundle: Path, tmp_path: Path) -> None:
    root = extract(bundle, tmp_path)
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


def test_a_bundle_contains_the_measured_rows_unchanged(
    bundle: Path, workspace: Path, tmp_path: Path
) -> None:
    root = extract(bundle, tmp_path)
    for trial in TRIALS:
        for name in ("requests.parquet", "telemetry.parquet"):
            place = f"results/cells/{trial}/{name}"
            assert pq.read_table(root / place).equals(pq.read_table(workspace / place))
            spec = parquet.read_record(workspace / place)["spec"]
            assert parquet.read_record(root / place)["spec"] == spec


def test_a_bundle_has_the_commit_and_the_changes_to_it(partial: Path, tmp_path: Path) -> None:
    root = write_sources(tmp_path / "repository")

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", str(root), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    clean = extract(make_bundle(partial), tmp_path / "clean")
    head = git("rev-parse", "HEAD")
    source = json.loads((clean / "bundle.json").read_text())["source"]
    assert source == {"commit": head, "changed": False}
    assert not (clean / "source.patch").exists()
    (root / "Snakefile").write_text("# other\n")
    changed = extract(make_bundle(partial), tmp_path / "changed")
    source = json.loads((changed / "bundle.json").read_text())["source"]
    assert source == {"commit": head, "changed": True}
    assert "-# Snakefile\n+# other\n" in (changed / "source.patch").read_text()


def test_a_partial_bundle_says_so_and_lists_missing_trials(partial: Path, tmp_path: Path) -> None:
    bundle = make_bundle(partial)
    assert bundle.name.startswith("small-partial-")
    checks = {each.name: each for each in verify(bundle)}
    assert statuses([*checks.values()]) == dict.fromkeys(CHECKS, "PASS") | dict.fromkeys(
        ("validity", "tables", "figures"), "SKIP"
    )
    assert checks["completeness"].details == [
        f"{TRIALS[1]}: not measured",
        f"{TRIALS[3]}: its record is incomplete or damaged",
    ]
    root = extract(bundle, tmp_path / "root")
    assert not (root / "results" / "tables").exists()
    assert not (root / "results" / "cells" / TRIALS[3]).exists()
    graph = {
        each["@id"]: each
        for each in json.loads((root / "ro-crate-metadata.json").read_text())["@graph"]
    }
    assert "partial" in graph["./"]["name"]
    assert graph["#run"]["error"] == f"Not measured: {TRIALS[1]}, {TRIALS[3]}"


def test_a_bundle_lists_allocations_without_a_record(partial: Path, tmp_path: Path) -> None:
    (partial / "results/logs/allocations/d.1.7.json").rename(
        partial / "results/logs/allocations/d.1.8.json"
    )
    kept = partial / "results/logs/allocations/d.1.8.json"
    kept.write_text(kept.read_text().replace('"job_id": "7"', '"job_id": "8"'))
    root = extract(make_bundle(partial), tmp_path / "root")
    metadata = json.loads((root / "bundle.json").read_text())
    assert metadata["allocations_without_record"] == ["d.1, job 7"]


def test_a_study_without_measurements_cannot_be_bundled(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="contains no trial of the study `small`"):
        make_bundle(tmp_path)


@pytest.mark.parametrize("limit", ["MEMBERS", "TOTAL_BYTES"])
def test_results_beyond_the_limits_of_a_bundle_are_refused_before_they_are_copied(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    # Without the bundles that other tests have packed there.
    ignored = shutil.ignore_patterns("bundles")
    shutil.copytree(workspace / "results", tmp_path / "results", ignore=ignored)
    monkeypatch.setattr(f"servegrid.bundle.tarball.{limit}", 10)
    monkeypatch.setattr("servegrid.bundle.pack.stage_redacted", None)
    with pytest.raises(BundleError, match=r"files with .* bytes\. .*Split the study"):
        make_bundle(tmp_path)
    assert not any((tmp_path / "results" / "bundles").iterdir())


def test_a_secret_that_cannot_be_redacted_is_refused(tmp_path: Path) -> None:
    deployment = STUDY["deployments"][0]
    for change, kind in (
        ({"checkpoint": f"/home/{USER}/m"}, "a user name in a path"),
        ({"engine_args": {"hf_token": "anything"}}, "a value of `hf_token`"),
        ({"engine_args": {"env": TOKEN}}, "a Hugging Face token"),
        ({"checkpoint": "/data/sirocco14/m"}, "the host 'sirocco14'"),
    ):
        folder = tmp_path / kind.replace("/", "")
        study = STUDY | {"deployments": [deployment | change]}
        write_trial(folder / "results" / "cells", parse_study(study).trials[0])
        with pytest.raises(BundleError) as caught:
            make_bundle(folder, study)
        assert f"config/study.json: {kind}" in str(caught.value)
        assert f"{TRIALS[0]}/requests.parquet: {kind}" in str(caught.value)
        assert TOKEN not in str(caught.value)
        assert list((folder / "results" / "bundles").iterdir()) == []


def test_a_secret_in_the_sources_is_refused(partial: Path) -> None:
    root = write_sources(partial / "repository")
    (root / "workflow" / "x.py").write_text(f"token = '{TOKEN}'\n")
    with pytest.raises(BundleError, match=r"workflow/x\.py: a Hugging Face token"):
        make_bundle(partial)


def test_a_bundle_that_does_not_pass_verify_is_not_made(workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "results", tmp_path / "results")
    table = tmp_path / "results/tables/d.md"
    table.write_text(table.read_text().replace("20.0", "19.0"))
    with pytest.raises(BundleError) as caught:
        make_bundle(tmp_path)
    assert "results/tables/d.md: line" in str(caught.value)
    assert not [
        each for each in (tmp_path / "results/bundles").iterdir() if each.name in str(caught)
    ]


def flip(root: Path) -> None:
    path = root / "results/plots/overview.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_is_reported_with_its_file(bundle: Path, tmp_path: Path) -> None:
    problems = failed(tamper(bundle, tmp_path, flip, rehash=False))
    assert (
        "results/plots/overview.png: differs from its hash in manifest-sha256.txt"
        in (problems["integrity"])
    )
    assert (
        "overview.png: differs from its description in ro-crate-metadata.json"
        in problems["integrity"]
    )
    assert "results/plots/overview.png: differs from the figure" in problems["figures"]


def test_a_byte_flipped_in_the_archive_is_reported(bundle: Path, tmp_path: Path) -> None:
    data = bytearray(bundle.read_bytes())
    data[len(data) // 2] ^= 1
    archive = tmp_path / bundle.name
    archive.write_bytes(data)
    problems = failed(archive)["integrity"]
    assert (
        "damaged in or after" in problems
        or "differs from its hash in manifest-sha256.txt" in problems
    )


def test_files_removed_or_added_without_new_hashes_are_reported(
    bundle: Path, tmp_path: Path
) -> None:
    def change(root: Path) -> None:
        (root / "results/tables/d.md").unlink()
        (root / "results/tables/more.md").write_text("more")

    problems = failed(tamper(bundle, tmp_path, change, rehash=False))
    assert "results/tables/d.md: is missing" in problems["integrity"]
    assert "results/tables/more.md: is not in manifest-sha256.txt" in problems["integrity"]
    assert "results/tables/d.md: is in ro-crate-metadata.json but not" in problems["integrity"]
    assert "results/tables/more.md: is not in ro-crate-metadata.json" in problems["integrity"]


def test_a_name_that_does_not_fit_the_content_is_reported(bundle: Path, tmp_path: Path) -> None:
    root = extract(bundle, tmp_path / "root")
    members = [
        (f"small-0123456789abcdef/{each.relative_to(root).as_posix()}", each.read_bytes())
        for each in root.rglob("*")
        if each.is_file()
    ]
    problems = failed(write_tar(tmp_path / "b.tar.gz", *members))
    assert list(problems) == ["integrity"]
    assert (
        "small-0123456789abcdef: the bundle's name does not match the digest of its content"
        in problems["integrity"]
    )


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
    parquet.write_table(table.from_pylist(rows, schema=table.schema), path)


def edit_validity(root: Path) -> None:
    path = root / "results/tables/cells.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[1] |= {"valid": False, "invalid_rules": ["saturated"], "invalid_evidence": ["x"]}
    parquet.write_table(table.from_pylist(rows, schema=table.schema), path)


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
        parquet.write_table(table.replace_schema_metadata(metadata), path)


TAMPERED: dict[str, tuple[Callable[[Path], Any], dict[str, str]]] = {
    "a cell removed": (
        lambda root: shutil.rmtree(cells(root) / TRIALS[2]),
        {"completeness": f"{TRIALS[2]}: is missing, and bundle.json does not list it"},
    ),
    "a cell added": (
        lambda root: shutil.copytree(
            cells(root) / TRIALS[0], cells(root) / "d/burst-c4-i31-o10/trial-1"
        ),
        {"completeness": "d/burst-c4-i31-o10/trial-1: is not a trial of the study"},
    ),
    "a trial added": (
        lambda root: shutil.copytree(
            cells(root) / TRIALS[0], cells(root) / "d/burst-c1-i31-o10/trial-3"
        ),
        {"completeness": "d/burst-c1-i31-o10/trial-3: is not a trial of the study"},
    ),
    "a trial that is a copy of another": (
        lambda root: shutil.copytree(
            cells(root) / TRIALS[0], cells(root) / TRIALS[1], dirs_exist_ok=True
        ),
        {"completeness": f"{TRIALS[1]}: requests.parquet has a different specification"},
    ),
    "half a trial removed": (
        lambda root: (cells(root) / TRIALS[0] / "telemetry.parquet").unlink(),
        {"completeness": f"{TRIALS[0]}: telemetry.parquet is missing"},
    ),
    "a number in a CSV": (
        edit_csv,
        {"tables": "summary.csv: output_tokens_per_s in line 2 is '9.0'; the records give '10.0'"},
    ),
    "a number in a Parquet table": (
        edit_parquet,
        {"tables": f"cells.parquet: ttft_s_p50 of {TRIALS[2]} is 0.09; the records give 0.1"},
    ),
    "a table removed": (
        lambda root: (root / "results/tables/d.csv").unlink(),
        {"tables": "results/tables/d.csv: is missing"},
    ),
    "a valid trial marked as not valid": (
        edit_validity,
        {
            "validity": f"{TRIALS[1]}: not valid (saturated: x) in the table, valid in its",
            "tables": f"valid of {TRIALS[1]} is False; the records give True",
        },
    ),
    "a request": (
        lambda root: change_request(root, TRIALS[3], first_token_ns=90_000_000),
        {"tables": f"cells.parquet: ttft_s_mean of {TRIALS[3]} is 0.1; the records give 0.095"},
    ),
    "the configuration": (
        edit_config,
        {"completeness": f"{TRIALS[0]}: requests.parquet has a different specification"},
    ),
    "a record": (
        edit_record,
        {"completeness": f"{TRIALS[0]}: requests.parquet has a different specification"},
    ),
    "a figure": (flip, {"figures": "results/plots/overview.png: differs from the figure"}),
    "a token": (
        lambda root: (root / "results/logs/x.log").write_text(TOKEN),
        {"secrets": "results/logs/x.log: a Hugging Face token"},
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_tampering_is_detected_even_if_every_hash_fits(
    bundle: Path, tmp_path: Path, what: str
) -> None:
    change, expected = TAMPERED[what]
    found = failed(tamper(bundle, tmp_path, change, rehash=True))
    assert "integrity" not in found
    for name, problem in expected.items():
        assert problem in found[name]


def test_records_that_were_forged_with_their_tables_are_not_detected(
    bundle: Path, tmp_path: Path
) -> None:
    """No check can detect them. A published bundle name can."""

    def forge(root: Path) -> None:
        change_request(root, TRIALS[0], first_token_ns=90_000_000)
        derived = gather_study(parse_study(STUDY), cells(root))
        inputs = AnalysisInputs(STUDY, cells(root), root / "config/hardware.yaml", *derived)
        write_tables(inputs, root / "results" / "tables")

    archive = tamper(bundle, tmp_path, forge, rehash=True)
    assert set(failed(archive)) <= {"figures"}
    assert archive.name != bundle.name


def test_published_data_in_a_file_is_in_the_bundle_and_verified(
    workspace: Path, tmp_path: Path
) -> None:
    published = tmp_path / "elsewhere" / "mine.csv"
    published.parent.mkdir()
    published.write_text(
        "model,quantization,gpu,gpu_count,protocol,concurrency,input_len,output_len,"
        "seconds_per_100_tokens\nm,q,cpu,1,burst,1,31,10,9.5\n"
    )
    study = STUDY | {"published": str(published)}
    write_results(tmp_path, study)
    bundle = make_bundle(tmp_path, study)
    published.unlink()
    assert statuses(verify(bundle)) == dict.fromkeys(CHECKS, "PASS")
    root = extract(bundle, tmp_path / "root")
    assert json.loads((root / "config/study.json").read_text())["published"] == "config/mine.csv"
    assert "9.5" in (root / "config/mine.csv").read_text()
    assert "mine.csv" in (root / "results/tables/published.md").read_text()


def test_verify_reads_no_published_data_from_this_machine(bundle: Path, tmp_path: Path) -> None:
    private = tmp_path / "private.csv"
    private.write_text("secret\n")
    for name in (str(private), "../private.csv", "config/none.csv"):
        folder = tmp_path / name.replace("/", "-")
        change = edit_json("config/study.json", published=name)
        problems = failed(tamper(bundle, folder, change, rehash=True))["tables"]
        assert "is missing, or larger than" in problems
        assert "secret" not in problems


def test_packing_and_verifying_report_each_step(workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "results" / "cells", tmp_path / "results" / "cells")
    shutil.rmtree(tmp_path / "results" / "cells" / TRIALS[1])
    sources = Sources(write_sources(tmp_path / "repository"), HARDWARE)
    steps: list[tuple[str, int, int]] = []
    packed = pack(STUDY, sources, tmp_path, report=lambda *step: steps.append(step))
    assert [done for _, done, _ in steps] == list(range(11))
    assert {total for _, _, total in steps} == {11}
    assert [name for name, _, _ in steps][3:6] == [
        *("write archive", "verify unpack", "verify integrity"),
    ]
    steps.clear()
    verify(packed.archive, lambda *step: steps.append(step))
    assert steps == [(name, done, 7) for done, name in enumerate(["unpack", *CHECKS])]


def test_figures_from_another_environment_are_skipped_with_the_reason(
    bundle: Path, tmp_path: Path
) -> None:
    def change(root: Path) -> None:
        metadata = json.loads((root / "bundle.json").read_text())
        metadata["analysis"]["matplotlib"] = "1.0"
        (root / "bundle.json").write_text(json.dumps(metadata))

    checks = {each.name: each for each in verify(tamper(bundle, tmp_path, change, rehash=True))}
    assert checks["figures"].status == "SKIP"
    assert "matplotlib 1.0, here" in checks["figures"].summary
    assert checks["tables"].status == "PASS"


def test_tables_that_this_version_does_not_derive_are_listed(bundle: Path, tmp_path: Path) -> None:
    def change(root: Path) -> None:
        (root / "results/tables/other.csv").write_text("a\n1\n")

    checks = {each.name: each for each in verify(tamper(bundle, tmp_path, change, rehash=True))}
    assert checks["tables"].status == "PASS"
    assert "not derived: other.csv" in checks["tables"].summary


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        data = json.loads((root / name).read_text())
        (root / name).write_text(json.dumps(data | changes))

    return change


HOSTILE_CONTENT = {
    "a study of 10^9 trials": (
        edit_json("config/study.json", workload=STUDY["workload"] | {"trials": 10**9}),
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
        "workload: [1] is not a mapping",
    ),
    "another format": (
        edit_json("bundle.json", format=1),
        "completeness",
        "the bundle has format 1; this version of servegrid reads format 2",
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
def test_hostile_content_fails_its_check_and_breaks_nothing_else(
    bundle: Path, tmp_path: Path, what: str
) -> None:
    change, name, problem = HOSTILE_CONTENT[what]
    assert problem in failed(tamper(bundle, tmp_path, change, rehash=True))[name]


def test_an_unsafe_archive_fails_and_the_other_checks_are_skipped(tmp_path: Path) -> None:
    link = tarfile.TarInfo("small-1/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    checks = verify(write_tar(tmp_path / "b.tar.gz", ("small-1/README.md", b"a"), link))
    assert statuses(checks) == dict.fromkeys(CHECKS, "SKIP") | {"integrity": "FAIL"}
    assert "'small-1/link': is a symbolic link" in checks[0].details[0]


def test_the_command_verify_prints_each_check_and_sets_the_exit_status(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(bundle)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["PASS", name] for name in CHECKS]
    change = TAMPERED["a cell removed"][0]
    assert main(["verify", str(tamper(bundle, tmp_path, change, rehash=True))]) == 1
    printed = capsys.readouterr().out
    assert f"FAIL  completeness  4 of 4 trials\n      {TRIALS[2]}: is missing" in printed
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_an_unpacked_bundle_is_a_repository_with_its_results(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "study"
    assert main(["unpack", str(bundle), str(folder)]) == 0
    assert f"--configfile {folder}/config/study.json" in capsys.readouterr().out
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["study"]
    assert (folder / "source/Snakefile").read_text() == "# Snakefile\n"
    files = [each for each in folder.rglob("*") if each.is_file()]
    dates = {each.relative_to(folder).parts[:2]: each.stat().st_mtime for each in files}
    assert dates.pop(("results", "cells")) == 2.0  # newer than the tables
    assert set(dates.values()) == {1.0}
    assert main(["unpack", str(bundle), str(folder)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_one_error(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file/study"
    assert main(["unpack", str(bundle), str(folder)]) == 2
    assert capsys.readouterr().err.startswith(f"servegrid: {folder}: cannot be written (")


@pytest.mark.parametrize("command", ["verify", "unpack"])
def test_a_folder_is_no_bundle(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path)]) == 2
    expected = f"servegrid: {tmp_path}: is a folder. Name the bundle, a .tar.gz file.\n"
    assert capsys.readouterr().err == expected


def test_a_bundle_is_unpacked_under_its_own_name_by_default(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert unpack_bundle(bundle) == Path(bundle.name.removesuffix(".tar.gz"))
    with pytest.raises(BundleError, match="already exists"):
        unpack_bundle(bundle)


def test_a_damaged_bundle_is_not_unpacked(bundle: Path, tmp_path: Path) -> None:
    archive = tamper(bundle, tmp_path, flip, rehash=False)
    target = tmp_path / "new" / "study"
    with pytest.raises(BundleError, match=r"overview\.png: differs from its hash"):
        unpack_bundle(archive, target)
    assert list((tmp_path / "new").iterdir()) == []


def test_the_crate_follows_its_profiles(bundle: Path, tmp_path: Path) -> None:
    """All MUST rules of RO-Crate 1.1, Workflow RO-Crate 1.0 and Workflow Run Crate 0.5."""
    root = extract(bundle, tmp_path)
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
    assert dataset["datePublished"] == "2026-01-01T00:00:02+00:00"  # the end of the last workload
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


# In a process of its own: this one may have memory that other tests have freed, and reuse it.
VERIFY_WITH_LITTLE_MEMORY = """
import json, resource, sys
from pathlib import Path
from servegrid.bundle import limits
from servegrid.bundle.verify import verify
limits.MEMORY_BYTES = 2**28
before = resource.getrlimit(resource.RLIMIT_AS)
checks = verify(Path(sys.argv[1]))
assert resource.getrlimit(resource.RLIMIT_AS) == before
print(json.dumps({check.name: "; ".join(check.details) for check in checks
                  if check.status == "FAIL"}))
"""


def test_a_table_that_needs_too_much_memory_fails_its_check(bundle: Path, tmp_path: Path) -> None:
    """The file contains a text of 1 MB once, but 600 requests refer to it."""

    def change(root: Path) -> None:
        path = cells(root) / TRIALS[0] / "requests.parquet"
        table = pq.read_table(path)
        rows = [table.to_pylist()[0] | {"error": "e" * 10**6}] * 600
        parquet.write_table(table.from_pylist(rows, schema=table.schema), path)
        assert path.stat().st_size < 10**6

    archive = tamper(bundle, tmp_path, change, rehash=True)
    command = [sys.executable, "-c", VERIFY_WITH_LITTLE_MEMORY, str(archive)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    problems = json.loads(done.stdout.splitlines()[-1])
    assert "integrity" not in problems
    assert f"{TRIALS[0]}: requests.parquet is damaged" in problems["tables"]
    assert "of size" in problems["tables"]


def test_text_from_a_bundle_cannot_move_the_terminal_s_cursor(bundle: Path, tmp_path: Path) -> None:
    change = edit_json("bundle.json", missing={"\x1b[2Jgone": "why"}, partial=True)
    archive = tamper(bundle, tmp_path, change, rehash=True)
    text = "\n".join(check.format() for check in verify(archive))
    assert "\\x1b[2Jgone: bundle.json lists it as missing" in text
    assert "\x1b" not in text


def test_a_bundle_leaves_out_the_file_of_a_workload_and_verifies_without_it(
    tmp_path: Path,
) -> None:
    chats = tmp_path / "confidential" / "chats.jsonl"
    chats.parent.mkdir()
    chats.write_text('{"prompt": "a private question"}\n', encoding="utf-8")
    source = {"kind": "file", "path": str(chats)}
    workload = {"concurrency": 1, "input_len": 31, "output_len": 10, "source": source}
    study = {**STUDY, "workload": workload}
    write_results(tmp_path, study)
    bundle = make_bundle(tmp_path, study)
    chats.unlink()
    assert {check.status for check in verify(bundle)} == {PASS}
    with tarfile.open(bundle) as tar:
        for member in tar:
            assert "chats" not in member.name
            if (file := tar.extractfile(member)) is not None:
                content = file.read()
                assert b"private question" not in content and b"confidential" not in content


def test_a_bundle_has_the_figures_of_the_plans_users_and_not_their_trace(tmp_path: Path) -> None:
    trace = tmp_path / "confidential" / "trace.csv"
    trace.parent.mkdir()
    rows = [f"{number},session-of-alice,31,9\n" for number in range(100)]
    head = "Timestamp,Session ID,Request tokens,Response tokens\n"
    trace.write_text(head + "".join(rows), encoding="utf-8")
    study = {**STUDY, "capacity": {"users_from": {"kind": "trace", "path": str(trace)}}}
    write_results(tmp_path, study)
    bundle = make_bundle(tmp_path, study)
    trace.unlink()
    assert {check.status for check in verify(bundle)} == {PASS}
    root = extract(bundle, tmp_path / "extracted")
    for path in root.rglob("*"):
        assert "trace.csv" not in path.name
        if path.is_file():
            content = path.read_bytes()
            assert b"of-alice" not in content and b"confidential" not in content
    report = (root / "results/tables/capacity.md").read_text(encoding="utf-8")
    assert "1.01 requests/s (100 requests)" in report
    facts = json.loads((root / "config/study.json").read_text())["capacity"]["users_from"]["facts"]
    assert (facts["requests"], facts["input_lens"], facts["cycle_s"]) == (100, [[31, 100]], 1)

    def change(tree: Path) -> None:
        """Another rate, as if more users had been recorded."""
        path = tree / "config/study.json"
        config = json.loads(path.read_text())
        config["capacity"]["users_from"]["facts"]["window_requests"] = 50
        path.write_text(json.dumps(config))

    problems = failed(tamper(bundle, tmp_path, change, rehash=True))
    assert "capacity.parquet" in problems["tables"]


def test_a_bundle_cannot_name_a_file_of_this_machine_as_the_plans_users(
    bundle: Path, tmp_path: Path
) -> None:
    def change(tree: Path) -> None:
        path = tree / "config/study.json"
        users_from = {"kind": "trace", "path": "/etc/passwd"}
        config = json.loads(path.read_text()) | {"capacity": {"users_from": users_from}}
        path.write_text(json.dumps(config))

    problems = failed(tamper(bundle, tmp_path, change, rehash=True))
    assert "users_from: `path`, the file, is missing" in problems["completeness"]
    assert "passwd" not in " ".join(problems.values())


def write_chats(folder: Path, text: str) -> tuple[Path, dict[str, Any]]:
    """A file of a user, a study that asks for it in bundles, and its results but one.

    A partial bundle has no tables and figures, so it is quick to make.
    """
    chats = folder / "confidential" / "chats.jsonl"
    chats.parent.mkdir()
    chats.write_text(2 * (json.dumps({"prompt": text}) + "\n"), encoding="utf-8")
    source = {"kind": "file", "path": str(chats), "in_bundle": True}
    workload = {"concurrency": [1, 2], "input_len": 31, "output_len": 10, "source": source}
    study = {**STUDY, "workload": workload}
    for trial in parse_study(study).trials[:-1]:
        write_trial(folder / "results" / "cells", trial)
    return chats, study


def test_a_bundle_has_the_file_of_a_workload_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats, study = write_chats(tmp_path, "a question")
    content, digests = chats.read_bytes(), {each.digest for each in parse_study(study).trials}
    bundle = make_bundle(tmp_path, study)
    name = f"data/{hashlib.sha256(content).hexdigest()}.jsonl"
    chats.unlink()
    assert {check.status for check in verify(bundle)} == {PASS, SKIP}
    folder = unpack_bundle(bundle, tmp_path / "unpacked")
    assert (folder / name).read_bytes() == content
    config = json.loads((folder / "config/study.json").read_text())
    assert "confidential" not in json.dumps(config)
    monkeypatch.chdir(folder)
    again = parse_study(config)
    assert {each.digest for each in again.trials} == digests
    assert {again.source_file(each) for each in again.trials} == {name}

    def change(tree: Path) -> None:
        (tree / name).write_text('{"prompt": "another question"}\n')

    problems = failed(tamper(bundle, tmp_path, change, rehash=True))
    assert f"{name}: its name is not the digest of its content" in problems["integrity"]


def test_a_secret_in_the_file_of_a_workload_is_no_part_of_a_bundle(tmp_path: Path) -> None:
    _, study = write_chats(tmp_path, f"My key is {TOKEN}")
    with pytest.raises(BundleError, match=r"would contain secrets .*\n  data/[0-9a-f]{64}\.jsonl"):
        make_bundle(tmp_path, study)
    assert not list(tmp_path.glob("results/bundles/*.tar.gz"))
