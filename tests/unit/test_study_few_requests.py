"""Cells that can hardly be valid are named before anything is submitted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from servegrid.study.few_requests import describe_few_requests
from servegrid.study.grid import Workload

LOOP = Workload("closed_loop", 2, 31, 100, requests=24)
OPEN = Workload("poisson", None, 31, 100, requests=None, request_rate=2.0, duration_s=10.0)


@pytest.mark.parametrize(
    ("workload", "few"),
    [
        (LOOP, False),  # 24 - 2 × 2 = 20
        (replace(LOOP, requests=23), True),
        (replace(LOOP, concurrency=3), True),  # 24 - 2 × 3 = 18
        (replace(LOOP, requests=None, duration_s=1.0), False),  # nobody knows how many
        (OPEN, False),  # 2 / s × 10 s = 20
        (replace(OPEN, duration_s=9.0), True),
        (replace(OPEN, duration_s=None, requests=2000), False),
        (replace(OPEN, request_rate=None, rate_fraction=0.5), False),
        (replace(OPEN, protocol="profile", rate_profile=(1.0,), duration_s=1.0), False),
        (Workload("burst", 2, 31, 100, requests=2), False),
    ],
)
def test_fewer_than_20_requests_of_the_stationary_part_are_too_few(
    workload: Workload, few: bool
) -> None:
    assert (describe_few_requests([workload]) is not None) == few


def test_the_sentence_names_a_cell_and_the_keys() -> None:
    one, other = replace(LOOP, requests=12), replace(LOOP, requests=12, input_len=64)
    text = describe_few_requests([LOOP, one, other, one])
    assert text is not None
    assert text.startswith(
        "Too few requests for valid results: closed_loop-c2-i31-o100 and 1 more."
    )
    assert text.endswith("Raise `requests_per_user` or `duration_s`.")
