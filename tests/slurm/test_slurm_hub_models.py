"""A new site: its models are fetched by name, its profile is written, and its jobs are offline."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import yaml

from helpers.cluster import Node, Options
from helpers.hub import running_hub
from helpers.processes import HANG_S
from servegrid.records import parquet
from servegrid.study import models
from slurm.conftest import Workspace, with_options

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.crowded,
    pytest.mark.timeout(900),
]

ROOT = Path(__file__).parents[2]
PARTITION = "PartitionName=batch Default=YES MaxTime=01:00:00 Nodes=ALL State=UP"
ONE_NODE = Options((Node("c1", "x"),), partitions=(PARTITION,))
NAME = "org/smollm2"
STUDY = {
    "study": "hub",
    "workload": {"concurrency": [1, 2], "input_len": 16, "output_len": 8},
    "deployments": [
        {
            "name": "small",
            "model": "smollm2-135m-instruct",
            "checkpoint": f"{NAME}@v1.0",
            "quantization": "fp32",  # without AVX-512, bfloat16 takes several times as long
            "engine_args": {"dtype": "float32"},
            "engine": "vllm",
            "gpu": "cpu",
            "max_model_len": 128,
            "max_num_seqs": 4,
        }
    ],
}
BUSY = {"client_busy", "client_timing_error", "sent_late", "clock_step"}
"""Rules of validity that other work on this machine can break."""


@contextmanager
def serving_the_demo_model() -> Iterator[tuple[str, str]]:
    """The URL of a hub with the demo's model as `v1.0`, and its commit. `main` has moved on."""
    folder = models.default_folder() / models.DEMO_FOLDER
    if not folder.exists():
        pytest.skip("the demo's model is missing: run `make model`")
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    with running_hub() as hub:
        repository = hub.repository(NAME)
        commit = repository.commit(files, ref="v1.0")
        repository.commit({"config.json": b"{}"})
        yield hub.url, commit


def servegrid(work: Workspace, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "servegrid.cli.main", *arguments],
        cwd=work.folder,
        env=work.cluster.env | work.env,
        capture_output=True,
        encoding="utf-8",
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.chaos
@with_options(ONE_NODE)
def test_a_new_site_measures_a_model_of_the_hub_offline(
    work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    work.env = {"HF_HOME": str(work.folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
    (work.folder / "study.yaml").write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    with serving_the_demo_model() as (url, commit):
        work.env["HF_ENDPOINT"] = url
        assert f"revision {commit} in " in servegrid(work, "fetch", "--configfile", "study.yaml")
    # The hub has stopped: whatever asks it now, fails.
    assert servegrid(work, "init-profile", "site").splitlines()[-1].endswith(" 0 failures")

    process = work.launch(
        *("results/tables/cells.parquet", "--snakefile", str(ROOT / "Snakefile"), "--nocolor"),
        *("--profile", "profiles/site", "--configfile", "study.yaml"),
    )
    work.end(process)

    cells = pd.read_parquet(work.folder / "results/tables/cells.parquet")
    assert (list(cells["verdict"]), set(cells["engine"])) == (["ok"] * 2, {"vllm"})
    assert {rule for rules in cells["invalid_rules"].dropna() for rule in rules} <= BUSY
    records = [
        parquet.read_record(file)
        for file in (work.folder / "results/cells").rglob("requests.parquet")
    ]
    assert len(records) == 2
    for record in records:
        engine = record["engine"]
        assert (engine["revision"], engine["tokenizer_revision"]) == (commit, commit)
        assert record["environment"]["job"]["SLURM_JOB_PARTITION"] == "batch"
