"""The live view of a terminal, and the plain lines without one."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import termios

import pytest
from rich.console import Console

from helpers.log_records import allocation, cell_info, job_finished, job_info, run_info
from snakemake_logger_plugin_servegrid import plain
from snakemake_logger_plugin_servegrid.capture import TerminalCapture, no_control_echo
from snakemake_logger_plugin_servegrid.live import LiveDisplay, choose_rows, describe_hidden, render
from snakemake_logger_plugin_servegrid.messages import Level, Message
from snakemake_logger_plugin_servegrid.plain import PlainDisplay, describe_plan, describe_progress
from snakemake_logger_plugin_servegrid.progress import DeploymentProgress, RunProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the displays read, in seconds."""
    now = [0.0]
    monkeypatch.setattr(plain.time, "monotonic", lambda: now[0])
    return now


def half_done() -> RunProgress:
    progress = RunProgress()
    for record in (
        run_info(measure=4, gather=1, plot=4),
        *(cell_info(number, "first_vllm_cpu", f"c{number}") for number in (1, 2)),
        *(cell_info(number, "second_llamacpp_cpu", f"c{number}") for number in (3, 4)),
        allocation("first_vllm_cpu", "running", node="n1", eta_s=70.0),
        allocation("second_llamacpp_cpu", "pending", reason="Resources"),
    ):
        progress.update(record)
    return progress


def terminal(width: int = 100, height: int = 30) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines_of(progress: RunProgress, width: int = 100, height: int = 30) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(progress, width, height))
    return [line.rstrip() for line in written(console).splitlines()]


def test_the_view_has_a_bar_per_deployment_and_one_for_all_other_jobs(
    clock: list[float],
) -> None:
    progress = half_done()
    clock[0] = 40.0
    progress.update(job_finished(1))
    clock[0] = 50.0
    first, second, other = lines_of(progress)
    assert re.fullmatch(r"first_vllm_cpu +[━╸╺ ]+ +1/2 running on n1, about 30 s left", first), (
        first
    )
    assert re.fullmatch(r"second_llamacpp_cpu +[━╸╺ ]* +0/2 pending: Resources", second), second
    assert re.fullmatch(r"tables, figures, page +[━╸╺ ]* +0/5 50 s elapsed", other), other


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_view_fits_into_the_terminal(width: int) -> None:
    lines = lines_of(half_done(), width)
    assert len(lines) == 3
    assert max(map(len, lines)) <= width


def test_deployments_without_room_are_counted_in_one_line() -> None:
    states = ["done", "running", "pending", "failed", "pending", "done"]
    deployments = [
        DeploymentProgress(str(number), state=state) for number, state in enumerate(states)
    ]
    assert choose_rows(deployments, 6) == (deployments, [])
    shown, hidden = choose_rows(deployments, 4)
    assert [each.name for each in shown] == ["1", "2", "3"]
    assert describe_hidden(hidden) == "and 3 deployments: 2 done, 1 pending"


def test_a_view_of_many_deployments_is_not_higher_than_the_terminal() -> None:
    progress = RunProgress()
    for number in range(40):
        progress.update(cell_info(number, f"deployment-{number}", "c1"))
    progress.update(run_info(measure=40, gather=1))
    lines = lines_of(progress, height=10)
    assert len(lines) == 10
    assert lines[-2].rstrip() == "and 32 deployments: 32 pending"


def test_messages_stand_above_the_view_and_changes_are_left_to_the_bars() -> None:
    console = terminal()
    display = LiveDisplay(console)
    display.begin(half_done())
    display.show(Message(Level.WARNING, "slurm does not answer"))
    display.show(Message(Level.CHANGE, "first: running"))
    display.close()
    display.close()
    text = written(console)
    assert "slurm does not answer" in text
    assert "first: running" not in text
    after = text[text.index("slurm does not answer") :]
    assert "first_vllm_cpu" in after


def test_the_cursor_is_shown_again() -> None:
    console = terminal()
    display = LiveDisplay(console)
    display.begin(half_done())
    display.close()
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert hidden in written(console)
    assert written(console).rindex(shown) > written(console).rindex(hidden)


def test_a_display_that_never_began_prints_messages_only() -> None:
    console = terminal()
    display = LiveDisplay(console)
    display.show(Message(Level.ERROR, "unknown key"))
    display.close()
    assert "unknown key" in written(console)
    assert "\x1b[?25l" not in written(console)


def test_what_child_processes_write_is_captured_line_by_line() -> None:
    read, write = os.pipe()
    lines: list[str] = []
    capture = TerminalCapture([write], lines.append)
    script = f"import os; os.write({write}, b'one\\ntwo')"
    subprocess.run([sys.executable, "-c", script], pass_fds=[write], check=True)
    capture.close()
    assert lines == ["one", "two"]
    os.write(write, b"not captured")
    os.close(write)
    assert os.read(read, 100) == b"not captured"
    os.close(read)


def test_the_echo_of_control_characters_is_left_alone_without_a_terminal_of_ours() -> None:
    leader, follower = pty.openpty()  # not our controlling terminal
    before = termios.tcgetattr(follower)
    with no_control_echo(follower):
        assert termios.tcgetattr(follower) == before
    os.close(leader)
    os.close(follower)


def test_plain_lines_say_what_will_be_done_and_each_change_once(clock: list[float]) -> None:
    stream = io.StringIO()
    display, progress = PlainDisplay(stream), RunProgress()
    for clock[0], record in (
        (0.0, run_info(measure=2, gather=1)),
        (0.0, cell_info(1, "first", "c1")),
        (0.0, cell_info(2, "first", "c2")),
        (1.0, allocation("first", "starting", node="n1")),
        (2.0, allocation("first", "running", node="n1")),
        (50.0, job_finished(1)),
        (55.0, allocation("first", "running", node="n1", eta_s=61.0)),
        (61.0, allocation("first", "running", node="n1", eta_s=57.0)),
        (90.0, job_finished(2)),
        (91.0, job_info(3, "gather")),
        (95.0, job_finished(3)),
    ):
        messages = progress.update(record)
        if progress.begun:
            display.begin(progress)
        for message in messages:
            display.show(message)
        display.refresh()
    display.close()
    lines = stream.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert [line[9:] for line in lines] == [
        "To do: 2 measurements on 1 deployment, then tables, figures and the page (1 job).",
        "first: starting on n1",
        "first: running on n1",
        "1 of 2 measurements done; first 1/2, about 37 s left",
        "first: done, 2 measurements",
    ]


def test_plain_errors_and_warnings_are_marked() -> None:
    stream = io.StringIO()
    display = PlainDisplay(stream)
    for level in (Level.ERROR, Level.WARNING, Level.INFO):
        display.show(Message(level, "text"))
    assert stream.getvalue().splitlines() == [
        "ERROR: text",
        "WARNING: text",
        "text",
    ]


def test_the_plan_leaves_out_what_is_not_to_be_done() -> None:
    progress = RunProgress()
    progress.update(run_info(gather=1, plot=2))
    progress.update(job_info(1, "gather"))
    assert describe_plan(progress) == "To do: tables, figures and the page (3 jobs)."
    progress.update(job_finished(1))
    assert describe_progress(progress) == "Tables, figures, page: 1 of 3 jobs done"


def test_a_line_of_progress_names_few_deployments() -> None:
    progress = RunProgress()
    for number in range(5):
        progress.update(cell_info(number, f"d{number}", "c1"))
        progress.update(allocation(f"d{number}", "running", node="n1"))
    assert describe_progress(progress) == (
        "0 of 5 measurements done; d0 0/1; d1 0/1; d2 0/1; 2 more are running"
    )
