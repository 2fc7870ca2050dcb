"""The service level objectives of a study. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Slo:
    """The service level objective: what every user must get.

    `tokens_per_s_per_user` is a minimum and includes the time to first token. The others are
    maxima; None means no limit. `itl_s` limits the longest inter-token latency of a request. The
    frontier and the plan apply the limits to medians, attainment and goodput to each request.
    """

    tokens_per_s_per_user: float = 5.0
    ttft_s: float | None = None
    e2el_s: float | None = None
    tpot_s: float | None = None
    itl_s: float | None = None

    def is_met(self, ttft_s: Any, e2el_s: Any, tokens: Any, itl_max_s: Any = None) -> Any:
        """Which requests meet it: boolean array, from arrays of seconds and of output tokens.

        `itl_max_s` has the longest inter-token latency of each request; NaN for one token. It is
        needed only with a limit on it. A response of one token has the tpot 0, as in `vllm bench`.
        """
        met = tokens >= self.tokens_per_s_per_user * e2el_s
        for latency, limit in ((ttft_s, self.ttft_s), (e2el_s, self.e2el_s)):
            if limit is not None:
                met &= latency <= limit
        if self.tpot_s is not None:
            met &= e2el_s - ttft_s <= self.tpot_s * (tokens - 1)
        if self.itl_s is not None:
            met &= ~(np.asarray(itl_max_s) > self.itl_s)
        return met

    @property
    def needs_arrivals(self) -> bool:
        """Whether it limits what depends on when single tokens arrived."""
        return any(limit is not None for limit in (self.ttft_s, self.tpot_s, self.itl_s))

    def __str__(self) -> str:
        parts = [f"{self.tokens_per_s_per_user:g} tokens/s"]
        for limit, what in (
            (self.ttft_s, "the first token within {:g} s"),
            (self.e2el_s, "the last token within {:g} s"),
            (self.tpot_s, "at most {:g} s per output token"),
            (self.itl_s, "no pause of more than {:g} s"),
        ):
            if limit is not None:
                parts.append(what.format(limit))
        return ", ".join(parts)


DEFAULT_SLO = Slo()
ONLY_CLASS = "all"
"""The name of the class if a study has no classes."""


def parse_slo(study: Mapping[str, Any]) -> Slo:
    """The SLO in a study's configuration, which matches the schema; of several classes the first.

    The columns of `columns.CELLS` and the findings are for this one.
    """
    return next(iter(parse_slo_classes(study).values()))


def parse_slo_classes(study: Mapping[str, Any]) -> dict[str, Slo]:
    """All SLO classes by name, in the order of the study; ONLY_CLASS if it names none."""
    given = study.get("slo") or {}
    if any(isinstance(limits, Mapping) for limits in given.values()):
        return {name: Slo(**limits) for name, limits in given.items()}
    return {ONLY_CLASS: Slo(**given)}
