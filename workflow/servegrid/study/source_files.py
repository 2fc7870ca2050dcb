"""Reads the files of users that a workload takes its requests from: conversations and traces.

Errors name the file, the line and the remedy. A study decides whether a bad row is an error or is
left out and counted.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from servegrid.errors import ConfigError
from servegrid.study.source import BLOCK_TOKENS, NEEDS_FILE, FileFacts

MAX_TOKENS = 2**31 - 1
BUNDLED, BUNDLED_SUFFIXES = "data", (".csv", ".json", ".jsonl", ".parquet")
"""The folder of a bundle for files of users, and the endings of their names there."""
WORKLOAD_SOURCE = "workload.source"
_ROLES = {
    "human": "user",
    "user": "user",
    "system": "system",
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant"),
}
"""OpenAI's role for each name in use, also those of ShareGPT."""


class Message(NamedTuple):
    """One message of a conversation, with OpenAI's role: system, user or assistant."""

    role: str
    text: str

    def for_api(self) -> Mapping[str, str]:
        """The message as OpenAI's API takes it."""
        return {"role": self.role, "content": self.text}


@dataclass(frozen=True)
class Conversation:
    """One row of a file: `messages` up to the last one of the user, and the answer to that.

    `answer` is None if the file has none; `output_tokens` is the output length that the row names.
    `place` is where it stands in the file, such as `line 3`.
    """

    messages: tuple[Message, ...]
    answer: str | None = None
    output_tokens: int | None = None
    place: str = ""

    @property
    def text(self) -> str:
        """All messages as one prompt, with an empty line in between."""
        return "\n\n".join(message.text for message in self.messages)

    def user_turns(self, limit: int | None) -> list[Conversation]:
        """The turns of the user, at most `limit` of them, each with the answer that it recorded.

        A turn has the messages since the answer before it, such as a system message. What an
        assistant says before the first turn is part of that. More messages of the assistant after
        an answer are left out: servers answer with one.
        """
        turns: list[Conversation] = []
        waiting: list[Message] = []
        asked = False
        for message in self.messages:
            if message.role != "assistant" or not (asked or turns):
                waiting.append(message)
                asked = asked or message.role == "user"
            elif asked:
                turns.append(replace(self, messages=tuple(waiting), answer=message.text))
                waiting, asked = [], False
        turns.append(replace(self, messages=tuple(waiting)))
        return turns[:limit]


class Arrival(NamedTuple):
    """One row of a trace: seconds since its first row, lengths in tokens, and blocks.

    `blocks` has one id per BLOCK_TOKENS tokens of the prompt: equal ids mean equal tokens after an
    equal start. It is empty if the trace does not know them.
    """

    time_s: float
    input_len: int
    output_len: int
    blocks: tuple[int, ...] = ()


class UserRequest(NamedTuple):
    """One row of a trace as a request of a user: as an `Arrival`, without blocks.

    `session` is the user's session, and `response_s` how long the response took; None if the trace
    does not know it.
    """

    time_s: float
    input_len: int
    output_len: int
    session: str | None = None
    response_s: float | None = None


Row = TypeVar("Row", Conversation, Arrival, UserRequest)
TimedRow = TypeVar("TimedRow", Arrival, UserRequest)


@dataclass(frozen=True)
class Rows(Generic[Row]):
    """The usable rows of a file, the number of those left out, and the SHA-256 of the file."""

    rows: Sequence[Row]
    left_out: int
    sha256: str


class _BadRow(Exception):
    """A row cannot be used; says why."""


def resolve_sources(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration with the facts of each file in its deployments' `workload.source`.

    Also the paths of the files, by their SHA-256. `config` matches the schema. A source that has no
    path, as in a bundle, stays as it is. Raises ConfigError if a file cannot be used.
    """
    paths: dict[str, str] = {}
    deployments = []
    for entry in config["deployments"]:
        workload = entry.get("workload", {})
        source = {**config["workload"], **workload}.get("source", {})
        if "path" in source:
            facts = _read_facts(source, entry["max_model_len"])
            paths[facts.sha256] = source["path"]
            source = {**source, "facts": facts.spec}
            entry = {**entry, "workload": {**workload, "source": source}}
        deployments.append(entry)
    return {**config, "deployments": deployments}, paths


def drop_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without the paths of its files, as a bundle has it."""

    def drop(owner: Mapping[str, Any]) -> dict[str, Any]:
        workload = owner.get("workload")
        if not isinstance(workload, Mapping) or not isinstance(workload.get("source"), Mapping):
            return dict(owner)
        source = {key: value for key, value in workload["source"].items() if key != "path"}
        return {**owner, "workload": {**workload, "source": source}}

    dropped = drop(config)
    capacity = config.get("capacity")
    if isinstance(capacity, Mapping) and isinstance(capacity.get("users_from"), Mapping):
        kept = {key: value for key, value in capacity["users_from"].items() if key != "path"}
        dropped["capacity"] = {**capacity, "users_from": kept}
    if isinstance(entries := config.get("deployments"), list):
        dropped["deployments"] = [
            drop(entry) if isinstance(entry, Mapping) else entry for entry in entries
        ]
    return dropped


def with_bundled_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with facts, as `resolve_sources` returns it; only what a bundle has keeps a path.

    These are the files with `in_bundle`. In a bundle they are named after their SHA-256.
    """
    found = drop_paths(config)
    for entry, given in zip(found["deployments"], config["deployments"], strict=True):
        source = given.get("workload", {}).get("source", {})
        if "path" in source and source.get("in_bundle"):
            entry["workload"]["source"]["path"] = bundled_name(source)
    return found


def bundled_name(source: Mapping[str, Any]) -> str:
    """The path in a bundle of the file of a source with `path` and `facts`."""
    suffix = Path(source["path"]).suffix.lower()
    if suffix not in BUNDLED_SUFFIXES:  # how a file is read depends on it
        suffix = ".jsonl" if source["kind"] == "file" else ".csv"
    return f"{BUNDLED}/{source['facts']['sha256']}{suffix}"


def _read_facts(source: Mapping[str, Any], context: int) -> FileFacts:
    path, on_bad_rows = Path(source["path"]), source.get("on_bad_rows", "refuse")
    if source["kind"] == "file":
        conversations = read_conversations(path, on_bad_rows)
        facts = FileFacts(conversations.sha256, len(conversations.rows), conversations.left_out)
        if (turns := source.get("turns", 1)) == 1:
            return facts
        limit = None if turns == "all" else turns
        return replace(facts, turns=sum(len(row.user_turns(limit)) for row in conversations.rows))
    if source["kind"] not in NEEDS_FILE:
        return _describe_arrivals(read_lengths(path, on_bad_rows, context), context)
    return _describe_arrivals(
        read_trace(path, on_bad_rows, context, source.get("first_s")), context
    )


def read_conversations(
    path: Path, on_bad_rows: str, key: str = WORKLOAD_SOURCE
) -> Rows[Conversation]:
    """The conversations of a JSONL, JSON or Parquet file.

    A row has OpenAI's `messages`, a `prompt` with or without `output_tokens`, or `conversations`
    as ShareGPT has them. Raises ConfigError, which names the `key` of the file, if it cannot be
    read or has no usable row, and unless `on_bad_rows` is `skip`, at the first bad row.
    """
    return _read(path, _objects(path), _parse_conversation, on_bad_rows, key=key)


def read_trace(
    path: Path, on_bad_rows: str, context: int, first_s: float | None = None
) -> Rows[Arrival]:
    """The rows of a trace within its first `first_s` seconds: CSV or JSONL.

    Rows with more than `context` tokens, prompt and output together, are bad.

    The columns are those of the Azure LLM inference traces (TIMESTAMP, ContextTokens,
    GeneratedTokens), of BurstGPT (Timestamp in seconds, Request tokens, Response tokens) or of
    Mooncake (timestamp in ms, input_length, output_length, hash_ids). Raises ConfigError as
    `read_conversations`, and always if a row is earlier than the row before it.
    """
    parse = partial(_parse_arrival, context=context)
    read = _read(path, _trace_rows(path), parse, on_bad_rows, check=_check_order)
    return _from_start(read, first_s)


def read_lengths(path: Path, on_bad_rows: str, context: int) -> Rows[Arrival]:
    """As `read_trace`, of which only the lengths count: rows may be in any order."""
    return _read(path, _trace_rows(path), partial(_parse_lengths, context=context), on_bad_rows)


def read_user_requests(
    path: Path, on_bad_rows: str, first_s: float | None, key: str, named: str | None = None
) -> Rows[UserRequest]:
    """As `read_trace`, of requests of any length, with their sessions and response times.

    Errors name the `key` of the file, and what names its path, if this is not below it.

    These are the columns `Session ID` (or `SessionID`, `session_id`) and `Elapsed time`, as
    BurstGPT names them.
    """
    read = _read(
        path, _trace_rows(path), _parse_user_request, on_bad_rows, _check_order, key, named
    )
    return _from_start(read, first_s)


def _from_start(read: Rows[TimedRow], first_s: float | None) -> Rows[TimedRow]:
    """The rows within the first `first_s` seconds of a trace, with times from its first row on."""
    start = read.rows[0].time_s
    rows = [row._replace(time_s=row.time_s - start) for row in read.rows]
    if first_s is not None:
        rows = [row for row in rows if row.time_s < first_s]
    return replace(read, rows=rows)


def _describe_arrivals(read: Rows[Arrival], context: int) -> FileFacts:
    inputs, outputs = zip(*((row.input_len, row.output_len) for row in read.rows), strict=True)
    return FileFacts(
        sha256=read.sha256,
        rows=len(read.rows),
        left_out=read.left_out,
        input_len=max(1, round(sum(inputs) / len(inputs))),
        output_len=max(1, round(sum(outputs) / len(outputs))),
        max_input_len=max(inputs),
        max_output_len=max(outputs),
        span_s=read.rows[-1].time_s,
        shares_blocks=any(row.blocks for row in read.rows),
        context=context,
    )


def file_sha256(path: Path, key: str = f"{WORKLOAD_SOURCE}.path") -> str:
    """The SHA-256 of the file that `key` names. Raises ConfigError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}). Correct `{key}`, which is relative "
            "to the working directory, or the permissions."
        ) from error


# Files and their lines.

_Numbered = Iterator[tuple[str, Any]]
"""The place of each row (`line 3`), and what is there: a mapping, or a _BadRow."""


def _read(
    path: Path,
    objects: _Numbered,
    parse: Callable[[Mapping[str, Any], str], Row],
    on_bad_rows: str,
    check: Callable[[str, Row, Row], None] | None = None,
    key: str = WORKLOAD_SOURCE,
    named: str | None = None,
) -> Rows[Row]:
    sha256 = file_sha256(path, named or f"{key}.path")
    rows: list[Row] = []
    left_out, first_bad = 0, ""
    try:
        for place, found in objects:
            try:
                if isinstance(found, _BadRow):
                    raise found
                row = parse(found, place)
            except _BadRow as error:
                if on_bad_rows != "skip":
                    raise ConfigError(
                        f"{path}: {place}: {error}. Correct it, or leave such rows out with "
                        f"`on_bad_rows: skip` under `{key}`."
                    ) from None
                left_out, first_bad = left_out + 1, first_bad or f"{place}: {error}"
                continue
            if check is not None and rows:
                check(f"{path}: {place}", rows[-1], row)
            rows.append(row)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 ({error}). Save it as UTF-8.") from error
    if not rows:
        reason = "the file is empty"
        if left_out:
            reason = f"all of its rows are bad; the first one is {first_bad}"
        raise ConfigError(f"{path}: has no row to send: {reason}. Name another file.")
    return Rows(rows, left_out, sha256)


def _objects(path: Path) -> _Numbered:
    """The objects of a Parquet file, of a JSON list, or of the lines of a JSONL file."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(path)
    elif suffix == ".json":
        yield from _json_rows(path)
    else:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", _parse_line(line)


def _parse_line(line: str) -> Any:
    try:
        return _as_object(json.loads(line))
    except (ValueError, RecursionError) as error:
        return _BadRow(f"is not JSON ({error})")


def _as_object(data: Any) -> Any:
    return data if isinstance(data, dict) else _BadRow("is not a JSON object")


def _json_rows(path: Path) -> _Numbered:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: is not JSON ({error}). If each line is an object, name the file .jsonl."
        ) from error
    if not isinstance(data, list):
        raise ConfigError(f"{path}: is not a JSON list. Write one object per line into a .jsonl.")
    for number, each in enumerate(data, 1):
        yield f"entry {number}", _as_object(each)


def _parquet_rows(path: Path) -> _Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", {k: v for k, v in row.items() if v is not None}
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not a Parquet file ({error}). Write it again.") from error


def _trace_rows(path: Path) -> _Numbered:
    return _objects(path) if path.suffix.lower() in (".jsonl", ".json") else _csv_rows(path)


def _csv_rows(path: Path) -> _Numbered:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                has_all = None not in row and None not in row.values()
                message = "has another number of fields than the header"
                yield f"line {reader.line_num}", row if has_all else _BadRow(message)
        except csv.Error as error:
            raise ConfigError(
                f"{path}: line {reader.line_num}: is not CSV ({error}). Correct it."
            ) from error


# Conversations.


def _parse_conversation(row: Mapping[str, Any], place: str) -> Conversation:
    if "messages" in row:
        found = _from_messages(row["messages"], "messages", "role", "content")
        return replace(found, output_tokens=_count_in(row), place=place)
    if "conversations" in row:
        found = _from_messages(row["conversations"], "conversations", "from", "value")
        return replace(found, place=place)
    if "prompt" in row:
        prompt = row["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise _BadRow("`prompt` is not a text, or is empty")
        return Conversation((Message("user", prompt),), None, _count_in(row), place)
    raise _BadRow("has neither `messages` nor `prompt` nor `conversations`")


def _count_in(row: Mapping[str, Any]) -> int | None:
    count = row.get("output_tokens")
    if count is None:
        return None
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_TOKENS:
        raise _BadRow(f"`output_tokens` is {count!r}, not a number of tokens above 0")
    return count


def _from_messages(given: Any, name: str, role_key: str, text_key: str) -> Conversation:
    if not isinstance(given, list):
        raise _BadRow(f"`{name}` is not a list")
    messages = [_message(each, name, role_key, text_key) for each in given]
    users = [at for at, message in enumerate(messages) if message.role == "user"]
    if not users:
        raise _BadRow("the conversation has no user turn")
    last = users[-1]
    following = messages[last + 1 : last + 2]
    answer = following[0].text if following and following[0].role == "assistant" else None
    return Conversation(tuple(messages[: last + 1]), answer)


def _message(given: Any, name: str, role_key: str, text_key: str) -> Message:
    if not isinstance(given, Mapping):
        raise _BadRow(f"an entry of `{name}` is not an object")
    role = _ROLES.get(str(given.get(role_key)))
    if role is None:
        raise _BadRow(
            f"`{role_key}` is {given.get(role_key)!r}, not one of {', '.join(sorted(_ROLES))}"
        )
    text = given.get(text_key)
    if isinstance(text, list):
        parts = [part.get("text") for part in text if isinstance(part, Mapping)]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) != len(text):
            raise _BadRow(f"`{text_key}` has a part that is not text")
        text = "".join(texts)
    if not isinstance(text, str):
        raise _BadRow(f"`{text_key}` is not a text")
    return Message(role, text)


# Traces.

_TRACES: Sequence[tuple[str, str, str]] = (
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    ("Timestamp", "Request tokens", "Response tokens"),
    ("timestamp", "input_length", "output_length"),
)
"""The columns of the traces of Azure, BurstGPT and Mooncake."""


def _columns(row: Mapping[str, Any]) -> tuple[str, str, str]:
    for names in _TRACES:
        if all(name in row for name in names[1:]):
            return names
    known = "; ".join(", ".join(names) for names in _TRACES)
    raise _BadRow(f"has none of these sets of columns: {known}")


def _parse_lengths(row: Mapping[str, Any], place: str, context: int) -> Arrival:
    _, inputs, outputs = _columns(row)
    input_len, output_len = _length(row, inputs), _length(row, outputs)
    if input_len + output_len > context:
        raise _BadRow(
            f"has {input_len} prompt and {output_len} output tokens, more than max_model_len "
            f"{context}"
        )
    return Arrival(0.0, input_len, output_len, _blocks(row, input_len))


def _parse_arrival(row: Mapping[str, Any], place: str, context: int) -> Arrival:
    names = _columns(row)
    if names[0] not in row:
        raise _BadRow(f"has no `{names[0]}`")
    return _parse_lengths(row, place, context)._replace(time_s=_time_s(names[0], row[names[0]]))


_SESSIONS, _RESPONSE = ("Session ID", "SessionID", "session_id"), "Elapsed time"


def _parse_user_request(row: Mapping[str, Any], place: str) -> UserRequest:
    arrival = _parse_arrival(row, place, context=2 * MAX_TOKENS)
    session = next((str(row[name]) for name in _SESSIONS if row.get(name) not in (None, "")), None)
    response_s = None
    if row.get(_RESPONSE) not in (None, ""):
        response_s = _time_s(_RESPONSE, row[_RESPONSE])
    return UserRequest(*arrival[:3], session, response_s)


def _length(row: Mapping[str, Any], name: str) -> int:
    value = row[name]
    try:
        length = int(value) if isinstance(value, str) else value
    except ValueError:
        length = None
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= MAX_TOKENS:
        raise _BadRow(f"`{name}` is {value!r}, not a number of tokens above 0")
    return length


def _time_s(name: str, value: Any) -> float:
    """A time in seconds. Azure writes a date, BurstGPT seconds, and Mooncake milliseconds."""
    try:
        if name == "TIMESTAMP":
            return _date_s(str(value))
        seconds = float(value) / (1e3 if name == "timestamp" else 1.0)
    except (TypeError, ValueError):
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        raise _BadRow(f"`{name}` is {value!r}, not a time")
    return seconds


def _date_s(text: str) -> float:
    """Seconds since 1970 of a date with up to seven digits after the second."""
    whole, _, fraction = text.partition(".")
    digits = fraction.partition("+")[0].removesuffix("Z")
    zone = fraction[len(digits) :]
    moment = datetime.fromisoformat(whole + zone)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp() + (int(digits) / 10 ** len(digits) if digits else 0.0)


def _blocks(row: Mapping[str, Any], input_len: int) -> tuple[int, ...]:
    blocks = row.get("hash_ids") or []
    if isinstance(blocks, str):
        try:
            blocks = json.loads(blocks)
        except ValueError:
            raise _BadRow("`hash_ids` is not a list of whole numbers") from None
    if not isinstance(blocks, list) or not all(type(each) is int for each in blocks):
        raise _BadRow("`hash_ids` is not a list of whole numbers")
    if blocks and len(blocks) != -(-input_len // BLOCK_TOKENS):
        raise _BadRow(
            f"has {len(blocks)} `hash_ids`, but {input_len} tokens have "
            f"{-(-input_len // BLOCK_TOKENS)} blocks of {BLOCK_TOKENS}"
        )
    return tuple(blocks)


def _check_order(place: str, before: Arrival | UserRequest, row: Arrival | UserRequest) -> None:
    if row.time_s < before.time_s:
        raise ConfigError(
            f"{place}: goes back in time, by {before.time_s - row.time_s:g} s. Sort the trace by "
            "time."
        )
