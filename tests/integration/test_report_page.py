"""The page of a study in a real browser."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from helpers.browsing import browser, opened
from servegrid.analysis.capacity import Demand, Hardware, plan
from servegrid.analysis.findings import Slo, frontier
from servegrid.analysis.published import beside, summary_of
from servegrid.analysis.summary import summarise
from servegrid.analysis.tables import typed
from servegrid.records import columns
from servegrid.report.page import compose

pytestmark = pytest.mark.crowded

HARDWARE = Hardware("USD", {"a100-40gb": 8500.0}, electricity_per_kwh=0.2, years_in_use=4.0)
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
    frame = pd.DataFrame(list(rows), columns=[column.name for column in columns.CELLS])
    return typed(frame, columns.CELLS)


def written(cells: pd.DataFrame, file: Path, demand: Demand | None = None) -> Path:
    summary, limits, demand = summarise(cells), Slo(), demand or Demand()
    found = compose.Found(
        cells,
        summary,
        frontier(summary, limits),
        beside(summary, summary_of("inria-2024")),
        limits,
        ["What differs."],
        [],
    )
    text = compose.page("a <study>", found, demand, HARDWARE)
    file.write_text(text, encoding="utf-8")
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
    rows[6] |= {
        "valid": False,
        "invalid_rules": ["server_queueing"],
        "invalid_evidence": ["3 of 64 requests waited"],
    }
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
        assert "server_queueing" in told


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


NOT_SERVED = {(3, 16), (3, 64), (5, 8)}
"""Places and concurrencies; at place 5, more at once are served again."""

REPEATED = [
    trial(
        place,
        concurrency,
        length,
        protocol=protocol,
        trial=number,
        time_scale=0.5 if place == 5 else None,
        energy_j_per_output_token=0.5 + 4 / concurrency,
        seconds_per_100_tokens=noise * (2 + place + concurrency / (3 if place else 8))
        + length / 99,
        valid=None if (place, concurrency) in NOT_SERVED else (place, concurrency) != (2, 8),
        verdict="timeout" if (place, concurrency) in NOT_SERVED else "ok",
    )
    for protocol in ("burst", "closed_loop")
    for place in range(7)
    for length in (31, 119)
    for concurrency in (1, 2, 8, 16, 64)
    for number, noise in ((1, 1.0), (2, 1.1), (3, 1.02))
    if not (place == 4 and length == 119) and (place != 6 or number == 1)
]
"""Deployments with intervals and one without, with gaps, loads not served, and times that fall."""

MIX = {31: 3.0, 100: 1.0}
ASSUMPTIONS: list[tuple[dict[str, str], Demand]] = [
    ({}, Demand()),
    ({"users": "50000", "logged_in": "25"}, Demand(users=50_000, logged_in=0.25)),
    ({"think_time_s": "5", "slo_attainment": "99"}, Demand(think_time_s=5.0, slo_attainment=0.99)),
    ({"tokens_per_s_per_user": "12.5"}, Demand(tokens_per_s_per_user=12.5)),
    ({"tokens_per_s_per_user": "300"}, Demand(tokens_per_s_per_user=300.0)),
    ({"input_len": "119", "users": "7"}, Demand(input_len=119, users=7)),
    ({"input_len": "prompt_mix"}, Demand(prompt_mix=MIX)),
]


@pytest.mark.parametrize(("typed_in", "demand"), ASSUMPTIONS)
def test_the_plan_follows_the_assumptions_as_python_computes_it(
    chromium: Any, tmp_path: Path, typed_in: dict[str, str], demand: Demand
) -> None:
    cells = study(*REPEATED)
    expected = plan(summarise(cells), demand, HARDWARE)
    file = written(cells, tmp_path / "index.html", Demand(prompt_mix=MIX) if demand.mix else None)
    with opened(chromium, file) as found:
        for workload, protocol in enumerate(("burst", "closed_loop")):
            found.page.select_option("select[name=plan_load]", str(workload))
            for name, value in typed_in.items():
                control = found.page.locator(f"#demand [name={name}]")
                control.select_option(value) if name == "input_len" else control.fill(value)
            rows = found.page.eval_on_selector_all(
                "#plan tbody tr", "rows => rows.map(row => JSON.parse(row.dataset.row))"
            )
            own = expected[expected["protocol"] == protocol].to_dict("records")
            assert len(rows) == len(own) == 7
            for shown, computed in zip(rows, own, strict=True):
                for name in set(expected.columns) - {"gpu", "gpu_count", "protocol", "output_len"}:
                    value = None if pd.isna(computed[name]) else computed[name]
                    if isinstance(value, float):
                        assert shown[name] == pytest.approx(value, rel=1e-9), name
                    else:
                        assert shown.get(name) == value, name
        assert found.complaints == []


def test_the_rule_of_thumb_holds_for_many_users(
    chromium: Any, whole: tuple[pd.DataFrame, Path]
) -> None:
    with opened(chromium, whole[1]) as found:
        found.page.fill("[name=users]", "50000")
        found.page.fill("[name=logged_in]", "25")
        # Binomial(50000, 2.5%), summed in decimals of 60 digits.
        told = found.page.locator("#rule-of-thumb").text_content()
        assert "up to 1308 in 95% and up to 1332 in 99% of the time" in told


def test_an_assumption_out_of_range_is_refused_and_can_be_taken_back(
    chromium: Any, whole: tuple[pd.DataFrame, Path]
) -> None:
    with opened(chromium, whole[1]) as found:
        headline = found.page.locator("#headline").inner_text()
        assert headline.startswith("95% of the requests of 1,000 registered users (100 logged in")
        found.page.fill("[name=users]", "2000")
        assert "2,000 registered users" in found.page.locator("#headline").inner_text()
        found.page.fill("[name=users]", "0")
        assert found.page.locator("#demand-error").inner_text().startswith("Registered users: ")
        found.page.click("button[type=reset]")
        found.page.wait_for_selector("#demand-error", state="hidden")
        assert found.page.locator("#headline").inner_text() == headline


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
