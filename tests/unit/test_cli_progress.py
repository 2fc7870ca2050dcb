"""A progress bar is shown on a terminal only, and disappears."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from servegrid.cli.progress import show_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def test_a_terminal_shows_title_step_and_count(terminal: Terminal) -> None:
    with show_progress("Verifying [x]", terminal) as report:
        assert "Verifying [x]" in terminal.getvalue()
        report("tables", 3, 7)
    assert "Verifying [x]: tables" in terminal.getvalue()
    assert "3/7" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K"), "the line is cleared"


def test_an_unknown_total_has_no_count(terminal: Terminal) -> None:
    with show_progress("Benchmarking", terminal) as report:
        report("requests", 3, 0)
    assert "Benchmarking: requests" in terminal.getvalue()
    assert "3/0" not in terminal.getvalue()


def test_an_error_ends_the_bar_and_is_raised(terminal: Terminal) -> None:
    with pytest.raises(ValueError, match="wrong"), show_progress("Packing", terminal):
        raise ValueError("wrong")
    assert "\x1b[?25h" in terminal.getvalue(), "the cursor is shown again"


def test_other_streams_get_nothing(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    with show_progress("Verifying", pipe) as report:
        report("tables", 3, 7)
    assert pipe.getvalue() == ""
    monkeypatch.setenv("TERM", "dumb")
    with show_progress("Verifying", terminal) as report:
        report("tables", 3, 7)
    assert terminal.getvalue() == ""


def test_results_go_to_standard_output_and_the_bar_to_standard_error(tmp_path: Path) -> None:
    (tmp_path / "b.tar.gz").write_bytes(b"not an archive")
    master, slave = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "servegrid.cli.main", "verify", str(tmp_path / "b.tar.gz")],
        stdout=subprocess.PIPE,
        stderr=slave,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
        text=True,
    )
    os.close(slave)
    shown = os.read(master, 2**16).decode()
    os.close(master)
    assert done.returncode == 1
    assert done.stdout.startswith("FAIL  integrity     not safe to unpack, or not a bundle\n")
    assert "\x1b" not in done.stdout
    assert "Verifying: unpack" in shown
    assert "FAIL" not in shown
