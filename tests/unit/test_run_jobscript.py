"""Logs and errors of Snakemake's scripts, each in a separate process."""

import subprocess
import sys
from pathlib import Path


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_all_output_goes_to_the_log_including_that_of_child_processes(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "cell.log"
    done = run(
        "import os\nfrom servegrid.run.jobscript import redirect_output\n"
        f"with redirect_output({str(log)!r}):\n"
        "    print('from Python', flush=True)\n"
        "    os.system('echo from the shell; echo and its errors >&2')\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert log.read_text() == "from Python\nfrom the shell\nand its errors\n"


def test_a_servegrid_error_is_one_line_in_log_and_terminal(tmp_path: Path) -> None:
    log = tmp_path / "cell.log"
    done = run(
        "from servegrid.errors import RecordError\n"
        "from servegrid.run.jobscript import redirect_output\n"
        f"with redirect_output({str(log)!r}):\n    raise RecordError('disk full: free space')\n"
    )
    assert done.returncode == 1
    assert done.stderr == "disk full: free space\n"
    assert log.read_text() == "disk full: free space\n"


def test_any_other_exception_keeps_its_traceback(tmp_path: Path) -> None:
    log = tmp_path / "cell.log"
    done = run(
        "from servegrid.run.jobscript import redirect_output\n"
        f"with redirect_output({str(log)!r}):\n    1 / 0\n"
    )
    assert done.returncode == 1
    assert "ZeroDivisionError" in log.read_text()
