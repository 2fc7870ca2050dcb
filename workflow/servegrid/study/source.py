"""Where the prompts of a workload and the lengths of its requests come from. Pure.

The content of a file is known by its SHA-256 and a few facts, never by its path: a cell is the same
wherever the file lies.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from servegrid.errors import ConfigError

Kind = Literal["text", "random", "file", "trace"]
Shape = Literal["fixed", "uniform", "normal", "lognormal"]

BLOCK_TOKENS = 512
"""Tokens per entry of `hash_ids` in a trace of Mooncake."""


@dataclass(frozen=True)
class Distribution:
    """The distribution of a length in tokens: the standard deviation is `cv` times the mean.

    Lengths are from 1 to `max`. What a normal or lognormal distribution draws outside of this is
    drawn again, so the mean of the lengths differs a little from that of the distribution.
    """

    shape: Shape
    cv: float
    max: int

    def draw(self, rng: random.Random, mean: int, least: int = 1) -> int:
        """One length of at least `least` tokens."""
        for _ in range(_MAX_DRAWS):
            length = round(self._value(rng, mean))
            if least <= length <= self.max:
                return length
        return min(max(mean, least), self.max)

    def _value(self, rng: random.Random, mean: int) -> float:
        if self.shape == "uniform":
            half = uniform_half_width(self.cv) * mean
            return rng.uniform(mean - half, mean + half)
        if self.shape == "normal":
            return rng.normalvariate(mean, self.cv * mean)
        # With these parameters, mean and standard deviation are `mean` and `cv` * `mean`.
        variance = math.log1p(self.cv**2)
        return rng.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))


_MAX_DRAWS = 1000


def uniform_half_width(cv: float) -> float:
    """Half the width of a uniform distribution, as a fraction of its mean.

    The standard deviation of a uniform distribution is its half-width divided by the root of 3.
    """
    return math.sqrt(3) * cv


@dataclass(frozen=True)
class FileFacts:
    """What a study must know of a file: `sha256`, its usable `rows`, and the rows `left_out`.

    For a trace also the rounded means of the lengths, the largest ones, in tokens, and `span_s`,
    the time from the first to the last row. `shares_blocks` is whether it has hash_ids. Rows with
    more than `context` tokens, prompt and output together, are among those left out. `turns` is the
    number of the user's turns in all usable rows, if the source has the key `turns`.
    """

    sha256: str
    rows: int
    left_out: int = 0
    input_len: int = 0
    output_len: int = 0
    max_input_len: int = 0
    max_output_len: int = 0
    span_s: float = 0.0
    shares_blocks: bool = False
    context: int = 0
    turns: int = 0

    @property
    def spec(self) -> dict[str, Any]:
        """The fields as plain JSON data; `turns` only if it is set: older cells stay the same."""
        return {key: value for key, value in asdict(self).items() if key != "turns" or value}


@dataclass(frozen=True)
class Source:
    """The source of one workload's requests.

    `text` cuts the corpus to length, `random` draws token ids; both draw lengths from `input_lens`
    and `output_lens`, or jointly from the rows of `file`. `file` sends the texts of `file`, and
    `trace` sends requests of the lengths of `file` at its times, `speedup` times as fast. Only the
    first `first_s` seconds of a trace are used. With `prefix_len`, that many tokens at the start
    of a prompt are one of `prefix_groups` common prefixes. With `turns`, requests are the turns of
    conversations: that many of each user, or `all` that a row of a file has.
    """

    kind: Kind = "text"
    input_lens: Distribution | None = None
    output_lens: Distribution | None = None
    file: FileFacts | None = None
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    speedup: float = 1.0
    first_s: float | None = None
    prefix_len: int = 0
    prefix_groups: int = 1
    turns: int | Literal["all"] = 1

    @property
    def spec(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain JSON data."""
        data = asdict(self)
        if self.file is not None:
            data["file"] = self.file.spec
        return {
            field.name: data[field.name]
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Self:
        """The inverse of `spec`."""
        parsed = dict(spec)
        for key in ("input_lens", "output_lens"):
            if parsed.get(key) is not None:
                parsed[key] = Distribution(**parsed[key])
        if parsed.get("file") is not None:
            parsed["file"] = FileFacts(**parsed["file"])
        return cls(**parsed)

    @property
    def has_fixed_lengths(self) -> bool:
        """Whether all requests have the same lengths, but for `output_spread`."""
        are_drawn = self.input_lens is not None or self.output_lens is not None
        return self.file is None and not are_drawn and not self.has_turns

    @property
    def has_turns(self) -> bool:
        """Whether its requests are the turns of conversations."""
        return self.turns != 1

    @property
    def mean_turns(self) -> float:
        """The turns of the user per conversation, as a mean."""
        if self.file is not None and self.has_turns:
            return self.file.turns / self.file.rows
        assert self.turns != "all"
        return float(self.turns)

    @property
    def needs_ids(self) -> bool:
        """Whether its prompts exist only as token ids, not as text."""
        has_blocks = self.kind == "trace" and self.file is not None and self.file.shares_blocks
        return self.kind == "random" or self.prefix_len > 0 or has_blocks

    @property
    def label(self) -> str:
        """Its kind, and the first digits of its file's SHA-256: `trace 1f2e3d4c`; its turns."""
        name = self.kind if self.file is None else f"{self.kind} {self.file.sha256[:8]}"
        return f"{name}, {self.turns} turns" if self.has_turns else name


NEEDS_FILE: tuple[Kind, ...] = ("file", "trace")


def parse_source(keys: Mapping[str, Any], where: str) -> Source | None:
    """The source that the keys of `workload.source` describe; None if it is the default.

    The path of a file must already have been replaced by `facts`. Raises ConfigError, with the
    place `where`, if keys contradict each other.
    """
    kind: Kind = keys["kind"]
    _check_keys(keys, kind, where)
    source = Source(
        kind=kind,
        input_lens=_parse_distribution(keys, "input_lens", where),
        output_lens=_parse_distribution(keys, "output_lens", where),
        file=FileFacts(**keys["facts"]) if "facts" in keys else None,
        **{key: keys[key] for key in _COPIED if key in keys},
    )
    return None if source == Source() else source


_COPIED = ("on_bad_rows", "first_s", "prefix_len", "prefix_groups", "turns")
_ALLOWED: Mapping[str, tuple[Kind, ...]] = {
    "input_lens": ("text", "random"),
    "output_lens": ("text", "random"),
    "prefix_len": ("text", "random"),
    "prefix_groups": ("text", "random"),
    "speedup": ("trace",),
    "first_s": ("trace",),
    "turns": ("text", "random", "file"),
}


def _check_keys(keys: Mapping[str, Any], kind: Kind, where: str) -> None:
    for key, kinds in _ALLOWED.items():
        if key in keys and kind not in kinds:
            names = " or ".join(f"`{each}`" for each in kinds)
            raise ConfigError(f"{where}.{key}: is only for the kind {names}. Remove it.")
    if kind in NEEDS_FILE and "facts" not in keys:
        raise ConfigError(
            f"{where}: the kind `{kind}` needs `path`, the file. Add it. A bundle does not contain "
            "the file: ask its authors."
        )
    if keys.get("in_bundle") and "facts" not in keys:
        raise ConfigError(f"{where}.in_bundle: there is no file without `path`. Remove it.")
    if "facts" in keys:
        for key in ("input_lens", "output_lens", "prefix_len"):
            if key in keys:
                raise ConfigError(
                    f"{where}.{key}: the lengths already come from the file. Remove one of the two."
                )
    if "turns" in keys and kind != "file":
        if keys["turns"] == "all":
            raise ConfigError(
                f"{where}.turns: `all` is only for the kind `file`. Write a number of turns."
            )
        if "facts" in keys:
            raise ConfigError(
                f"{where}.turns: each turn would need a length, and a row of the file has the "
                "lengths of one request. Remove `path` or `turns`."
            )
    if "prefix_groups" in keys and "prefix_len" not in keys:
        raise ConfigError(f"{where}.prefix_groups: needs `prefix_len`. Add it, or remove this key.")


def _parse_distribution(keys: Mapping[str, Any], key: str, where: str) -> Distribution | None:
    """The distribution under `key`; None if all lengths are equal."""
    given = keys.get(key)
    if given is None or given["distribution"] == "fixed":
        return None
    shape, cv = given["distribution"], given.get("cv")
    if cv is None:
        raise ConfigError(f"{where}.{key}: `cv` is missing: standard deviation / mean. Add it.")
    if shape == "uniform" and uniform_half_width(cv) >= 1:
        raise ConfigError(
            f"{where}.{key}.cv: {cv:g} is too much for a uniform distribution: it would reach "
            "below 0. Use less than 0.577, or another distribution."
        )
    if shape != "uniform" and "max" not in given:
        raise ConfigError(
            f"{where}.{key}: `max` is missing. A {shape} distribution has no largest length: name "
            "the largest one to send, in tokens."
        )
    return Distribution(shape, cv, given.get("max", _UNLIMITED))


_UNLIMITED = 10**9
