"""Scripts that run in their job's process end as they would in one of their own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from snakemake_executor_plugin_submitit.inprocess import run


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def test_a_script_is_main_and_its_output_is_seen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(script(tmp_path, "if __name__ == '__main__':\n    print('done')\n"))
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
def test_a_script_that_fails_has_a_status_and_says_why(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, status: int, message: str
) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run(script(tmp_path, text))
    assert failed.value.returncode == status
    assert message in capfd.readouterr().err


@pytest.mark.parametrize("text", ["import sys; sys.exit()", "import sys; sys.exit(0)"])
def test_a_script_may_end_itself_well(tmp_path: Path, text: str) -> None:
    run(script(tmp_path, text))


def test_streams_that_a_script_sends_elsewhere_come_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = f"import os\nos.dup2(os.open({str(tmp_path / 'log')!r}, os.O_WRONLY | os.O_CREAT), 1)\n"
    run(script(tmp_path, text + "os.write(1, b'elsewhere')\n"))
    os.write(1, b"here again\n")
    assert capfd.readouterr().out == "here again\n"
    assert (tmp_path / "log").read_text() == "elsewhere"
