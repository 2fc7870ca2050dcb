"""Published data that a study names: reading, refusing, and the files that depend on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from servegrid.analysis.summary import summarise
from servegrid.analysis.tables import cast_columns
from servegrid.cli.main import main
from servegrid.errors import ConfigError
from servegrid.records import columns
from servegrid.reference.data import STUDIES, published_cells
from servegrid.reference.published import (
    PUBLISHED_COLUMNS,
    SECONDS_COLUMN,
    SOURCES,
    load_published,
    published_from_config,
)
from servegrid.report.findings_report import NO_PUBLISHED_DATA, NOT_COMPARABLE
from servegrid.report.write import write_findings

HEAD = ",".join(PUBLISHED_COLUMNS)
ROW = "m,fp16,a100-40gb,1,burst,8,31,100,2.50"


def csv(folder: Path, *lines: str) -> Path:
    path = folder / "mine.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_data_sets_of_the_package_can_be_read() -> None:
    assert tuple(SOURCES) == STUDIES
    for name in SOURCES:
        data = load_published(name)
        expected = published_cells(name)
        frame = pd.DataFrame(data.rows)
        pd.testing.assert_frame_equal(frame, expected[list(PUBLISHED_COLUMNS)])
        assert (data.name, data.source) == (name, SOURCES[name])
    # The article has one decimal.
    assert load_published("inria-2024").rounding_s == pytest.approx(0.05)


def test_a_csv_file_is_named_by_its_file_name(tmp_path: Path) -> None:
    other = "m,fp16,cpu,0,closed_loop,16,31,100,"
    data = load_published(str(csv(tmp_path, f"note,{HEAD}", f"a,{ROW}", f"b,{other}")))
    assert (data.name, data.source.citation, data.source.method) == ("mine.csv", "mine.csv", {})
    assert data.rows[0] == {
        "model": "m",
        "quantization": "fp16",
        "gpu": "a100-40gb",
        "gpu_count": 1,
        "protocol": "burst",
        "concurrency": 8,
        "input_len": 31,
        "output_len": 100,
        "seconds_per_100_tokens": 2.5,
    }
    assert data.rows[1]["gpu_count"] == 0
    assert pd.isna(data.rows[1][SECONDS_COLUMN])
    assert data.rounding_s == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("seconds", "rounding_s"), [("2", 0.5), ("2.50", 0.005), ("1e-3", 0.0005), ("2E1", 5.0)]
)
def test_rounding_is_half_of_the_last_digit(
    tmp_path: Path, seconds: str, rounding_s: float
) -> None:
    row = ROW.replace("2.50", seconds)
    assert load_published(str(csv(tmp_path, HEAD, row))).rounding_s == pytest.approx(rounding_s)


@pytest.mark.parametrize(
    ("lines", "problem", "remedy"),
    [
        ([], "does not have all columns; missing: `model`", "Required columns: `model`"),
        ([HEAD], "has no rows", "Add one row per published cell."),
        (
            [HEAD.replace("gpu_count", "gpus"), ROW],
            "does not have all columns; missing: `gpu_count`.",
            "Add them. Required columns: `model`",
        ),
        ([HEAD, ROW, ROW], "lines 2 and 3 describe the same cell", "Remove one of them."),
        ([HEAD, ROW.replace(",8,", ",8.5,")], "line 2: `concurrency` is '8.5'", "an integer from"),
        ([HEAD, ROW.replace(",8,", ",0,")], "line 2: `concurrency` is '0'", "from 1 to 2147483647"),
        ([HEAD, ROW.replace(",8,", f",{2**31},")], "is '2147483648'", "from 1 to 2147483647"),
        ([HEAD, ROW.replace(",8,", f",{'9' * 5000},")], "`concurrency` is '999", "from 1 to"),
        ([HEAD, ROW.replace("2.50", "1e-300")], f"`{SECONDS_COLUMN}` is '1e-300'", "a positive"),
        ([HEAD, ROW.replace("2.50", "1e300")], f"`{SECONDS_COLUMN}` is '1e300'", "a positive"),
        ([HEAD, ROW.replace("burst", "poisson")], "`protocol` is 'poisson'", "`closed_loop`"),
        ([HEAD, ROW.replace("2.50", "fast")], f"`{SECONDS_COLUMN}` is 'fast'", "a positive number"),
        ([HEAD, ROW.replace("2.50", "-1")], f"`{SECONDS_COLUMN}` is '-1'", "a positive number"),
        ([HEAD, ROW.replace("2.50", "nan")], f"`{SECONDS_COLUMN}` is 'nan'", "a positive number"),
        ([HEAD, ROW.replace("m,", ",", 1)], "`model` is ''", "a name"),
        ([HEAD, "m,fp16"], "`gpu` is ''", "a name"),
    ],
)
def test_a_csv_file_that_does_not_fit_is_refused(
    tmp_path: Path, lines: list[str], problem: str, remedy: str
) -> None:
    path = csv(tmp_path, *lines)
    with pytest.raises(ConfigError) as refused:
        published_from_config({"published": str(path)}, ["study.yaml"])
    message = str(refused.value)
    assert message.startswith("study.yaml: published: ")
    assert str(path) in message
    assert problem in message
    assert remedy in message


def test_an_unknown_name_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(ConfigError) as refused:
        published_from_config({"published": "inria-2025"}, ["study.yaml"])
    assert str(refused.value) == (
        "study.yaml: published: there is no published data set `inria-2025`. Did you mean "
        "`inria-2024`? Name one of `inria-2024`, or the path of a CSV file (`….csv`)."
    )


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for name, content in (("none.csv", None), ("folder.csv", "folder"), ("binary.csv", b"\xff\0")):
        path = tmp_path / name
        if content == "folder":
            path.mkdir()
        elif content is not None:
            path.write_bytes(content)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=rf"published: the file .*{name} cannot be read \("):
            published_from_config({"published": str(path)})


def test_a_study_may_name_no_published_data() -> None:
    assert published_from_config({"study": "s"}) is None


# --- the files that depend on published data -----------------------------------------------------

CONFIG: dict[str, Any] = {
    "study": "s",
    "workload": {"concurrency": 8, "input_len": 31},
    "deployments": [
        {
            "model": "m",
            "checkpoint": "org/m",
            "quantization": "fp16",
            "engine": "vllm",
            "gpu": "a100-40gb",
            "max_model_len": 4096,
        }
    ],
}
OUTPUTS = {
    "frontier": "frontier.parquet",
    "frontier_csv": "frontier.csv",
    "frontier_tex": "frontier.tex",
    "findings": "findings.md",
    "published": "published.parquet",
    "published_csv": "published.csv",
    "published_tex": "published.tex",
    "published_md": "published.md",
}


def cells() -> pd.DataFrame:
    row = {
        "deployment": "d",
        "model": "m",
        "quantization": "fp16",
        "gpu": "a100-40gb",
        "gpu_count": 1,
        "engine": "vllm",
        "engine_version": "0.32.0",
        "protocol": "burst",
        "concurrency": 8,
        "input_len": 31,
        "output_len": 100,
        "trial": 1,
        "verdict": "ok",
        "valid": True,
        "requests": 8,
        SECONDS_COLUMN: 5.0,
        "output_tokens_per_s_per_user": 20.0,
    }
    frame = pd.DataFrame([row], columns=[column.name for column in columns.CELLS])
    return cast_columns(frame, columns.CELLS)


def findings(folder: Path, **config: Any) -> dict[str, str]:
    paths = {name: folder / file for name, file in OUTPUTS.items()}
    write_findings(CONFIG | config, cells(), summarise(cells()), paths)
    assert all(path.exists() for path in paths.values())
    return {file: (folder / file).read_text() for file in OUTPUTS.values() if "parq" not in file}


def test_without_published_data_the_files_exist_and_say_so(tmp_path: Path) -> None:
    texts = findings(tmp_path)
    assert texts["published.md"] == f"# Comparison with published data\n\n{NO_PUBLISHED_DATA}\n"
    assert (
        texts["published.csv"]
        == ",".join(column.name for column in columns.PUBLISHED_COMPARISON) + "\n"
    )
    assert NO_PUBLISHED_DATA.replace("`", "") in texts["published.tex"].replace("\\", "").replace(
        "`", ""
    )
    table = pq.read_table(tmp_path / "published.parquet")
    assert (table.num_rows, table.column_names) == (0, texts["published.csv"].strip().split(","))
    assert "published" not in texts["findings.md"]


def test_published_data_without_an_equal_cell_say_so(tmp_path: Path) -> None:
    text = findings(tmp_path, published="inria-2024")["published.md"]
    assert "Published: Bendi-Ouis, Dutarte, Hinaut, 2024." in text
    assert NOT_COMPARABLE in text


def test_a_study_is_compared_with_a_csv_file_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    text = findings(tmp_path / "out", published=str(csv(tmp_path, HEAD, ROW)))["published.md"]
    assert "Seconds per 100 tokens. Published: mine.csv." in text
    # 5 / 2.5, with 2.5 rounded to 0.01: 5 / 2.505 and 5 / 2.495.
    assert "| 8 | 31 | 5 | 2.5 | 2.00 [2.00, 2.00] |" in text
    assert "| software | vllm 0.32.0 | not known |" in text
    assert str(tmp_path) not in text


def test_the_command_writes_the_page_of_published_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    csv(tmp_path, HEAD, ROW)
    monkeypatch.chdir(tmp_path)
    for arguments, page in (
        (["--published", "inria-2024"], "inria-2024.html"),
        (["--published", "mine.csv"], "mine.html"),
        (["--published", "inria-2024", "--output", "a/page.html"], "a/page.html"),
    ):
        assert main(["report", *arguments]) == 0
        assert capsys.readouterr().out == f"{page}\n"
        text = (tmp_path / page).read_text()
        source = SOURCES[arguments[1]].citation if "inria" in arguments[1] else "mine.csv"
        assert f"Published: {source}." in text
    start = text.index('id="payload">') + len('id="payload">')
    payload = json.loads(text[start : text.index("</script>", start)])
    assert len(payload["cells"]) == 392


def test_the_command_refuses_unknown_published_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--published", "inria"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("servegrid: --published: there is no published data set `inria`.")
    assert list(tmp_path.iterdir()) == []
