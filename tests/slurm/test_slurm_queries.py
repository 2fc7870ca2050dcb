"""Slurm is asked by user ID and on the right cluster, and its silence is told."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import pytest

from helpers.cluster import Options
from slurm.conftest import GPU, TOY, Workspace, with_options

pytestmark = [pytest.mark.crowded, pytest.mark.slow]

V100 = GPU | {"slurm_constraint": "v100"}


def test_jobs_are_found_whatever_user_says(work: Workspace) -> None:
    """The reason for which a job is pending comes from squeue alone."""
    for node in ("sirocco14", "sirocco15"):
        work.cluster.lose_node(node)
    work.kinds(toy=V100)
    work.plan(out={"a": 1})
    for user in ("daemon", "a-user-that-nobody-knows", None):
        work.env = dict.fromkeys(("USER", "LOGNAME", "LNAME", "USERNAME"), user or "")
        work.env["SQUEUE_PARTITION"] = "preempt"
        process = work.start()
        work.wait(lambda: "pending (" in work.log.read_text(encoding="utf-8"), limit_s=25)
        process.send_signal(signal.SIGTERM)
        assert "Allocation a: cancelled." in work.end(process, 1)
        work.wait(lambda: work.queue_alive() == [], limit_s=15)


@with_options(Options(accounting=True))
def test_another_cluster_is_asked_about_its_jobs(work: Workspace) -> None:
    work.kinds(toy=GPU | {"slurm_additional_parameters": {"clusters": "private"}})
    work.env = {"SLURM_CLUSTERS": "nowhere"}
    work.plan(out={"a": 2})
    work.run()
    assert len(work.outputs()) == 2
    (record,) = work.records()
    assert record["allocation"]["clusters"] == "private"
    assert record["slurm"]["JobState"] == "COMPLETED"
    shutil.rmtree(work.folder / "out")
    work.set_acts(a1="wait")
    process = work.start()
    work.wait_started("a1")
    work.wait(lambda: "running on" in work.log.read_text(encoding="utf-8"))
    work.interrupt(process)
    assert "Allocation a: cancelled." in work.end(process, 1)
    work.wait(lambda: work.queue_alive() == [], limit_s=15)


def test_a_silent_squeue_is_told_with_its_message(work: Workspace) -> None:
    """Its two minutes are a second here: the test's Snakefile says so."""
    snakefile = work.folder / "Snakefile"
    snakefile.write_text(
        "from snakemake_executor_plugin_submitit import liveness\n"
        f'liveness.SILENT_S = 1.0\ninclude: "{TOY / "Snakefile"}"\n',
        encoding="utf-8",
    )
    squeue = work.cluster.folder / "bin" / "squeue"
    working = squeue.read_text(encoding="utf-8")
    squeue.write_text("#!/bin/sh\necho 'error: no route to host' >&2\nexit 1\n", encoding="utf-8")
    work.plan(out={"a": 2})
    work.set_acts(a0="wait")
    process = work.start("all", "--snakefile", str(snakefile))
    told = r"squeue has not answered for \d+ s: error: no route to host"
    work.wait(lambda: re.search(told, work.log.read_text(encoding="utf-8")))
    squeue.write_text(working, encoding="utf-8")
    work.wait(lambda: "squeue answers again." in work.log.read_text(encoding="utf-8"))
    (work.folder / "go").touch()
    work.end(process)
    assert len(work.outputs()) == 2


def test_a_folder_with_a_percent_sign_is_refused_and_the_remedy_works(
    work: Workspace, tmp_path: Path
) -> None:
    named = Workspace(tmp_path / "50%true", work.cluster)
    named.plan(out={"a": 1})
    try:
        output = named.run(status=1)
        assert "50%true/.snakemake/submitit contains `%`" in output
        assert named.queue() == []
        named.run("--submitit-folder", str(tmp_path / "queues"))
        assert named.outputs() == {"a0"}
        (record,) = named.records()
        log = Path(record["allocation"]["log"])
        assert log.is_file() and log.is_relative_to(tmp_path / "queues")
    finally:
        named.close()
