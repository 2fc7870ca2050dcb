"""What a trace or a file of users says about the users of the capacity plan.

Only derived numbers are kept, never the file's content or path: a bundle has them in place of the
file, and the plan follows from them alone.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from servegrid.errors import ConfigError, ModelError
from servegrid.study import models
from servegrid.study.source_files import (
    Conversation,
    UserRequest,
    read_conversations,
    read_user_requests,
)
from servegrid.study.tokenizer import TextTokenizer, open_tokenizer

KEY = "capacity.users_from"
WINDOW_S = 300.0
"""The busiest window of a trace has this length, or that of a shorter trace."""
DAY_S = 86_400.0
"""The load factor of a shorter trace is not known: the night is missing."""
BREAK_S = 1800.0
"""A user who sends nothing for longer has left: half an hour is the usual end of a session in the
analysis of web logs (Catledge and Pitkow, 1995, found 25.5 minutes)."""
MIN_GAPS = 30
"""With fewer pairs of requests of one session, there is no mean time between them."""
INTERVAL_S, MIN_INTERVALS = 10.0, 10
"""The dispersion of arrivals is that of the counts in intervals of this length."""
_GROUP = 1.05
"""Prompt lengths within this factor count as the longest of them."""


@dataclass(frozen=True)
class RecordedUsers:
    """The facts of a trace, or of a file of conversations or prompts.

    `input_lens` are pairs of a prompt length and the number of requests with about this length;
    `input_len` and `output_len` are exact means in tokens. A file may not know its output lengths.

    A trace also has its length `span_s`, and in its busiest window of `window_s` seconds the number
    of requests, their mean lengths and the number of different `sessions`. The `dispersion` of its
    arrivals is the variance of the counts in intervals of INTERVAL_S over their mean, within such
    windows: 1 for a Poisson process. If it has sessions, `followed` is the share of the requests
    that have a next one in their session, within BREAK_S, and `cycle_s` is the mean time until
    then. If it has response times too, `think_time_s` is that time less the response time.
    """

    kind: Literal["trace", "file"]
    sha256: str
    requests: int
    input_len: float
    input_lens: tuple[tuple[int, int], ...]
    output_len: float | None = None
    left_out: int = 0
    span_s: float = 0.0
    window_s: float = 0.0
    window_requests: int = 0
    window_input_len: float | None = None
    window_output_len: float | None = None
    dispersion: float | None = None
    sessions: int | None = None
    followed: float | None = None
    cycle_s: float | None = None
    think_time_s: float | None = None

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Self:
        """The inverse of `spec`."""
        return cls(**{**spec, "input_lens": tuple(map(tuple, spec["input_lens"]))})

    @property
    def spec(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain JSON data."""
        data = {**asdict(self), "input_lens": [list(pair) for pair in self.input_lens]}
        return {each.name: data[each.name] for each in fields(self) if _is_set(self, each)}

    @property
    def label(self) -> str:
        """Its kind and the first digits of its SHA-256: `trace 1f2e3d4c`."""
        return f"{self.kind} {self.sha256[:8]}"

    @property
    def busiest_requests_per_s(self) -> float | None:
        """The mean request rate in the busiest window; None for a file."""
        return self.window_requests / self.window_s if self.window_s else None

    @property
    def load_factor(self) -> float | None:
        """The mean request rate over that of the busiest window; None below a day."""
        busiest = self.busiest_requests_per_s
        if busiest is None or self.span_s < DAY_S:
            return None
        return min(1.0, self.requests / self.span_s / busiest)


def _is_set(users: RecordedUsers, field: Any) -> bool:
    value: Any = getattr(users, field.name)
    return bool(value != field.default)


def resolve_users(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config`, which matches the schema, with facts in place of the path of the plan's users.

    Without `capacity.users_from`, or if it has facts already, `config` stays as it is. Raises
    ConfigError if the file cannot be used, or if its facts contradict other keys.
    """
    capacity = config.get("capacity", {})
    keys = capacity.get("users_from")
    if keys is None:
        return dict(config)
    if "path" in keys:
        users = read_recorded(keys, config.get("deployments", ()))
        keys = {name: value for name, value in keys.items() if name not in ("path", "tokenizer")}
        keys["facts"] = users.spec
    _check_assumptions(capacity, RecordedUsers.from_spec(keys["facts"]))
    return {**config, "capacity": {**capacity, "users_from": keys}}


def check_users_from(capacity: Mapping[str, Any]) -> None:
    """Raise ConfigError if keys of `capacity` contradict `users_from`. Reads no file."""
    keys = capacity.get("users_from")
    if keys is None:
        return
    kind = keys["kind"]
    if "path" not in keys and "facts" not in keys:
        raise ConfigError(
            f"{KEY}: `path`, the file, is missing. Add it. A bundle does not contain the file."
        )
    if "path" in keys and "facts" in keys:
        raise ConfigError(f"{KEY}.facts: servegrid writes this key in place of `path`. Remove it.")
    if "facts" in keys:
        facts = RecordedUsers.from_spec(keys["facts"])
        if facts.kind != kind or (kind == "trace") != bool(facts.window_s and facts.span_s):
            raise ConfigError(f"{KEY}.facts: are not those of a {kind}. Name the file as `path`.")
    for key, of in (("first_s", "trace"), ("turns", "file"), ("tokenizer", "file")):
        if key in keys and kind != of:
            raise ConfigError(f"{KEY}.{key}: is only for the kind `{of}`. Remove it.")
    from_trace = ("users", "logged_in") if kind == "trace" else ()
    for key in ("input_len", "prompt_mix", *from_trace):
        if key in capacity:
            raise _comes_from(key, kind)


def _check_assumptions(capacity: Mapping[str, Any], users: RecordedUsers) -> None:
    known = {
        "load_factor": users.load_factor,
        "think_time_s": users.cycle_s if users.think_time_s is None else users.think_time_s,
    }
    for key, value in known.items():
        if value is not None and key in capacity:
            raise _comes_from(key, users.kind)


def _comes_from(key: str, kind: str) -> ConfigError:
    return ConfigError(
        f"capacity.{key}: comes from the {kind} of `users_from`. Remove one of the two keys."
    )


def read_recorded(
    keys: Mapping[str, Any],
    deployments: Sequence[Mapping[str, Any]] = (),
    named: str | None = None,
) -> RecordedUsers:
    """The facts of the file that the keys of `users_from` describe.

    The entries `deployments` of a study have the tokenizer, unless the keys name one. `named` is
    what names the path, if it is no key. Raises ConfigError if the file cannot be used.
    """
    path, on_bad_rows = Path(keys["path"]), keys.get("on_bad_rows", "refuse")
    if keys["kind"] == "trace":
        read = read_user_requests(path, on_bad_rows, keys.get("first_s"), KEY, named)
        try:
            return describe_trace(read.rows, read.sha256, read.left_out)
        except ValueError as error:
            raise ConfigError(f"{path}: {error} Name a longer trace, or raise `first_s`.") from None
    conversations = read_conversations(path, on_bad_rows, KEY)
    tokenizer = _open_tokenizer(keys.get("tokenizer"), deployments)
    turns = keys.get("turns", 1)
    return describe_conversations(
        conversations.rows, turns, tokenizer, conversations.sha256, conversations.left_out
    )


def _open_tokenizer(name: str | None, deployments: Sequence[Mapping[str, Any]]) -> TextTokenizer:
    if name is None:
        named = (each.get("tokenizer", each.get("checkpoint")) for each in deployments)
        name = next((each for each in named if each), None)
    if name is None:
        raise ConfigError(
            f"{KEY}.tokenizer: is missing: a file has texts, and the plan needs their tokens. Name "
            "the folder of a model's tokenizer."
        )
    try:
        return open_tokenizer(models.locate(name, models.default_folder()))
    except ModelError as error:
        raise ConfigError(f"{KEY}.tokenizer: {error}") from error


def describe_trace(
    requests: Sequence[UserRequest], sha256: str = "", left_out: int = 0
) -> RecordedUsers:
    """The facts of a trace, whose requests are in the order of their times.

    Raises ValueError if it has no rate.
    """
    times = [each.time_s for each in requests]
    span_s = round(times[-1] - times[0], 3) if times else 0.0
    if not span_s:
        raise ValueError(f"has {len(times)} requests within 0 s, so it has no request rate.")
    window_s = min(WINDOW_S, span_s)
    first, last = busiest_window(times, window_s)
    busiest = requests[first:last]
    sessions = {each.session for each in busiest} - {None}
    followed, cycle_s, think_time_s = _between_requests(requests)
    return RecordedUsers(
        kind="trace",
        sha256=sha256,
        requests=len(requests),
        input_len=_mean([each.input_len for each in requests]),
        input_lens=group_lengths([each.input_len for each in requests]),
        output_len=_mean([each.output_len for each in requests]),
        left_out=left_out,
        span_s=span_s,
        window_s=window_s,
        window_requests=len(busiest),
        window_input_len=_mean([each.input_len for each in busiest]),
        window_output_len=_mean([each.output_len for each in busiest]),
        dispersion=_dispersion(times, window_s, first),
        sessions=None if cycle_s is None else len(sessions),
        followed=followed,
        cycle_s=cycle_s,
        think_time_s=think_time_s,
    )


def describe_conversations(
    rows: Sequence[Conversation],
    turns: int | Literal["all"],
    tokenizer: TextTokenizer,
    sha256: str = "",
    left_out: int = 0,
) -> RecordedUsers:
    """The facts of a file. A row is one request, or with `turns` one request per user turn.

    The prompt of a turn has all messages before it, with the answers of the file. The output length
    of a request is its `output_tokens`, or the length of its answer.
    """
    lengths: list[int] = []
    outputs: list[int] = []
    for row in rows:
        history = 0
        limit = None if turns == "all" else turns
        for turn in [row] if turns == 1 else row.user_turns(limit):
            history += len(tokenizer.encode(turn.text).ids)
            lengths.append(max(1, history))
            answer = 0 if turn.answer is None else len(tokenizer.encode(turn.answer).ids)
            if known := turn.output_tokens or answer:
                outputs.append(known)
            history += answer
    return RecordedUsers(
        kind="file",
        sha256=sha256,
        requests=len(lengths),
        input_len=_mean(lengths),
        input_lens=group_lengths(lengths),
        output_len=_mean(outputs) if outputs else None,
        left_out=left_out,
    )


def busiest_window(times: Sequence[float], window_s: float) -> tuple[int, int]:
    """The positions from and up to which the most of ascending `times` lie within `window_s`.

    The window may start at any request. A window as long as the trace has all of it.
    """
    if window_s >= times[-1] - times[0]:
        return 0, len(times)
    ends = (bisect_left(times, time + window_s) for time in times)
    first, last = max(enumerate(ends), key=lambda window: (window[1] - window[0], -window[0]))
    return first, last


def group_lengths(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The lengths with the number of each, ascending; close ones count as the longest of them."""
    groups: list[list[int]] = []
    for length, count in sorted(Counter(lengths).items(), reverse=True):
        if groups and length * _GROUP >= groups[-1][0]:
            groups[-1][1] += count
        else:
            groups.append([length, count])
    return tuple((length, count) for length, count in reversed(groups))


def _dispersion(times: Sequence[float], window_s: float, busiest: int) -> float | None:
    """The dispersion of the arrivals in all windows, or in the one from `busiest` on if larger.

    Windows have a rate of their own, so that a slow change of the rate is no burst.
    """
    intervals = math.floor(window_s / INTERVAL_S)
    if intervals < MIN_INTERVALS:
        return None
    full = int((times[-1] - times[0]) // window_s)
    starts = [times[0] + number * window_s for number in range(full)]
    variances, means = zip(*(_moments(times, start, intervals) for start in starts), strict=True)
    variance, mean = _moments(times, times[busiest], intervals)
    everywhere = math.fsum(variances) / math.fsum(means) if any(means) else 0.0
    return round(max(everywhere, variance / mean), 3)


def _moments(times: Sequence[float], start: float, intervals: int) -> tuple[float, float]:
    """The variance and the mean of the counts in intervals of INTERVAL_S from `start` on."""
    edges = [bisect_left(times, start + number * INTERVAL_S) for number in range(intervals + 1)]
    counts = [end - begin for begin, end in itertools.pairwise(edges)]
    mean = math.fsum(counts) / intervals
    return math.fsum((count - mean) ** 2 for count in counts) / (intervals - 1), mean


def _between_requests(
    requests: Sequence[UserRequest],
) -> tuple[float | None, float | None, float | None]:
    """The share of requests that are followed by another one of their session, the mean time in
    between, and the mean think time in it.

    None if it is not known: fewer than half of the requests have a session, there are fewer than
    MIN_GAPS pairs, or a request of a pair has no response time.
    """
    own = [each for each in requests if each.session is not None]
    before: dict[str | None, UserRequest] = {}
    gaps: list[float] = []
    thinks: list[float] = []
    for request in own:
        last = before.get(request.session)
        before[request.session] = request
        if last is None or (gap := request.time_s - last.time_s) > BREAK_S:
            continue
        gaps.append(gap)
        if last.response_s is not None:
            thinks.append(max(0.0, gap - last.response_s))
    if 2 * len(own) < len(requests) or len(gaps) < MIN_GAPS or not _mean(gaps):
        return None, None, None
    think_time_s = _mean(thinks) or None if len(thinks) == len(gaps) else None
    return round(len(gaps) / len(own), 4), _mean(gaps), think_time_s


def _mean(values: Sequence[float]) -> float:
    return round(math.fsum(values) / len(values), 4)
