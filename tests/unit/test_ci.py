"""In CI a skipped test is a failed test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
SKIPS = """
import pytest

def test_that_skips():
    pytest.skip("no Slurm here")

@pytest.mark.skipif(True, reason="no browser here")
def test_that_is_marked():
    pass

@pytest.mark.xfail(reason="known")
def test_that_is_known_to_fail():
    assert False
"""


@pytest.mark.parametrize(("ci", "failed"), [("true", 2), ("", 0)])
def test_a_skip_is_an_error_in_ci_and_only_there(ci: str, failed: int, tmp_path: Path) -> None:
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "test_skips.py").write_text(SKIPS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", str(tmp_path)],
        env=os.environ | {"CI": ci},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    named = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert len(named) == failed, done.stdout
    assert done.returncode == (1 if failed else 0)
    assert ("Skipped in CI" in done.stdout) == bool(failed)
