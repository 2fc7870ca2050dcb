"""The service level objective of a study. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Slo:
    """The service level objective: what every user must get.

    `tokens_per_s_per_user` is a minimum and includes the time to first token. `ttft_s` and `e2el_s`
    are maxima; None means no limit. The frontier applies them to medians, goodput to each request.
    """

    tokens_per_s_per_user: float = 5.0
    ttft_s: float | None = None
    e2el_s: float | None = None

    def is_met(self, ttft_s: Any, e2el_s: Any, tokens: Any) -> Any:
        """Which requests meet it: boolean array, from arrays of seconds and of output tokens."""
        met = tokens >= self.tokens_per_s_per_user * e2el_s
        for latency, limit in ((ttft_s, self.ttft_s), (e2el_s, self.e2el_s)):
            if limit is not None:
                met &= latency <= limit
        return met

    def __str__(self) -> str:
        parts = [f"{self.tokens_per_s_per_user:g} tokens/s"]
        if self.ttft_s is not None:
            parts.append(f"the first token within {self.ttft_s:g} s")
        if self.e2el_s is not None:
            parts.append(f"the last token within {self.e2el_s:g} s")
        return ", ".join(parts)


DEFAULT_SLO = Slo()


def parse_slo(study: Mapping[str, Any]) -> Slo:
    """The SLO in a study's configuration, which matches the schema."""
    return Slo(**study.get("slo", {}))
