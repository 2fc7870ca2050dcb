"""A service may choose which of the waiting jobs of its allocation runs next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from snakemake_executor_plugin_submitit.allocation import _Everywhere
from snakemake_executor_plugin_submitit.spool import Spool, Task


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool.create(tmp_path / "spool")
    for order in (3, 5, 9):
        spool.put(Task(f"job{order}", (), "/", None, order))
    return spool


def next_order(spool: Spool, **attributes: Any) -> int:
    service: Any = SimpleNamespace(env={}, healthy=lambda: True, **attributes)
    _Everywhere(service, None).choose(spool)
    taken = spool.take()
    assert taken is not None
    return taken[1].order


@pytest.mark.parametrize(
    ("choose", "order"),
    [
        (max, 9),
        (lambda orders: orders[1], 5),
        (lambda _: None, 3),
        (lambda _: 4, 3),  # no such job waits
        (None, 3),
    ],
)
def test_the_chosen_job_runs_next(
    spool: Spool, choose: Callable[[Sequence[int]], int | None] | None, order: int
) -> None:
    assert next_order(spool, choose=choose) == order


def test_a_service_need_not_choose(spool: Spool) -> None:
    assert next_order(spool) == 3


def test_an_error_leaves_the_order_and_is_shown(
    spool: Spool, capsys: pytest.CaptureFixture[str]
) -> None:
    def choose(_: Sequence[int]) -> int:
        raise ValueError("no idea")

    assert next_order(spool, choose=choose) == 3
    assert "no idea" in capsys.readouterr().err
