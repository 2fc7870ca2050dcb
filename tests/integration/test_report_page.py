"""The page of a study, and of published data, in a real browser."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from helpers.browsing import browser, open_page
from servegrid.analysis.capacity import Demand, HardwarePrices, plan_capacity, with_recorded
from servegrid.analysis.findings import compute_frontier
from servegrid.analysis.published import compare_with_published
from servegrid.analysis.slo import Slo
from servegrid.analysis.summary import summarise
from servegrid.analysis.tables import cast_columns
from servegrid.records import columns
from servegrid.reference.published import load_published
from servegrid.report.page import compose
from servegrid.study.recorded_users import RecordedUsers

pytestmark = pytest.mark.crowded

HARDWARE = HardwarePrices("USD", {"a100-40gb": 8500.0}, electricity_per_kwh=0.2, years_in_use=4.0)
CONCURRENCIES, LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128), (31, 63, 119, 296, 480, 822, 2193)


def trial(index: int, concurrency: int, input_len: int, **other: Any) -> dict[str, Any]:
    """One row of the table of cells. The higher `index`, the faster the deployment."""
    speed = 40.0 * (index + 1) / (1 + concurrency / 16) / (1 + input_len / 1000)
    return {
        "deployment": f"deployment-{index}",
        "model": "m",
        "quantization": f"q{index}",
        "gpu": "a100-40gb",
        "gpu_count": 1 + index % 2,
        "engine": "vllm",
        "engine_version": "0.32.0",
        "allocation": f"deployment-{index}.0",
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
    "verdict_detail": "stalled: </script><b>120 s</b>",
    "valid": None,
    **dict.fromkeys(["seconds_per_100_tokens", "output_tokens_per_s", "e2el_s_p50", "ttft_s_p50"]),
    **dict.fromkeys(["output_tokens_per_s_per_user", "memory_peak_bytes", "power_w_mean"]),
}


def study(*rows: dict[str, Any]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), columns=[column.name for column in columns.CELLS])
    return cast_columns(frame, columns.CELLS)


def write_page(
    cells: pd.DataFrame, file: Path, demand: Demand | None = None, compare: bool = True
) -> Path:
    """The page of `cells`, compared with the published data if `compare`."""
    summary, slo = summarise(cells), Slo()
    published = load_published("inria-2024") if compare else None
    results = compose.StudyResults(
        cells,
        summary,
        compute_frontier(summary, slo),
        compare_with_published(summary, published),
        slo,
        published,
        ["distinct"],
        [],
    )
    text = compose.render_study_page("a <study>", results, demand or Demand(), HARDWARE)
    file.write_text(text, encoding="utf-8")
    return file


CELLS_392 = [
    trial(index, concurrency, length)
    for index in range(7)
    for length in LENGTHS
    for concurrency in CONCURRENCIES
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def full_study(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Path]:
    """392 cells. One was not served, one is not valid."""
    rows = [dict(row) for row in CELLS_392]
    rows[55] |= FAILED
    rows[6] |= {
        "valid": False,
        "invalid_rules": ["server_queueing"],
        "invalid_evidence": ["3 of 64 requests waited"],
    }
    cells = study(*rows)
    return cells, write_page(cells, tmp_path_factory.mktemp("full") / "index.html")


def test_the_page_opens_offline_without_messages_or_requests(
    chromium: Any, full_study: tuple[pd.DataFrame, Path]
) -> None:
    file = full_study[1]
    assert file.stat().st_size < 3_000_000
    for width, scheme in ((1100, "light"), (1100, "dark"), (375, "light")):
        with open_page(chromium, file, width, scheme) as found:
            found.wait_for_charts()
            assert found.messages == []
            assert found.requests == [file.as_uri()]
            # Wide tables scroll on their own, the page does not.
            assert found.page.evaluate("document.documentElement.scrollWidth") <= width
            for chart in ("heatmap", "curves", "pareto"):
                assert found.page.locator(f"#{chart} svg").count() == 1


def test_the_heat_map_has_the_figures_of_the_cells(
    chromium: Any, full_study: tuple[pd.DataFrame, Path]
) -> None:
    cells, file = full_study
    with open_page(chromium, file) as found:
        for index, metric in ((0, "output_tokens_per_s"), (6, "ttft_s_p50")):
            found.page.select_option("select[name=deployment]", str(index))
            found.page.select_option("select[name=metric]", metric)
            found.wait_for_charts()
            shown = found.page.eval_on_selector_all(
                "#grid tbody tr",
                "rows => rows.map(row => [...row.cells].map(c => c.dataset.value))",
            )
            own = cells[cells["deployment"] == f"deployment-{index}"]
            table = own.pivot(index="concurrency", columns="input_len", values=metric)
            assert len(shown) == len(CONCURRENCIES)
            for concurrency, (_, *values) in zip(CONCURRENCIES, shown, strict=True):
                for length, value in zip(LENGTHS, values, strict=True):
                    expected = table.loc[concurrency, length]
                    if pd.isna(expected):
                        assert value is None
                    else:
                        assert math.isclose(float(value), expected, rel_tol=1e-5)


def test_cells_that_were_not_served_or_are_not_valid_are_marked_and_listed(
    chromium: Any, full_study: tuple[pd.DataFrame, Path]
) -> None:
    with open_page(chromium, full_study[1]) as found:
        found.wait_for_charts()
        texts = found.page.locator("#grid tbody tr:nth-child(8) td").all_text_contents()
        assert texts[-1] == "✕"
        assert found.page.locator("#grid tbody tr:nth-child(7) td").first.text_content()[-1] == "!"
        text = found.page.locator("#validity").inner_text()
        assert "391 of 392 trials served, 390 valid." in text
        assert "stalled: </script><b>120 s</b>" in text
        assert "server_queueing" in text


def test_every_control_has_a_label_and_can_be_reached_by_keyboard(
    chromium: Any, full_study: tuple[pd.DataFrame, Path]
) -> None:
    with open_page(chromium, full_study[1]) as found:
        found.wait_for_charts()
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
"""Places and concurrencies. At index 5, higher concurrencies are served again."""
NOT_RUN = {(0, 119, 1), (0, 119, 2), (0, 119, 8), (0, 119, 16), (1, 31, 1), (1, 31, 2)}
"""Places, prompt lengths and concurrencies that a search has left out. At index 0, the load that is
left meets 5 tokens/s per user and misses 12.5."""


def verdict(index: int, length: int, concurrency: int) -> str:
    if (index, length, concurrency) in NOT_RUN:
        return "not_run"
    return "timeout" if (index, concurrency) in NOT_SERVED else "ok"


REPEATED = [
    trial(
        index,
        concurrency,
        length,
        protocol=protocol,
        trial=number,
        time_scale=0.5 if index == 5 else None,
        energy_j_per_output_token=0.5 + 4 / concurrency,
        seconds_per_100_tokens=noise * (2 + index + concurrency / (3 if index else 8))
        + length / 99,
        ttft_s_p50=noise * concurrency / 10 + length / 1000,
        e2el_s_p50=noise * (1 + concurrency / 4) + index,
        valid=(index, concurrency) != (2, 8)
        if verdict(index, length, concurrency) == "ok"
        else None,
        verdict=verdict(index, length, concurrency),
    )
    for protocol in ("burst", "closed_loop")
    for index in range(7)
    for length in (31, 119)
    for concurrency in (1, 2, 8, 16, 64)
    for number, noise in ((1, 1.0), (2, 1.1), (3, 1.02))
    if not (index == 4 and length == 119) and (index != 6 or number == 1)
]
"""Six deployments with intervals, one without; gaps, cells not served, and falling times."""

MIX = {31: 3.0, 100: 1.0}
ASSUMPTIONS: list[tuple[dict[str, str], Demand]] = [
    ({}, Demand()),
    ({"users": "50000", "logged_in": "25"}, Demand(users=50_000, logged_in=0.25)),
    ({"think_time_s": "5", "slo_attainment": "99"}, Demand(think_time_s=5.0, slo_attainment=0.99)),
    ({"load_factor": "50"}, Demand(load_factor=0.5)),
    ({"tokens_per_s_per_user": "12.5"}, Demand(tokens_per_s_per_user=12.5)),
    ({"tokens_per_s_per_user": "300"}, Demand(tokens_per_s_per_user=300.0)),
    ({"ttft_s": "1.05"}, Demand(ttft_s=1.05)),
    ({"ttft_s": "3", "e2el_s": "6"}, Demand(ttft_s=3.0, e2el_s=6.0)),
    ({"input_len": "119", "users": "7"}, Demand(input_len=119, users=7)),
    ({"input_len": "prompt_mix"}, Demand(prompt_mix=MIX)),
]


@pytest.fixture(scope="module")
def repeated_study(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Path, Path]:
    """Its summary, its page, and its page with a prompt mix."""
    cells, folder = study(*REPEATED), tmp_path_factory.mktemp("repeated")
    mixed = write_page(cells, folder / "mixed.html", Demand(prompt_mix=MIX))
    return summarise(cells), write_page(cells, folder / "index.html"), mixed


@pytest.mark.parametrize(("typed_in", "demand"), ASSUMPTIONS)
def test_the_plan_in_the_page_equals_the_plan_in_python(
    chromium: Any,
    repeated_study: tuple[pd.DataFrame, Path, Path],
    typed_in: dict[str, str],
    demand: Demand,
) -> None:
    summary, page, page_with_mix = repeated_study
    expected = plan_capacity(summary, demand, HARDWARE)
    with open_page(chromium, page_with_mix if demand.prompt_mix else page) as found:
        for workload, protocol in enumerate(("burst", "closed_loop")):
            found.page.select_option("select[name=plan_workload]", str(workload))
            for name, value in typed_in.items():
                control = found.page.locator(f"#demand [name={name}]")
                control.select_option(value) if name == "input_len" else control.fill(value)
            own = expected[expected["protocol"] == protocol].to_dict("records")
            compare_plans(found.page, own, set(expected.columns))
        assert found.messages == []


RECORDED = RecordedUsers(
    kind="trace",
    sha256="1f2e3d4c" + 56 * "0",
    requests=100_000,
    input_len=60.0,
    input_lens=((20, 40_000), (60, 30_000), (119, 27_000), (125, 3_000)),
    output_len=110.0,
    span_s=200_000.0,
    window_s=300.0,
    window_requests=900,
    dispersion=2.6,
)
FILE = RecordedUsers("file", "0" * 64, 100, 60.0, ((20, 40), (119, 58), (125, 2)), output_len=90.0)
RECORDED_USERS: list[tuple[RecordedUsers, dict[str, Any], dict[str, str], dict[str, Any]]] = [
    (replace(RECORDED, cycle_s=80.0, followed=0.75, sessions=9), {}, {}, {}),
    (replace(RECORDED, cycle_s=80.0, think_time_s=70.0, followed=0.75, sessions=9), {}, {}, {}),
    (RECORDED, {"e2el_s": 9.0, "slo_attainment": 0.5}, {}, {}),
    (RECORDED, {}, {"requests_per_s": "9.5"}, {"requests_per_s": 9.5}),
    (RECORDED, {}, {"input_len": "119"}, {"input_len": 119}),
    (RECORDED, {"slo_attainment": 0.98}, {}, {}),
    (replace(RECORDED, input_lens=((20, 98), (2000, 2))), {}, {}, {}),
    (FILE, {}, {}, {}),
]


@pytest.mark.parametrize(("recorded", "demand", "typed_in", "changed"), RECORDED_USERS)
def test_the_plan_for_recorded_users_equals_the_plan_in_python(
    chromium: Any,
    repeated_study: tuple[pd.DataFrame, Path, Path],
    tmp_path: Path,
    recorded: RecordedUsers,
    demand: dict[str, Any],
    typed_in: dict[str, str],
    changed: dict[str, Any],
) -> None:
    wanted = with_recorded(Demand(**demand), recorded)
    page = write_page(study(*REPEATED), tmp_path / "index.html", wanted)
    expected = plan_capacity(repeated_study[0], replace(wanted, **changed), HARDWARE)
    with open_page(chromium, page) as found:
        form = found.page.locator("#demand")
        assert form.locator("[name=users]").count() == (recorded.kind == "file")
        assert form.locator("[name=requests_per_s]").count() == (recorded.kind == "trace")
        basis = found.page.locator("#basis").text_content()
        for title in ("Measured", f"From the {recorded.label}", "Assumed", "Modelled"):
            assert title in basis
        for name, value in typed_in.items():
            control = form.locator(f"[name={name}]")
            control.select_option(value) if name == "input_len" else control.fill(value)
        for workload, protocol in enumerate(("burst", "closed_loop")):
            found.page.select_option("select[name=plan_workload]", str(workload))
            own = expected[expected["protocol"] == protocol].to_dict("records")
            compare_plans(found.page, own, set(expected.columns))
        headline = found.page.locator("#headline").inner_text()
        if recorded.kind == "trace":
            assert f"{changed.get('requests_per_s', 3):g} requests/s" in headline
        assert found.messages == []


def compare_plans(page: Any, own: list[dict[Any, Any]], names: set[str]) -> None:
    rows = page.eval_on_selector_all(
        "#plan tbody tr", "rows => rows.map(row => JSON.parse(row.dataset.row))"
    )
    assert len(rows) == len(own) == 7
    for shown, computed in zip(rows, own, strict=True):
        for name in names - {"gpu", "gpu_count", "protocol", "output_len"}:
            value = None if pd.isna(computed[name]) else computed[name]
            if isinstance(value, float):
                assert shown[name] == pytest.approx(value, rel=1e-9), name
            else:
                assert shown.get(name) == value, name


def test_the_rule_of_thumb_is_exact_for_many_users(
    chromium: Any, full_study: tuple[pd.DataFrame, Path]
) -> None:
    with open_page(chromium, full_study[1]) as found:
        found.page.fill("[name=users]", "50000")
        found.page.fill("[name=logged_in]", "25")
        # Binomial(50000, 2.5%), summed in decimals of 60 digits.
        text = found.page.locator("#rule-of-thumb").text_content()
        assert "at most 1308 for 95% and at most 1332 for 99% of the time" in text


def test_an_assumption_out_of_range_is_refused_and_can_be_reset(
    chromium: Any, full_study: tuple[pd.DataFrame, Path]
) -> None:
    with open_page(chromium, full_study[1]) as found:
        headline = found.page.locator("#headline").inner_text()
        assert headline.startswith("For 1,000 registered users (100 logged in")
        found.page.fill("[name=users]", "2000")
        assert "2,000 registered users" in found.page.locator("#headline").inner_text()
        found.page.fill("[name=users]", "0")
        assert found.page.locator("#demand-error").inner_text().startswith("Registered users: ")
        found.page.click("button[type=reset]")
        found.page.wait_for_selector("#demand-error", state="hidden")
        assert found.page.locator("#headline").inner_text() == headline


@pytest.mark.parametrize("rows", [[], [CELLS_392[0]], [CELLS_392[0] | FAILED]])
def test_small_studies_have_a_page(
    chromium: Any, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    with open_page(chromium, write_page(study(*rows), tmp_path / "index.html")) as found:
        if rows and rows[0]["verdict"] == "ok":
            found.wait_for_charts()
        assert found.messages == []
        text = found.page.locator("body").inner_text()
        assert ("1 cell in 1 trial" if rows else "Nothing has been measured yet.") in text


def test_the_page_of_a_huge_study_opens(chromium: Any, tmp_path: Path) -> None:
    rows = [
        trial(index, concurrency, length)
        for index in range(25)
        for length in range(16, 16 + 20 * 20, 20)
        for concurrency in range(1, 21)
    ]
    file = write_page(study(*rows), tmp_path / "index.html")
    with open_page(chromium, file) as found:
        found.wait_for_charts()
        assert found.messages == []
        assert (
            "15 more deployments are left out" in found.page.locator("#curves-caption").inner_text()
        )


def test_a_study_without_published_data_has_no_section_and_no_ratio(
    chromium: Any, tmp_path: Path
) -> None:
    cells = study(*CELLS_392[:56])
    with open_page(chromium, write_page(cells, tmp_path / "index.html", compare=False)) as found:
        found.wait_for_charts()
        assert found.messages == []
        assert found.page.locator("#published").count() == 0
        assert found.page.locator("option[value=published_ratio]").count() == 0
        assert "published" not in found.page.locator("body").inner_text().lower()


def test_a_study_is_compared_with_the_published_cells_that_are_equal(
    chromium: Any, tmp_path: Path
) -> None:
    equal = {
        "model": "mistral-7b",
        "quantization": "fp16",
        "gpu": "v100-16gb",
        "gpu_count": 2,
        "seconds_per_100_tokens": 3.6,
    }
    file = write_page(study(trial(0, 1, 31) | equal, trial(0, 2, 31)), tmp_path / "index.html")
    with open_page(chromium, file) as found:
        found.page.select_option("select[name=metric]", "published_ratio")
        found.wait_for_charts()
        assert found.messages == []
        # The article has 1.8 s for this cell.
        values = found.page.eval_on_selector_all(
            "#grid tbody td", "cells => cells.map(cell => cell.dataset.value ?? null)"
        )
        assert values == ["2", None]
        text = found.page.locator("#published").inner_text()
        assert "1 cell in both. The median ratio of measured to published time is 2." in text
        methods = found.page.locator("#published tbody tr").first.locator("th, td")
        assert methods.all_text_contents()[:2] == ["prompts", "distinct"]


def test_the_page_of_published_data_has_their_figures_and_source(
    chromium: Any, tmp_path: Path
) -> None:
    published = load_published("inria-2024")
    file = tmp_path / "page.html"
    file.write_text(
        compose.render_published_page(published, Slo(), Demand(input_len=119), HARDWARE),
        encoding="utf-8",
    )
    with open_page(chromium, file) as found:
        found.page.select_option("select[name=deployment]", "5")
        found.page.select_option("select[name=metric]", "seconds_per_100_tokens")
        found.wait_for_charts()
        assert found.messages == []
        assert found.requests == [file.as_uri()]
        text = found.page.locator("body").inner_text()
        assert "7 deployments, 392 cells: 365 served" in text
        assert "Published: Bendi-Ouis, Dutarte, Hinaut, 2024." in text
        # Rows as printed in the article for Mixtral 8x22B.
        last = found.page.locator("#grid tbody tr:last-child td").all_text_contents()
        assert last == ["52", "55.3", "67", "112", "✕", "✕", "✕"]
        row = found.page.locator("#plan tbody tr", has_text="mixtral-8x7b").first
        # As `servegrid capacity --published inria-2024 --input-len 119` computes it.
        assert json.loads(row.get_attribute("data-row"))["users_carried"] == 437
        assert found.page.locator("#validity, #provenance, #tables").count() == 0


CLASSES = {"chat": Slo(ttft_s=1.2), "code": Slo(tokens_per_s_per_user=1, e2el_s=60)}
RATES = (0.5, 1.0, 2.0)
GOODPUT = {"chat": (0.5, 0.75, 0.25), "code": (0.5, 1.0, 1.5)}
"""Requests per second that meet each class, at RATES. At the last rate, 1.6 are answered."""


def attainment_of(deployment: str) -> pd.DataFrame:
    """A table of `columns.SLO` of open loops at RATES."""
    rows = [
        {
            "deployment": deployment,
            "protocol": "poisson",
            "request_rate": rate,
            "input_len": 31,
            "output_len": 100,
            "slo_class": name,
            "slo": str(CLASSES[name]),
            "whole_run": rate == 2,
            "slo_attainment": goodput / rate,
            "goodput_requests_per_s": goodput,
            "goodput_requests_per_s_low": 0.9 * goodput,
            "goodput_requests_per_s_high": 1.1 * goodput,
            "requests_per_s": min(rate, 1.6),
        }
        for name, values in GOODPUT.items()
        for rate, goodput in zip(RATES, values, strict=True)
    ]
    frame = pd.DataFrame(rows, columns=[column.name for column in columns.SLO])
    return cast_columns(frame, columns.SLO)


@pytest.fixture(scope="module")
def classes_page(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Path]:
    """Open loops of one deployment, and bursts of it and of another one, with two SLO classes."""
    open_loop = {"protocol": "poisson", "concurrency": None}
    rows = [trial(0, 1, 31, request_rate=rate) | open_loop for rate in RATES]
    rows += [row for row in REPEATED if row["protocol"] == "burst" and row["valid"]]
    cells = study(*rows)
    summary = summarise(cells)
    results = compose.StudyResults(
        *(cells, summary, compute_frontier(summary, Slo())),
        *(compare_with_published(summary, None), Slo(), None, ["distinct"], []),
        slo_classes=CLASSES,
        attainment=attainment_of("deployment-0"),
    )
    file = tmp_path_factory.mktemp("classes") / "index.html"
    demand = Demand(ttft_s=1.2, slo_class="chat")
    text = compose.render_study_page("classes", results, demand, HARDWARE)
    file.write_text(text, encoding="utf-8")
    return summary, file


def test_goodput_is_drawn_for_each_class_against_the_request_rate(
    chromium: Any, classes_page: tuple[pd.DataFrame, Path]
) -> None:
    with open_page(chromium, classes_page[1]) as found:
        workloads = found.page.locator("select[name=workload] option").all_inner_texts()
        open_loop = next(text for text in workloads if text.startswith("poisson"))
        found.page.select_option("select[name=workload]", label=open_loop)
        found.wait_for_charts()
        labels = found.page.eval_on_selector_all(
            "#goodput .mark-symbol.role-mark path",
            "points => points.map(point => point.getAttribute('aria-label'))",
        )
        for name in ("answered", "goodput, chat", "goodput, code"):
            assert len([label for label in labels if name in label]) == len(RATES), labels
        legend = found.page.locator("#goodput .role-legend-label").all_text_contents()
        assert {"answered", "goodput, chat", "goodput, code"} <= set(legend)
        caption = found.page.locator("#goodput-caption").inner_text()
        assert "Hollow markers: no stationary part" in caption
        assert "Bars: 95% intervals." in caption
        bursts = next(text for text in workloads if text.startswith("burst"))
        found.page.select_option("select[name=workload]", label=bursts)
        found.wait_for_charts()
        assert not found.page.locator("#goodput-figure").is_visible()
        assert found.messages == []


def test_open_loops_alone_have_charts_of_usual_size_and_short_rates(
    chromium: Any, tmp_path: Path
) -> None:
    """Without tokens/s per user, the chart of the SLO's line alone was 1.8e308 pixels high."""
    rates = (0.1241666137193376, 2.0)
    open_loop = {"protocol": "poisson", "concurrency": None, "output_tokens_per_s_per_user": None}
    cells = study(*(trial(0, 1, 31, request_rate=rate) | open_loop for rate in rates))
    with open_page(chromium, write_page(cells, tmp_path / "open.html")) as found:
        found.wait_for_charts()
        assert found.page.locator("select[name=metric]").input_value() == "output_tokens_per_s"
        labels = found.page.locator("#heatmap .role-axis-label text").all_text_contents()
        assert {"0.124", "2"} <= set(labels)
        ticks = found.page.locator("#curves .role-axis-label text").all_text_contents()
        assert {"0.124", "2"} <= set(ticks)
        assert found.page.evaluate("document.documentElement.scrollHeight") < 10_000
        assert not found.page.locator("#pareto").is_visible()
        caption = found.page.locator("#pareto-caption").inner_text()
        assert caption == "At a request rate, there are no output tokens/s per user."
        assert found.messages == []


def test_signs_in_the_charts_and_what_the_headline_leaves_out(
    chromium: Any, tmp_path: Path
) -> None:
    """A cell that is not valid is not Pareto-optimal, even if it is the fastest."""
    broken = {"valid": False, "invalid_rules": ["drifted"], "invalid_evidence": ["differ by 21%"]}
    skipped = FAILED | {"verdict": "not_run", "verdict_detail": "not needed by the search"}
    rows = (
        *(trial(0, load, 31) for load in (2, 4)),
        trial(0, 1, 31) | broken,
        trial(0, 8, 31) | skipped,
        trial(1, 1, 31) | broken,
    )
    with open_page(chromium, write_page(study(*rows), tmp_path / "signs.html")) as found:
        found.page.select_option("select[name=deployment]", "0")
        found.wait_for_charts()
        signs = found.page.locator("#heatmap-caption").inner_text()
        assert "–: not run" in signs and "!: not valid" in signs and "not known" not in signs
        labels = found.page.locator("#pareto .mark-text.role-mark text").all_text_contents()
        assert sorted(filter(None, labels)) == ["!", "!", "2", "4"]
        assert (
            "!: not valid, so not compared." in found.page.locator("#pareto-caption").inner_text()
        )
        headline = found.page.locator("#headline").inner_text()
        assert "1 other deployment without a plan: the table says why." in headline
        assert found.messages == []


@pytest.mark.parametrize(("left_out", "noted"), [(1, True), (8, False)])
def test_the_headline_says_that_a_search_left_out_lower_loads(
    left_out: int, noted: bool, chromium: Any, tmp_path: Path
) -> None:
    skipped = FAILED | {"verdict": "not_run", "verdict_detail": "not needed by the search"}
    rows = (*(trial(0, load, 31) for load in (2, 4)), trial(0, left_out, 31) | skipped)
    with open_page(chromium, write_page(study(*rows), tmp_path / "low.html")) as found:
        headline = found.page.locator("#headline").inner_text()
        assert ("A search left out lower loads: a full grid can show" in headline) == noted
        assert found.messages == []


def test_a_class_of_users_brings_its_limits_into_the_plan(
    chromium: Any, classes_page: tuple[pd.DataFrame, Path]
) -> None:
    summary, file = classes_page
    with open_page(chromium, file) as found:
        for name in ("chat", "code"):
            found.page.select_option("#demand [name=slo_class]", name)
            limits = CLASSES[name]
            typed = found.page.locator("#demand [name=ttft_s]").input_value()
            assert typed == ("" if limits.ttft_s is None else f"{limits.ttft_s:g}")
            expected = plan_capacity(summary, Demand(**asdict(limits), slo_class=name), HARDWARE)
            rows = found.page.eval_on_selector_all(
                "#plan tbody tr", "rows => rows.map(row => JSON.parse(row.dataset.row))"
            )
            carried = [row.get("users_carried") for row in rows]
            assert carried == [
                None if pd.isna(value) else value for value in expected["users_carried"]
            ]
            assert len(set(carried)) > 1
        assert found.messages == []
