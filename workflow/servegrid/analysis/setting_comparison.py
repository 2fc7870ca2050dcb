"""What each swept setting of an engine is worth: pairs of deployments that differ only in it. Pure.

Each pair is compared as `servegrid compare` compares two studies, with the bring-up as the unit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from servegrid.analysis.comparison import Ratio, apply_fdr, compare
from servegrid.errors import ComparisonError

Settings = Mapping[str, tuple[str, Mapping[str, Any]]]
"""Base and settings of each swept deployment, from `study.settings.swept_settings`."""
QUEUEING = "server_queueing"
HEAD = ("deployment", "setting", "change", "other settings", "speed, second / first", "verdict")


def compare_settings(cells: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """One row of texts per pair of values of a setting, with the columns HEAD.

    `cells` is a table of `columns.CELLS`. The ratio is of output tokens/s over the cells that both
    deployments have, with its 95% interval over bring-ups; without two bring-ups there is none. The
    verdicts control the false discovery rate over all pairs. Cells whose requests waited in the
    server count as valid, because that is what a setting such as `max_num_seqs` changes.
    """
    cells = _with_queues(cells)
    rows, ratios = [], []
    for base, key, first, second in _pairs(settings):
        ratio = _compare(cells, first, second)
        if ratio is None:
            continue
        values = [settings[name][1] for name in (first, second)]
        others = [f"{name} {value}" for name, value in values[0].items() if name != key]
        change = f"{values[0][key]} → {values[1][key]}"
        rows.append([base, key, change, ", ".join(others) or "–"])
        ratios.append(ratio)
    texts = [
        [*row, _format(ratio), ratio.verdict]
        for row, ratio in zip(rows, apply_fdr(ratios), strict=True)
    ]
    return pd.DataFrame(texts, columns=list(HEAD))


def _pairs(settings: Settings) -> Iterator[tuple[str, str, str, str]]:
    """Base, setting and the names of two deployments that differ only in this setting."""
    for (first, (base, one)), (second, (other_base, other)) in itertools.combinations(
        settings.items(), 2
    ):
        different = [key for key in one if base == other_base and one[key] != other[key]]
        if len(different) == 1:
            yield base, different[0], first, second


def _with_queues(cells: pd.DataFrame) -> pd.DataFrame:
    """`cells`, of which those that break no other rule than QUEUEING are valid."""
    queued = [
        pd.api.types.is_list_like(rules) and list(rules) == [QUEUEING]
        for rules in cells["invalid_rules"]
    ]
    return cells.assign(valid=cells["valid"].mask(pd.Series(queued, index=cells.index), True))


def _compare(cells: pd.DataFrame, first: str, second: str) -> Ratio | None:
    """The ratio of two deployments; None if they have no valid cell in common."""
    sides = [
        cells[cells["deployment"] == name].assign(deployment=f"{first} → {second}")
        for name in (first, second)
    ]
    try:
        (ratio,) = compare(sides[0], sides[1]).deployments
    except ComparisonError:
        return None
    return ratio


def _format(ratio: Ratio) -> str:
    text = f"{ratio.ratio:.3f}"
    return text if ratio.low is None else f"{text} [{ratio.low:.3f}, {ratio.high:.3f}]"
