"""The plugin as Snakemake loads and calls it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from snakemake.settings.enums import Quietness
from snakemake.settings.types import OutputSettings
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_interface_logger_plugins.registry import LoggerPluginRegistry
from snakemake_interface_logger_plugins.tests import TestLogHandlerBase

from helpers.log_records import allocation, cell_info, job_error, job_finished, log_record, run_info
from snakemake_logger_plugin_servegrid import LogHandler
from snakemake_logger_plugin_servegrid.progress import HOLD_S


class TestInterface(TestLogHandlerBase):
    """Snakemake's own tests of a logger plugin."""

    __test__ = True

    def get_log_handler_cls(self) -> type[LogHandler]:
        return LogHandler

    def get_log_handler_settings(self) -> None:
        return None

    def _create_handler(self) -> LogHandler:
        self.handler = super()._create_handler()
        return self.handler

    def teardown_method(self) -> None:
        self.handler.close()


def handled(capsys: pytest.CaptureFixture[str], *records: Any, **settings: Any) -> tuple[str, str]:
    """What is printed to standard output and standard error."""
    handler = LogHandler(OutputSettings(**settings), None)
    for record in records:
        handler.handle(record)
    handler.close()
    handler.close()
    return capsys.readouterr()


RUN = (
    log_record("Workflow has started!", event=LogEvent.WORKFLOW_STARTED),
    run_info(measure=1, gather=1),
    cell_info(1, "small", "c1"),
    allocation("small", "running", node="n1"),
    log_record("Select jobs to execute..."),
    job_finished(1),
)


def test_snakemake_finds_the_plugin() -> None:
    assert "servegrid" in LoggerPluginRegistry().get_registered_plugins()


def test_importing_the_plugin_is_cheap() -> None:
    """Each measurement runs in a process that imports all plugins."""
    script = (
        "import sys, snakemake_logger_plugin_servegrid; "
        "print([name for name in ('rich', 'pandas', 'pyarrow', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_without_a_terminal_lines_go_to_standard_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, err = handled(capsys, *RUN, show_failed_logs=True)
    assert out == ""
    assert [line[9:] for line in err.splitlines()[:3]] == [
        "To do: 1 measurement on 1 deployment, then tables, figures and the page (1 job).",
        "small: running on n1",
        "small: done, 1 measurement",
    ]
    assert err.splitlines()[3:] == [
        "Not finished: 1 of 1 measurement done in 0 s. 1 other job not done.",
        "To resume, run the same command again.",
    ]


@pytest.mark.parametrize(
    "settings", [{"verbose": True}, {"printshellcmds": True}, {"debug_dag": True}]
)
def test_options_for_more_output_bring_snakemakes_own_back(
    settings: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = handled(capsys, *RUN[:2], *RUN[4:], **settings)
    assert "Job stats" in err
    assert "Select jobs to execute..." in err
    assert "Finished jobid: 1" in err


def test_quiet_is_obeyed_as_snakemake_does(capsys: pytest.CaptureFixture[str]) -> None:
    failed = log_record("broken", 40, event=LogEvent.ERROR)
    some = {Quietness.RULES, Quietness.PROGRESS}
    assert handled(capsys, *RUN[1:], failed, quiet=some)[1].endswith("broken\n")
    assert handled(capsys, *RUN[1:], failed, quiet={Quietness.ALL}) == ("", "")


def test_a_dry_run_prints_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = handled(capsys, *RUN[:3], dryrun=True, stdout=True)
    assert err == ""
    assert out.splitlines() == [
        "1 measurement to do:",
        "  1  small",
        "This was a dry run: nothing was started. --verbose lists every job.",
    ]


def test_a_failure_is_shown_even_if_no_record_follows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    handler = LogHandler(OutputSettings(), None)
    for record in (*RUN[:3], job_error(1, message="Killed.")):
        handler.handle(record)
    expected = "ERROR: Rule measure failed for small/c1/trial-1: Killed."
    err = capsys.readouterr().err
    assert expected not in err
    deadline = time.monotonic() + 10 * HOLD_S
    while expected not in err and time.monotonic() < deadline:
        time.sleep(0.05)
        err += capsys.readouterr().err
    handler.close()
    assert err.count(expected) == 1


def test_a_broken_record_does_not_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    broken = log_record("", event=LogEvent.JOB_FINISHED)  # without a job
    _, err = handled(capsys, broken, log_record("careful", 30))
    assert "careful" in err


LIVE = """
import sys, time
sys.path[:0] = {path!r}
from snakemake.settings.types import OutputSettings
from snakemake_logger_plugin_servegrid import LogHandler
from unit.test_logger_plugin import RUN
import os
handler = LogHandler(OutputSettings(), None)
for record in RUN:
    handler.handle(record)
os.system("echo a child speaks")
time.sleep(1.2)
if "close" in sys.argv:
    handler.close()
"""


@pytest.mark.parametrize("arguments", [["close"], []])
def test_a_terminal_gets_the_live_view_and_is_left_clean(
    arguments: list[str], tmp_path: Path
) -> None:
    import pty

    script = tmp_path / "live.py"
    tests = Path(__file__).parents[1]
    script.write_text(LIVE.format(path=[str(tests)]))
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    output = io.BytesIO()
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:
            break
        output.write(chunk)
    os.close(leader)
    assert process.wait(30) == 0, output.getvalue().decode()
    text = output.getvalue().decode()
    assert "small" in text and "1/1" in text
    assert text.count("a child speaks") == 1
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor
    assert "To resume, run the same command again." in text[text.rindex("\x1b[?25h") :]
