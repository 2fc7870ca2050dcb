"""Scripts that run_script in their job's process end as they would in a new process."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from snakemake_executor_plugin_submitit.inprocess import run_script


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def test_a_script_runs_as_main_and_prints(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_script(script(tmp_path, "if __name__ == '__main__':\n    print('done')\n"))
    assert capfd.readouterr().out == "done\n"


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no such model')", 1, "no such model"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt"),
        ("def f(:", 1, "SyntaxError"),
    ],
)
def test_a_failing_script_has_a_status_and_a_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, status: int, message: str
) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run_script(script(tmp_path, text))
    assert failed.value.returncode == status
    assert message in capfd.readouterr().err


@pytest.mark.parametrize("text", ["import sys; sys.exit()", "import sys; sys.exit(0)"])
def test_a_script_can_exit_with_success(tmp_path: Path, text: str) -> None:
    run_script(script(tmp_path, text))


def test_redirected_streams_are_restored(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = f"import os\nos.dup2(os.open({str(tmp_path / 'log')!r}, os.O_WRONLY | os.O_CREAT), 1)\n"
    run_script(script(tmp_path, text + "os.write(1, b'elsewhere')\n"))
    os.write(1, b"here again\n")
    assert capfd.readouterr().out == "here again\n"
    assert (tmp_path / "log").read_text() == "elsewhere"
