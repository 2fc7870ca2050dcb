"""The page of a study in a real browser."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from browsing import browser, opened
from servegrid import records
from servegrid.page import compose
from servegrid.summary import summarise
from servegrid.tables import typed

CONCURRENCIES, LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128), (31, 63, 119, 296, 480, 822, 2193)


def trial(place: int, concurrency: int, input_len: int, **other: Any) -> dict[str, Any]:
    """One row of cells whose figures follow from its load, the faster the higher its place."""
    speed = 40.0 * (place + 1) / (1 + concurrency / 16) / (1 + input_len / 1000)
    return {
        "deployment": f"deployment-{place}",
        "model": "m",
        "quantization": f"q{place}",
        "gpu": "a100-40gb",
        "gpu_count": 1 + place % 2,
        "engine": "vllm",
        "engine_version": "0.32.0",
        "allocation": f"deployment-{place}.0",
        "protocol": "burst",
        "concurrency": concurrency,
        "input_len": input_len,
        "output_len": 100,
        "trial": 1,
        "verdict": "ok",
        "valid": True,
        "requests": concurrency,
        "seconds_per_100_tokens": 100 / speed,
        "output_tokens_per_s": speed * concurrency,
        "output_tokens_per_s_per_user": speed,
        "ttft_s_p50": input_len / 10_000,
        "e2el_s_p50": 100 / speed,
        "memory_peak_bytes": 20 * 2**30,
        "power_w_mean": 250.0,
        **other,
    }


FAILED = {
    "verdict": "timeout",
    "reason": "stalled: </script><b>120 s</b>",
    "valid": None,
    **dict.fromkeys(["seconds_per_100_tokens", "output_tokens_per_s", "e2el_s_p50", "ttft_s_p50"]),
    **dict.fromkeys(["output_tokens_per_s_per_user", "memory_peak_bytes", "power_w_mean"]),
}


def study(*rows: dict[str, Any]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), columns=[column.name for column in records.CELLS])
    return typed(frame, records.CELLS)


def written(cells: pd.DataFrame, file: Path) -> Path:
    file.write_text(compose.page("a <study>", cells, summarise(cells), []), encoding="utf-8")
    return file


WHOLE = [
    trial(place, concurrency, length)
    for place in range(7)
    for length in LENGTHS
    for concurrency in CONCURRENCIES
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture
def whole(tmp_path: Path) -> tuple[pd.DataFrame, Path]:
    """392 cells, of which one failed and one may not be believed."""
    rows = [dict(row) for row in WHOLE]
    rows[55] |= FAILED
    rows[6] |= {"valid": False, "invalid_reason": "queued: 3 of 64 requests waited"}
    cells = study(*rows)
    return cells, written(cells, tmp_path / "index.html")


def test_it_opens_offline_without_a_complaint_or_a_request(
    chromium: Any, whole: tuple[pd.DataFrame, Path]
) -> None:
    file = whole[1]
    assert file.stat().st_size < 3_000_000
    for width, scheme in ((1100, "light"), (1100, "dark"), (375, "light")):
        with opened(chromium, file, width, scheme) as found:
            found.redrawn()
            assert found.complaints == []
            assert found.requests == [file.as_uri()]
            # Wide tables scroll by themselves, the page does not.
            assert found.page.evaluate("document.documentElement.scrollWidth") <= width
            for chart in ("heatmap", "curves", "pareto"):
                assert found.page.locator(f"#{chart} svg").count() == 1


def test_its_figures_are_those_of_the_cells(
    chromium: Any, whole: tuple[pd.DataFrame, Path]
) -> None:
    cells, file = whole
    with opened(chromium, file) as found:
        for place, metric in ((0, "output_tokens_per_s"), (6, "ttft_s_p50")):
            found.page.select_option("select[name=deployment]", str(place))
            found.page.select_option("select[name=metric]", metric)
            found.redrawn()
            shown = found.page.eval_on_selector_all(
                "#grid tbody tr",
                "rows => rows.map(row => [...row.cells].map(c => c.dataset.value))",
            )
            own = cells[cells["deployment"] == f"deployment-{place}"]
            table = own.pivot(index="concurrency", columns="input_len", values=metric)
            assert len(shown) == len(CONCURRENCIES)
            for concurrency, (_, *values) in zip(CONCURRENCIES, shown, strict=True):
                for length, value in zip(LENGTHS, values, strict=True):
                    expected = table.loc[concurrency, length]
                    if pd.isna(expected):
                        assert value is None
                    else:
                        assert math.isclose(float(value), expected, rel_tol=1e-5)


def test_what_failed_and_what_may_not_be_believed_is_marked_and_listed(
    chromium: Any, whole: tuple[pd.DataFrame, Path]
) -> None:
    with opened(chromium, whole[1]) as found:
        found.redrawn()
        texts = found.page.locator("#grid tbody tr:nth-child(8) td").all_text_contents()
        assert texts[-1] == "✕"
        assert found.page.locator("#grid tbody tr:nth-child(7) td").first.text_content()[-1] == "!"
        told = found.page.locator("#validity").inner_text()
        assert "391 trials of 392 served; 390 of them valid." in told
        assert "stalled: </script><b>120 s</b>" in told
        assert "queued" in told


def test_every_control_has_a_name_and_can_be_reached_by_keyboard(
    chromium: Any, whole: tuple[pd.DataFrame, Path]
) -> None:
    with opened(chromium, whole[1]) as found:
        found.redrawn()
        unnamed = found.page.eval_on_selector_all(
            "select, input", "all => all.filter(each => !each.closest('label')).length"
        )
        assert unnamed == 0
        reached = set()
        for _ in range(60):
            found.page.keyboard.press("Tab")
            reached.add(found.page.evaluate("document.activeElement.name || ''"))
        assert {"metric", "deployment", "input_len"} <= reached


@pytest.mark.parametrize("rows", [[], [WHOLE[0]], [WHOLE[0] | FAILED]])
def test_small_studies_say_what_there_is(
    chromium: Any, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    with opened(chromium, written(study(*rows), tmp_path / "index.html")) as found:
        if rows and rows[0]["verdict"] == "ok":
            found.redrawn()
        assert found.complaints == []
        text = found.page.locator("body").inner_text()
        assert ("1 cell in 1 trial" if rows else "Nothing has been measured yet.") in text


def test_a_huge_study_opens(chromium: Any, tmp_path: Path) -> None:
    rows = [
        trial(place, concurrency, length)
        for place in range(25)
        for length in range(16, 16 + 20 * 20, 20)
        for concurrency in range(1, 21)
    ]
    file = written(study(*rows), tmp_path / "index.html")
    with opened(chromium, file) as found:
        found.redrawn()
        assert found.complaints == []
        assert (
            "15 more deployments are left out" in found.page.locator("#curves-caption").inner_text()
        )
