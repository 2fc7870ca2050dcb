"""The user's file of prices comes before the file of the package."""

from pathlib import Path

import pytest

from servegrid.reference.hardware import DEFAULT_HARDWARE_FILE, find_hardware_file

ROOT = Path(__file__).parents[2]


def write_prices(folder: Path) -> Path:
    file = folder / "config" / "hardware.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("currency: EUR\ngpus: {}\n")
    return file


def test_the_working_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout, study = tmp_path / "checkout", tmp_path / "study"
    study.mkdir()
    monkeypatch.chdir(study)
    assert find_hardware_file(checkout) == DEFAULT_HARDWARE_FILE
    in_checkout = write_prices(checkout)
    assert find_hardware_file(checkout) == in_checkout
    write_prices(study)
    assert find_hardware_file(checkout) == Path("config/hardware.yaml")


def test_in_a_checkout_the_file_of_the_package_is_a_link() -> None:
    assert DEFAULT_HARDWARE_FILE.is_symlink()
    assert DEFAULT_HARDWARE_FILE.resolve() == ROOT / "config" / "hardware.yaml"
