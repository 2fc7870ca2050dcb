"""The rate at saturation, found by a closed loop. Pure.

It runs inside allocations too, so it needs neither pandas nor scipy. `goodput.find_saturation`
confirms it with the cells of the open loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from servegrid.analysis import metrics
from servegrid.errors import LoadError
from servegrid.study.grid import Trial


def saturation_rate(record: Mapping[str, Any], requests: pa.Table) -> float:
    """The requests per second of a closed loop that fills the engine.

    They are counted in its stationary part; if there is none, over the whole run, which is a bit
    less. The engine has always as many requests as it can run, so an open loop of the same requests
    cannot be served faster. Raises LoadError if no request was served.
    """
    trial = Trial.from_spec(record["spec"])
    served = requests.filter(pc.is_null(requests["error"]))
    window = metrics.stationary_window(requests, trial.workload)
    inside = served if window is None else metrics.completed_in(served, window)
    seconds = metrics.makespan_s(requests)[0] if window is None else window.seconds
    if not inside.num_rows or not seconds:
        raise LoadError(
            f"{trial.id}: no request was served ({record['verdict']}), so the rate at saturation "
            "is not known. Lower `max_num_seqs`, or give rates instead of `request_rate: sweep`."
        )
    return float(inside.num_rows / seconds)
