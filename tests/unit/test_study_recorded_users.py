"""What a trace or a file says about users, counted by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from servegrid.errors import ConfigError
from servegrid.study.config import parse_study
from servegrid.study.recorded_users import (
    RecordedUsers,
    busiest_window,
    describe_conversations,
    describe_trace,
    group_lengths,
    resolve_users,
)
from servegrid.study.source_files import UserRequest, drop_paths, read_conversations
from servegrid.study.tokenizer import Encoded

HEAD = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens\n"


class Words:
    """A tokenizer that makes one token of each word."""

    def encode(self, text: str) -> Encoded:
        return Encoded(list(range(len(text.split()))), [])


def requests(*times: float, **other: Any) -> list[UserRequest]:
    return [UserRequest(time, 100, 10, **other) for time in times]


def config(capacity: dict[str, Any]) -> dict[str, Any]:
    return {
        "study": "s",
        "workload": {"concurrency": 1, "input_len": 31},
        "capacity": capacity,
        "deployments": [
            {
                "model": "m",
                "checkpoint": "models/m",
                "quantization": "fp16",
                "engine": "vllm",
                "gpu": "a100-40gb",
                "max_model_len": 512,
            }
        ],
    }


def users_from(capacity: dict[str, Any]) -> RecordedUsers:
    resolved = resolve_users(config(capacity))["capacity"]["users_from"]
    return RecordedUsers.from_spec(resolved["facts"])


def test_the_busiest_window_has_the_most_requests() -> None:
    # From 50 s on, three requests lie within 10 s; the one at 60 s is outside.
    assert busiest_window([0, 1, 20, 50, 55, 59.9, 60], 10) == (3, 6)
    assert busiest_window([0, 5, 10], 10) == (0, 3)


def test_the_rates_of_a_day_and_its_load_factor() -> None:
    # One request per minute for a day, and 600 more within five minutes at noon.
    minutes = [60.0 * minute for minute in range(1441)]
    noon = [43_200 + 0.5 * number + 0.1 for number in range(600)]
    users = describe_trace(requests(*sorted(minutes + noon)))
    # The window starts with the request at noon: 600, and those at 0, 60, … 240 s.
    assert (users.window_s, users.window_requests) == (300.0, 605)
    assert users.busiest_requests_per_s == pytest.approx(605 / 300)
    assert users.span_s == 86_400
    assert users.load_factor == pytest.approx(2041 / 86_400 / (605 / 300))
    assert users.sessions is None and users.cycle_s is None


def test_less_than_a_day_has_no_load_factor_and_a_short_trace_is_its_own_window() -> None:
    users = describe_trace(requests(0, 10, 40, 150))
    assert (users.window_s, users.window_requests, users.load_factor) == (150.0, 4, None)
    for end in (7, 7.0001):
        with pytest.raises(ValueError, match="has 2 requests within 0 s"):
            describe_trace(requests(7, end))


def test_the_dispersion_of_arrivals() -> None:
    # 15 intervals of 10 s, one request each; then all 15 of the second half in one interval.
    even = [10.0 * number for number in range(15)] + [150.0]
    assert describe_trace(requests(*even)).dispersion == 0
    # Counts 15 and 14 × 0 have the mean 1 and the variance (196 + 14) / 14 = 15.
    bursts = [float(number) / 2 for number in range(15)] + [150.0]
    assert describe_trace(requests(*bursts)).dispersion == pytest.approx(15)
    assert describe_trace(requests(0, 99)).dispersion is None


def test_a_slow_change_of_the_rate_is_no_burst() -> None:
    # One request per 10 s for an hour, then ten at equal distances.
    slow = [10.0 * number for number in range(360)]
    fast = [3600.0 + number for number in range(3600)]
    assert describe_trace(requests(*slow, *fast)).dispersion == 0
    # Pairs at the same time: counts per 10 s are 0 and 2 in turn, except in the busiest window.
    pairs = [20.0 * (number // 2) for number in range(360)]
    found = describe_trace(requests(*pairs, *fast)).dispersion
    # 12 windows with the variance 30 / 29 and the mean 1, and 11 full ones with 0 and 10.
    assert found == pytest.approx(12 * 30 / 29 / (12 + 110), abs=1e-3)


def test_the_think_time_is_between_the_response_and_the_next_request() -> None:
    # Two sessions send every 40 s; a response takes 10 s. A break of an hour does not count.
    times = [(40.0 * number, name) for number in range(20) for name in ("a", "b")]
    times += [(800 - 40 + 3600.0, "a")]
    found = describe_trace([UserRequest(time, 9, 9, name, 10.0) for time, name in times])
    assert (found.cycle_s, found.think_time_s, found.sessions) == (40.0, 30.0, 2)
    assert found.followed == pytest.approx(38 / 41, abs=1e-4)
    unknown = describe_trace([UserRequest(time, 9, 9, name) for time, name in times])
    assert (unknown.cycle_s, unknown.think_time_s) == (40.0, None)


def test_too_few_requests_with_a_session_say_nothing_about_users() -> None:
    with_session = [UserRequest(40.0 * number, 9, 9, "a") for number in range(40)]
    without = [each._replace(session=None) for each in with_session]
    half = sorted([*with_session, *without], key=lambda each: each.time_s)
    few = describe_trace([*half, without[-1]])
    assert (few.cycle_s, few.sessions) == (None, None)
    enough = describe_trace(half)
    assert enough.cycle_s == 40.0
    assert describe_trace(with_session[:30]).cycle_s is None  # 29 pairs
    assert describe_trace(with_session[:31]).cycle_s == 40.0
    at_once = [each._replace(time_s=each.time_s * 1e-6) for each in with_session]
    assert describe_trace([*at_once, UserRequest(9.0, 9, 9)]).cycle_s is None


def test_close_lengths_count_as_the_longest_of_them() -> None:
    # 100 × 1.05 = 105, and 95.3 × 1.05 is more than 100.
    assert group_lengths([105, 100, 99, 105, 96, 5]) == ((5, 1), (99, 2), (105, 3))


def test_a_trace_with_sessions_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    rows = [f"{40 * number},{number % 2},7,GPT-4,100,20,120\n" for number in range(100)]
    path.write_text(HEAD + "".join(rows), encoding="utf-8")
    users = users_from({"users_from": {"kind": "trace", "path": str(path)}})
    assert (users.requests, users.input_len, users.output_len) == (100, 100, 20)
    assert (users.cycle_s, users.think_time_s) == (80.0, 73.0)
    first = users_from({"users_from": {"kind": "trace", "path": str(path), "first_s": 400}})
    assert (first.requests, first.span_s, first.cycle_s) == (10, 360.0, None)


CHATS = [
    {"prompt": "one two three", "output_tokens": 8},
    {
        "messages": [
            {"role": "user", "content": "a b"},
            {"role": "assistant", "content": "c d e"},
            {"role": "user", "content": "f"},
            {"role": "assistant", "content": "g h"},
        ]
    },
    {"prompt": "only this"},
]


def test_a_file_has_lengths_and_no_times(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in CHATS), encoding="utf-8")
    rows = read_conversations(path, "refuse").rows
    # A row is one prompt: 3, 2 + 3 + 1, and 2 words. Two rows have an output length.
    single = describe_conversations(rows, 1, Words())
    assert single.input_lens == ((2, 1), (3, 1), (6, 1))
    assert (single.requests, single.output_len) == (3, 5.0)
    # Each turn is a request: 2 words, then 2 + 3 + 1 with the history.
    turns = describe_conversations(rows, "all", Words())
    assert turns.input_lens == ((2, 2), (3, 1), (6, 1))
    assert turns.output_len == pytest.approx((8 + 3 + 2) / 3, abs=1e-4)
    assert (turns.busiest_requests_per_s, turns.load_factor, turns.cycle_s) == (None, None, None)
    first = describe_conversations(rows[1:2], 2, Words())
    assert first.requests == 2
    assert describe_conversations(rows[2:], 1, Words()).output_len is None


def test_the_figures_replace_the_path(tmp_path: Path) -> None:
    path = tmp_path / "secret-place.csv"
    path.write_text(HEAD + "0,,,m,100,20,120\n9,,,m,100,20,120\n", encoding="utf-8")
    given = config({"users_from": {"kind": "trace", "path": str(path)}})
    resolved = json.loads(json.dumps(resolve_users(given)))
    assert "secret-place" not in json.dumps(resolved)
    path.unlink()
    parse_study(resolved)
    assert resolve_users(resolved) == resolved
    # Whatever a bundle's configuration says, no file of this machine is read.
    assert "path" not in drop_paths(given)["capacity"]["users_from"]


TRACE = {"kind": "trace", "path": "trace.csv"}
FILE = {"kind": "file", "path": "chats.jsonl"}


@pytest.mark.parametrize(
    ("capacity", "message"),
    [
        ({"users_from": {"kind": "trace"}}, r"users_from: `path`, the file, is missing"),
        ({"users_from": TRACE, "users": 9}, r"capacity\.users: comes from the trace of"),
        ({"users_from": TRACE, "logged_in": 0.5}, r"capacity\.logged_in: comes from the trace"),
        ({"users_from": TRACE, "input_len": 31}, r"capacity\.input_len: comes from the trace"),
        (
            {"users_from": FILE, "prompt_mix": [{"input_len": 31, "share": 1}]},
            r"capacity\.prompt_mix: comes from the file",
        ),
        ({"users_from": {**TRACE, "turns": "all"}}, r"turns: is only for the kind `file`"),
        ({"users_from": {**FILE, "first_s": 9}}, r"first_s: is only for the kind `trace`"),
        ({"users_from": {"kind": "text"}}, "'text' is not one of `trace`, `file`"),
        (
            {"users_from": {"kind": "trace", "facts": {"kind": "file", "sha256": "0" * 64}}},
            "`requests` is missing",
        ),
    ],
)
def test_contradicting_keys_are_refused_before_the_file_is_read(
    capacity: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        parse_study(config(capacity), ["study.yaml"])
    assert str(refused.value).startswith("study.yaml: ")


def test_facts_of_a_trace_have_a_rate() -> None:
    facts = {
        "kind": "trace",
        "sha256": "0" * 64,
        "requests": 1,
        "input_len": 1,
        "input_lens": [[1, 1]],
    }
    with pytest.raises(ConfigError, match="facts: are not those of a trace"):
        parse_study(config({"users_from": {"kind": "trace", "facts": facts}}))
    huge = facts | {"input_lens": [[1, 10**400]]}
    with pytest.raises(ConfigError, match=r"facts\.input_lens\[0\]\[1\]: .* is more than"):
        parse_study(config({"users_from": {"kind": "trace", "facts": huge}}))
    both = {"kind": "trace", "path": "t.csv", "facts": facts}
    with pytest.raises(ConfigError, match="writes this key in place of `path`"):
        parse_study(config({"users_from": both}))


@pytest.fixture
def rows() -> Iterator[list[str]]:
    yield [f"{40 * number},a,7,m,100,20,120\n" for number in range(40)]


@pytest.mark.parametrize(
    ("capacity", "text", "message"),
    [
        ({}, None, r"trace\.csv: cannot be read \(No such file.* `capacity\.users_from\.path`"),
        ({}, "5,,,m,100,20,120\n", r"trace\.csv: has 1 requests within 0 s, .* Name a longer"),
        (
            {},
            "5,,,m,100,0,100\n",
            r"trace\.csv: line 2: `Response tokens` is '0'.*skip` under `capacity\.users_from`",
        ),
        ({}, "5,,soon,m,100,9,109\n", r"line 2: `Elapsed time` is 'soon', not a time"),
        ({}, "5,,,m,9,9,9\n4,,,m,9,9,9\n", r"line 3: goes back in time, by 1 s. Sort"),
        ({"think_time_s": 9}, "rows", r"capacity\.think_time_s: comes from the trace"),
        ({"load_factor": 0.5}, "day", r"capacity\.load_factor: comes from the trace"),
    ],
)
def test_a_trace_that_cannot_be_used_is_refused_with_file_and_remedy(
    tmp_path: Path, rows: list[str], capacity: dict[str, Any], text: str | None, message: str
) -> None:
    path = tmp_path / "trace.csv"
    day = "0,,,m,9,9,18\n86400,,,m,9,9,18\n"
    if text is not None:
        body = {"rows": "".join(rows), "day": day}.get(text, text)
        path.write_text(HEAD + body, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        users_from({**capacity, "users_from": {"kind": "trace", "path": str(path)}})


def test_a_file_needs_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"prompt": "a"}\n', encoding="utf-8")
    keys = {"kind": "file", "path": str(path)}
    with pytest.raises(ConfigError, match=r"users_from\.tokenizer: checkpoint `models/m`"):
        users_from({"users_from": keys})
    with pytest.raises(ConfigError, match=r"tokenizer: is missing"):
        resolve_users({"capacity": {"users_from": keys}})
