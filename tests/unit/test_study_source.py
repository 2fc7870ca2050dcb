"""Files of users become facts of a study, and bad ones are refused with file, line and remedy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from servegrid.errors import ConfigError
from servegrid.study.config import parse_study
from servegrid.study.grid import Study, Trial, Workload
from servegrid.study.source import Source
from servegrid.study.source_files import (
    bundled_name,
    drop_paths,
    read_conversations,
    read_lengths,
    read_trace,
    resolve_sources,
)

USER = {"role": "user", "content": "How warm is it?"}
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,100,10\n"
    "2023-11-16 18:15:50.9951690,300,20\n"
    "2023-11-16 18:16:26.6805900,200,60\n"
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,100,10,110,Conversation log\n"
    "9.5,GPT-4,300,20,320,Conversation log\n"
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 700, "output_length": 10, "hash_ids": [0, 1]}\n'
    '{"timestamp": 2500, "input_length": 1025, "output_length": 20, "hash_ids": [0, 2, 3]}\n'
)


def config(workload: dict[str, Any], **deployment: Any) -> dict[str, Any]:
    return {
        "study": "sourced",
        "workload": workload,
        "deployments": [
            {
                "model": "small",
                "checkpoint": "models/small",
                "quantization": "fp16",
                "engine": "vllm",
                "gpu": "a100-40gb",
                "max_model_len": 4096,
                **deployment,
            }
        ],
    }


def study(workload: dict[str, Any], **deployment: Any) -> Study:
    return parse_study(config(workload, **deployment), ["study.yaml"])


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def lines(*rows: Any) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def test_a_study_without_a_source_keeps_its_names_and_specifications() -> None:
    trials = study({"concurrency": [1, 4], "input_len": [31, 119]}, gpu_count=2, max_model_len=512)
    # The digests of the version before there were sources.
    assert [(trial.cell, trial.digest) for trial in trials.trials[:2]] == [
        ("burst-c1-i31-o100", "ead1ad89b2426194"),
        ("burst-c4-i31-o100", "600339979f60491d"),
    ]
    plain = study({"concurrency": 1, "input_len": 31})
    named = study({"concurrency": 1, "input_len": 31, "source": {"kind": "text"}})
    assert [trial.digest for trial in named.trials] == [trial.digest for trial in plain.trials]


def test_a_specification_with_a_source_can_be_read_back() -> None:
    source = {
        "kind": "random",
        "input_lens": {"distribution": "lognormal", "cv": 0.5, "max": 900},
        "prefix_len": 16,
        "prefix_groups": 3,
    }
    (trial,) = study({"concurrency": 2, "input_len": 100, "source": source}).trials
    assert Trial.from_spec(json.loads(trial.spec_json)) == trial
    assert trial.workload.max_input_len == 900
    assert trial.spec["workload"]["source"] == {
        "kind": "random",
        "input_lens": {"shape": "lognormal", "cv": 0.5, "max": 900},
        "prefix_len": 16,
        "prefix_groups": 3,
    }


def test_a_uniform_distribution_reaches_as_far_as_its_deviation_says() -> None:
    # The standard deviation of a uniform distribution over 50 to 150 is 100 / √12 = 28.87.
    lens = {"distribution": "uniform", "cv": 0.2887}
    source = {"kind": "text", "input_lens": lens, "output_lens": lens}
    (trial,) = study({"concurrency": 2, "input_len": 100, "source": source}).trials
    assert (trial.workload.max_input_len, trial.workload.max_output_len) == (150, 150)
    with pytest.raises(ConfigError, match="input_len 150 plus output_len 150 is more than"):
        study({"concurrency": 2, "input_len": 100, "source": source}, max_model_len=299)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "trace"}, "the kind `trace` needs `path`"),
        ({"kind": "file"}, "the kind `file` needs `path`"),
        ({"kind": "random", "speedup": 2}, r"source\.speedup: is only for the kind `trace`"),
        ({"kind": "text", "prefix_groups": 2}, "needs `prefix_len`"),
        ({"kind": "text", "prefix_len": 100}, "leaves nothing of input_len 100"),
        (
            {"kind": "text", "input_lens": {"distribution": "normal", "cv": 0.3}},
            r"input_lens: `max` is missing",
        ),
        (
            {"kind": "text", "input_lens": {"distribution": "normal", "cv": 0.3, "max": 99}},
            r"input_lens\.max: 99 is less than the mean 100. Raise it, or lower `input_len`",
        ),
        (
            {"kind": "text", "output_lens": {"distribution": "uniform", "cv": 0.6}},
            "too much for a uniform distribution",
        ),
        ({"kind": "text", "input_lens": {"distribution": "uniform"}}, "`cv` is missing"),
        ({"kind": "txt"}, "'txt' is not one of `text`, `random`, `file`, `trace`"),
        (
            {"kind": "text", "in_bundle": True},
            r"source\.in_bundle: there is no file without `path`",
        ),
    ],
)
def test_contradicting_keys_are_refused(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study({"concurrency": 2, "input_len": 100, "source": source})


def test_the_forms_of_conversations_give_the_same_row(tmp_path: Path) -> None:
    turns = [("user", "Hi."), ("assistant", "Yes?"), ("user", "Go on."), ("assistant", "No.")]
    openai = {"messages": [{"role": role, "content": text} for role, text in turns]}
    shared = {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[role], "value": text}
            for role, text in turns
        ]
    }
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}]}
    in_lines = write(tmp_path / "rows.jsonl", lines(openai, shared, parts))
    as_list = write(tmp_path / "rows.json", json.dumps([openai, shared, parts]))
    pq.write_table(pa.Table.from_pylist([openai, openai]), tmp_path / "rows.parquet")
    for path, count in ((in_lines, 3), (as_list, 3), (tmp_path / "rows.parquet", 2)):
        rows = read_conversations(path, "refuse").rows
        assert len(rows) == count
        for row in rows[:2]:
            assert row.text == "Hi.\n\nYes?\n\nGo on."
            assert [message.role for message in row.messages] == ["user", "assistant", "user"]
            assert row.answer == "No."
    assert read_conversations(in_lines, "refuse").rows[2].text == "Hi."


def test_a_prompt_can_name_its_output_length(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", lines({"prompt": "Why?", "output_tokens": 7}, {"prompt": "x"})
    )
    first, second = read_conversations(path, "refuse").rows
    assert (first.text, first.output_tokens, second.output_tokens) == ("Why?", 7, None)
    assert (first.place, second.place) == ("line 1", "line 2")


BAD_LINES = [
    ('{"prompt": "x"', "line 2: is not JSON"),
    ("[1]", "line 2: is not a JSON object"),
    ('{"text": "x"}', "line 2: has neither `messages` nor `prompt`"),
    ('{"messages": []}', "line 2: the conversation has no user turn"),
    ('{"messages": [{"role": "system", "content": "x"}]}', "line 2: the conversation has no user"),
    ('{"messages": [{"role": "bot", "content": "x"}]}', "line 2: `role` is 'bot', not one of"),
    ('{"messages": [{"role": "user", "content": 3}]}', "line 2: `content` is not a text"),
    ('{"prompt": " "}', "line 2: `prompt` is not a text, or is empty"),
    ('{"prompt": "x", "output_tokens": 0}', "line 2: `output_tokens` is 0"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named_or_left_out_and_counted(
    tmp_path: Path, line: str, message: str
) -> None:
    path = write(tmp_path / "rows.jsonl", lines({"prompt": "a"}) + f"{line}\n")
    workload = {"concurrency": 1, "input_len": 100, "source": {"kind": "file", "path": str(path)}}
    with pytest.raises(ConfigError, match=rf"study\.yaml: .*rows\.jsonl: {message}") as error:
        study(workload)
    assert "on_bad_rows: skip" in str(error.value)
    workload["source"] = {"kind": "file", "path": str(path), "on_bad_rows": "skip"}
    (trial,) = study(workload).trials
    assert trial.workload.source is not None and trial.workload.source.file is not None
    assert (trial.workload.source.file.rows, trial.workload.source.file.left_out) == (1, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl: has no row to send: the file is empty"),
        ("a.jsonl", b'{"prompt": "\xe9t\xe9"}\n', r"a\.jsonl: is not UTF-8"),
        ("a.json", b'{"prompt": "x"}', r"a\.json: is not a JSON list"),
        ("a.json", b"[", r"a\.json: is not JSON"),
        ("a.parquet", b"PAR1", r"a\.parquet: is not a Parquet file"),
        ("missing.jsonl", None, r"missing\.jsonl: cannot be read \(No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_error(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    source = {"kind": "file", "path": str(tmp_path / name)}
    with pytest.raises(ConfigError, match=message):
        study({"concurrency": 1, "input_len": 100, "source": source})


def test_if_all_rows_are_bad_the_first_reason_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "[]\n{}\n")
    source = {"kind": "file", "path": str(path), "on_bad_rows": "skip"}
    message = "all of its rows are bad; the first one is line 1: is not a JSON object"
    with pytest.raises(ConfigError, match=message):
        study({"concurrency": 1, "input_len": 100, "source": source})


def test_a_file_is_known_by_its_digest_and_not_by_its_path(tmp_path: Path) -> None:
    text = lines(*({"prompt": f"Question {number}?"} for number in range(4)))
    digest = hashlib.sha256(text.encode()).hexdigest()
    digests = set()
    for name in ("one.jsonl", "two.jsonl"):
        path = write(tmp_path / name, text)
        source = {"kind": "file", "path": str(path)}
        made = study({"concurrency": 4, "input_len": 100, "source": source})
        (trial,) = made.trials
        assert digest in trial.spec_json and name not in trial.spec_json
        assert made.source_file(trial) == str(path)
        digests.add(trial.digest)
    assert len(digests) == 1
    changed = write(tmp_path / "one.jsonl", text.replace("?", "!"))
    source = {"kind": "file", "path": str(changed)}
    (other,) = study({"concurrency": 4, "input_len": 100, "source": source}).trials
    assert other.digest not in digests


def test_a_row_is_sent_once_so_a_file_must_have_enough(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({"prompt": "a"}, {"prompt": "b"}))
    source = {"kind": "file", "path": str(path)}
    with pytest.raises(ConfigError, match=r"2 usable rows, and `burst-c3-.*` needs 3"):
        study({"concurrency": 3, "input_len": 100, "source": source})


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        # 4.3145790 s and 40 s after the first row.
        ("azure.csv", AZURE, [(0.0, 100, 10), (4.314579, 300, 20), (40.0, 200, 60)]),
        ("burst.csv", BURSTGPT, [(0.0, 100, 10), (4.5, 300, 20)]),
        ("mooncake.jsonl", MOONCAKE, [(0.0, 700, 10), (2.5, 1025, 20)]),
    ],
)
def test_the_columns_of_public_traces(
    tmp_path: Path, name: str, text: str, expected: Sequence[tuple[float, int, int]]
) -> None:
    rows = read_trace(write(tmp_path / name, text), "refuse", 4096).rows
    assert [row[1:3] for row in rows] == [each[1:] for each in expected]
    assert [row.time_s for row in rows] == pytest.approx([each[0] for each in expected], abs=1e-6)


def test_a_trace_is_replayed_faster_and_only_its_start(tmp_path: Path) -> None:
    path = write(tmp_path / "azure.csv", AZURE)
    source = {"kind": "trace", "path": str(path), "speedup": [1, 10]}
    slow, fast = (trial.workload for trial in study({"source": source}).trials)
    # Two intervals in 40 s; the means of 100, 300, 200 and of 10, 20, 60.
    assert (slow.request_rate, fast.request_rate) == (0.05, 0.5)
    assert (slow.requests, slow.input_len, slow.output_len) == (3, 200, 30)
    assert (slow.protocol, slow.cell) == ("trace", "trace-r0.05-i200-o30")
    (start,) = study({"source": {"kind": "trace", "path": str(path), "first_s": 40}}).trials
    assert (start.workload.requests, start.workload.input_len) == (2, 200)
    with pytest.raises(ConfigError, match="the trace has 1 row within 0 s, so it has no rate"):
        study({"source": {"kind": "trace", "path": str(path), "first_s": 4}})
    for speedup, message in (
        ("sweep", r"source\.speedup: 'sweep' is not a number"),
        ([1, 1.00001], "the loads 1 and 1.00001 of `workload` give two cells the same name"),
    ):
        with pytest.raises(ConfigError, match=message):
            study({"source": {**source, "speedup": speedup}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (AZURE + "2023-11-16 18:16:20.6805900,1,1\n", "line 5: goes back in time, by 6 s"),
        (AZURE + "2023-11-16 18:17:20,4000,97\n", "line 5: has 4000 prompt and 97 output tokens"),
        (AZURE + "yesterday,10,10\n", "line 5: `TIMESTAMP` is 'yesterday', not a time"),
        (AZURE + "2023-11-16 18:17:20,0,10\n", "line 5: `ContextTokens` is '0'"),
        (AZURE + "2023-11-16 18:17:20,10\n", "line 5: has another number of fields"),
        ("a,b\n1,2\n", "line 2: has none of these sets of columns"),
        ("a,b\n", "the file is empty"),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "trace.csv", text)
    with pytest.raises(ConfigError, match=rf"study\.yaml: .*trace\.csv: .*{message}"):
        study({"source": {"kind": "trace", "path": str(path)}})


def test_a_trace_that_goes_back_in_time_is_never_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.csv", AZURE + "2023-11-16 18:16:20.6805900,1,1\n")
    with pytest.raises(ConfigError, match="line 5: goes back in time"):
        read_trace(path, "skip", 4096)
    assert len(read_lengths(path, "refuse", 4096).rows) == 4


def test_a_mooncake_row_has_one_id_per_block(tmp_path: Path) -> None:
    wrong = '{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [4]}\n'
    path = write(tmp_path / "trace.jsonl", wrong)
    with pytest.raises(ConfigError, match="has 1 `hash_ids`, but 513 tokens have 2 blocks of 512"):
        read_trace(path, "refuse", 4096)


@pytest.mark.parametrize("key", ["input_len", "concurrency", "duration_s"])
def test_a_trace_brings_its_own_lengths_and_times(tmp_path: Path, key: str) -> None:
    source = {"kind": "trace", "path": str(write(tmp_path / "t.csv", AZURE))}
    with pytest.raises(ConfigError, match=rf"workload\.{key}: comes from the trace"):
        study({"source": source, key: 5})


def test_lengths_can_come_from_a_file(tmp_path: Path) -> None:
    source = {"kind": "random", "path": str(write(tmp_path / "t.csv", AZURE))}
    (trial,) = study({"concurrency": 2, "source": source}).trials
    assert (trial.workload.input_len, trial.workload.output_len) == (200, 30)
    assert (trial.workload.max_input_len, trial.workload.max_output_len) == (300, 60)


def test_a_bundles_configuration_needs_no_file(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", lines({"prompt": "a"}, {"prompt": "b"}))
    source = {"kind": "file", "path": str(path)}
    full = config({"concurrency": 2, "input_len": 100, "source": source})
    bundled = json.loads(json.dumps(drop_paths(resolve_sources(full)[0])))
    assert "chats" not in json.dumps(bundled)
    path.unlink()
    made = parse_study(bundled, ["study.json"])
    path.write_text(lines({"prompt": "a"}, {"prompt": "b"}), encoding="utf-8")
    assert [trial.digest for trial in made.trials] == [
        trial.digest for trial in parse_study(full).trials
    ]
    assert made.source_file(made.trials[0]) == ""


def test_prefix_caching_makes_two_deployments() -> None:
    made = study({"concurrency": 1, "input_len": 31}, prefix_caching=[False, True])
    off, on = made.deployments
    assert on.name == f"{off.name}-prefix_caching"
    assert (off.engine_args, on.engine_args) == ({}, {"enable_prefix_caching": True})
    assert off == study({"concurrency": 1, "input_len": 31}).deployments[0]
    (llama,) = study(
        {"concurrency": 1, "input_len": 31}, engine="llamacpp", prefix_caching=True
    ).deployments
    assert llama.engine_args["cache_prompt"] is True
    for changes, message in (
        ({"engine": "emulated"}, "servegrid sets it only for `vllm` and `llamacpp`"),
        ({"engine_args": {"enable_prefix_caching": False}}, "`prefix_caching` sets it already"),
    ):
        with pytest.raises(ConfigError, match=message):
            study({"concurrency": 1, "input_len": 31}, prefix_caching=True, **changes)


def test_the_longest_lengths_of_a_plain_workload_are_its_own() -> None:
    workload = Workload("burst", 1, 10, 20, 1, output_spread=0.5, source=Source("random"))
    assert (workload.max_input_len, workload.max_output_len) == (10, 30)


def test_an_emulated_engine_counts_no_tokens_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({"prompt": "a"}))
    source = {"kind": "file", "path": str(path)}
    with pytest.raises(ConfigError, match="an emulated engine has no tokenizer"):
        study({"concurrency": 1, "input_len": 9, "source": source}, engine="emulated")


def test_a_chat_cannot_send_prompts_that_are_only_token_ids() -> None:
    endpoint = {"url": "http://host:8000", "model": "m", "engine": "tgi", "api": "chat"}
    entry: dict[str, Any] = {"engine": "external", "endpoint": endpoint, "tokenizer": "t"}
    full = config(
        {"concurrency": 1, "input_len": 31, "source": {"kind": "random"}}, **entry, max_num_seqs=8
    )
    del full["deployments"][0]["checkpoint"]
    with pytest.raises(ConfigError, match="but a chat takes text"):
        parse_study(full)
    full["workload"]["source"] = {"kind": "text"}
    assert parse_study(full).trials


@pytest.mark.parametrize(
    ("kind", "path", "suffix"),
    [
        ("file", "chats.txt", ".jsonl"),
        ("file", "chats.PARQUET", ".parquet"),
        ("file", "a/chats.json", ".json"),
        ("trace", "azure.log", ".csv"),
        ("trace", "mooncake.jsonl", ".jsonl"),
    ],
)
def test_in_a_bundle_a_file_is_still_read_in_the_same_way(
    kind: str, path: str, suffix: str
) -> None:
    digest = "ab" * 32
    named = bundled_name({"kind": kind, "path": path, "facts": {"sha256": digest}})
    assert named == f"data/{digest}{suffix}"


CHAT = {
    "messages": [
        USER,
        {"role": "assistant", "content": "Mild."},
        USER,
        {"role": "assistant", "content": "Very."},
    ]
}


def test_the_turns_of_conversations_are_requests_of_a_cell() -> None:
    source = {"kind": "text", "turns": 4, "prefix_len": 10}
    keys = {"protocol": "closed_loop", "concurrency": 16, "input_len": 100, "output_len": 50}
    (trial,) = study({**keys, "source": source}).trials
    workload = trial.workload
    assert workload.source == Source("text", turns=4, prefix_len=10)
    assert workload.source.label == "text, 4 turns"
    assert not workload.has_fixed_lengths
    # The last turn: 4 turns of 100 tokens and 3 answers of 50. The mean of 100, 250, 400, 550.
    assert (workload.max_input_len, workload.max_output_len) == (550, 50)
    assert workload.mean_input_len == 325
    # As many conversations as a closed loop has requests: 2 · 16 + 6 · 16, of 4 turns.
    assert workload.requests == 512
    assert Workload.from_spec(workload.spec) == workload
    assert trial.workload.spec["source"] == {"turns": 4, "prefix_len": 10}
    (few,) = study({**keys, "source": source, "requests_per_user": 3}).trials
    assert few.workload.requests == 48
    (fits,) = study({**keys, "source": source}, max_model_len=600).trials
    assert fits.unsupported is None
    with pytest.raises(ConfigError, match="the last turn of a conversation: input_len 550 plus"):
        study({**keys, "source": source}, max_model_len=599)


def test_a_file_says_how_many_turns_its_users_have(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", lines(*[CHAT] * 100, *[{"prompt": "a"}] * 100))
    keys = {"protocol": "closed_loop", "concurrency": 2, "input_len": 100}
    source = {"kind": "file", "path": str(path)}
    (plain,) = study({**keys, "source": source}).trials
    assert "turns" not in plain.spec["workload"]["source"]["file"]  # older cells stay the same
    (trial,) = study({**keys, "source": {**source, "turns": "all"}}).trials
    facts = trial.workload.source
    assert facts is not None and facts.file is not None
    assert (facts.file.rows, facts.file.turns, facts.mean_turns) == (200, 300, 1.5)
    # 2 · 2 conversations of 1.5 turns at the start and the end, and 64 requests in between.
    assert (trial.workload.requests, trial.workload.max_input_len) == (70, 100)
    assert Trial.from_spec(trial.spec) == trial
    assert facts.label == f"file {facts.file.sha256[:8]}, all turns"
    with pytest.raises(ConfigError, match=r"has 300 user turns, and `.*` needs 302"):
        study({**keys, "source": {**source, "turns": "all"}, "requests_per_user": 151})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "burst"}, "the protocol is `closed_loop`, not `burst`"),
        ({"protocol": ["closed_loop", "poisson"], "request_rate": 1}, "not `poisson`"),
        ({"prompts": "identical"}, "are not `identical`"),
        ({"source": {"kind": "text", "turns": "all"}}, "`all` is only for the kind `file`"),
        ({"source": {"kind": "text", "turns": 1}}, "turns"),
        ({"source": {"kind": "trace", "turns": 2}}, "is only for the kind `text` or `random`"),
    ],
)
def test_turns_that_cannot_be_played_are_refused(changes: dict[str, Any], message: str) -> None:
    keys = {"protocol": "closed_loop", "concurrency": 2, "input_len": 50}
    with pytest.raises(ConfigError, match=message):
        study({**keys, "source": {"kind": "random", "turns": 2}, **changes})


def test_lengths_of_a_file_are_those_of_single_requests(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", AZURE)
    source = {"kind": "random", "path": str(path), "turns": 2}
    with pytest.raises(ConfigError, match="each turn would need a length"):
        study({"protocol": "closed_loop", "concurrency": 2, "source": source})
