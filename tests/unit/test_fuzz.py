"""Everything that reads what others wrote: it succeeds, or raises its documented error.

Hypothesis makes the inputs. They are the same in each run, so a failure can be repeated.
"""

from __future__ import annotations

import copy
import json
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snakemake_interface_common.exceptions import WorkflowError

from helpers.bundling import write_tar
from servegrid.bundle import tarball
from servegrid.client.http1 import Framing, HttpSyntaxError, parse_head
from servegrid.client.parse import RequestSpec, parse_error_body, parse_exchange
from servegrid.client.transport import Exchange
from servegrid.errors import BundleError, ConfigError, ExchangeError
from servegrid.exchange.files import load_results
from servegrid.exchange.imported import imported_cells
from servegrid.records import columns, parquet
from servegrid.study.config import load_study, parse_study
from servegrid.study.grid import Deployment
from servegrid.telemetry.server import parse_metrics
from snakemake_executor_plugin_submitit.spool import JOB_FINISHED, JournalReader, Spool
from snakemake_executor_plugin_submitit.submission import load_kinds

ROOT = Path(__file__).parents[2]
EXAMPLES = 100
settings.register_profile(
    "servegrid",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=EXAMPLES,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("servegrid")

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**31, 2**63, 2**64, -1, 10**30, 10**400]),
    st.floats(),
    st.text(),
    st.sampled_from(["\ud800", "\x1b[2J", "$(x)", "{wildcards}", "%s", "a\n", "=1+1", "../x", ""]),
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


def replaced(valid: Any) -> st.SearchStrategy[Any]:
    """`valid` with one value somewhere in it replaced, removed or added."""
    paths = [path for path, _ in walk(valid)]

    def change(path: tuple[Any, ...], value: Any, remove: bool) -> Any:
        if not path:
            return value
        result = copy.deepcopy(valid)
        node = result
        for step in path[:-1]:
            node = node[step]
        if remove and isinstance(node, dict):
            node.pop(path[-1], None)
        else:
            node[path[-1]] = value
        return result

    return st.builds(change, st.sampled_from(paths), JSON, st.booleans())


def walk(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    found = [(path, value)]
    if isinstance(value, dict):
        found += [each for key in value for each in walk(value[key], (*path, key))]
        found.append(((*path, "another"), None))
    elif isinstance(value, list):
        found += [each for n, item in enumerate(value) for each in walk(item, (*path, n))]
    return found


# the wire

HEADS = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 40\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n",
        b"HTTP/1.1 500 X\r\ncontent-length: %s\r\n\r\n" % (b"9" * 5000),
        b"HTTP/1.0 200\r\n\r\n",
    ]
)
PIECES = st.one_of(
    st.binary(max_size=30),
    st.sampled_from(
        [b"0\r\n\r\n", b"\r\n", b"\r\n\r\n", b"5\r\nhello\r\n", b"fffffffffffffff\r\n"]
    ),
    st.sampled_from([b"data: [DONE]\n\n", b"data: {}\n\n", b": ping\n\n", b"5;x=y\r\n"]),
)
RESPONSES = (
    st.builds(lambda head, body: head + b"".join(body), HEADS, st.lists(PIECES)) | st.binary()
)


def read(raw: bytes, cuts: list[int]) -> tuple[str, int | None]:
    """What the framing says of the bytes, if they arrive in the given pieces."""
    framing, buffer = Framing("POST"), bytearray()
    try:
        for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
            buffer += raw[start:end]
            if framing.is_complete(buffer):
                return "complete", framing.end
        return ("complete" if framing.is_complete_at_close(buffer) else "incomplete"), None
    except HttpSyntaxError:
        return "malformed", None


@given(RESPONSES, st.data())
def test_the_end_of_a_response_does_not_depend_on_its_pieces(
    raw: bytes, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=5)))
    whole, pieces = read(raw, []), read(raw, cuts)
    # A response can be complete before the bytes arrive that would make it malformed.
    if pieces != whole:
        assert pieces[0] == "complete" or whole[0] == "complete"


CHUNK = {
    "id": "x",
    "object": "text_completion",
    "choices": [{"index": 0, "text": "a", "delta": {"content": "a"}, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8},
    "error": None,
}


def exchange(raw: bytes) -> Exchange | None:
    try:
        head = parse_head(raw)
    except HttpSyntaxError:
        return None
    return Exchange(0, 0, 1, 1, 9, [5, 9], [len(raw) // 2, len(raw)], raw, head, None, False)


@given(st.lists(replaced(CHUNK) | JSON, max_size=4), st.booleans(), st.binary(max_size=20))
def test_every_stream_becomes_a_row(chunks: list[Any], chat: bool, tail: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    body = b"".join(b"data: %s\n\n" % json.dumps(chunk).encode() for chunk in chunks)
    check_row(head + body + tail, chat)


@given(RESPONSES, st.booleans())
def test_all_bytes_become_a_row(raw: bytes, chat: bool) -> None:
    check_row(raw, chat)


def check_row(raw: bytes, chat: bool) -> None:
    if (parsed := exchange(raw)) is None:
        return
    row = parse_exchange(
        parsed, RequestSpec("r", 0, 7, 1, "messages" if chat else "ids"), "secret"
    ).row
    assert row["error"] is None or row["error"].isprintable()
    table = parquet.arrow_table(columns.REQUESTS, [row])
    pa.BufferOutputStream().write(table.to_batches()[0].serialize())  # every value can be stored


@given(st.binary() | JSON.map(lambda data: json.dumps(data).encode()))
def test_every_error_body_has_a_message(body: bytes) -> None:
    message = parse_error_body(body, "key")
    assert message.isprintable() and len(message) <= 200


@pytest.mark.parametrize("key", ["sk-secret", 'sk-"quoted"\\'])
@pytest.mark.parametrize("before", range(150, 210, 7))
def test_no_part_of_a_key_survives_the_shortening(key: str, before: int) -> None:
    for body in (f"{'x' * before} {key}", json.dumps({"error": {"message": "x" * before + key}})):
        message = parse_error_body(body.encode(), key)
        assert "sk" not in message


METRICS = st.lists(
    st.text(max_size=20)
    | st.sampled_from(
        [
            "vllm:num_requests_running 1.0",
            'vllm:num_requests_running{engine="0"} nan',
            "vllm:kv_cache_usage_perc +Inf",
            'llamacpp:x{a="',
            "# TYPE vllm:x counter",
            "vllm:x 1e999",
        ]
    )
)


@given(METRICS)
def test_metrics_are_numbers_or_refused(lines: list[str]) -> None:
    try:
        values = parse_metrics("\n".join(lines))
    except ValueError:
        return
    assert all(isinstance(value, float) for value in values.values())


# configuration

STUDIES = [
    yaml.safe_load((ROOT / "config" / name).read_text()) for name in ("demo.yaml", "external.yaml")
]


@given(st.sampled_from(STUDIES).flatmap(replaced) | JSON)
def test_a_configuration_is_valid_or_refused_in_one_line(config: Any) -> None:
    try:
        parse_study(config if isinstance(config, Mapping) else {"study": config}, ["study.yaml"])
    except ConfigError as error:
        assert str(error).startswith("study.yaml: ")
        assert len(str(error).splitlines()) == 1


YAML_TEXTS = [
    "a: 2026-11-29",
    "a: 2026-13-45",
    "a: !!set {x, y}",
    "a: !!binary aGk=",
    "a: !!python/object/apply:os.system [x]",
    "1: 2",
    "? [a]\n: b",
    "[" * 1500,
    "a: &a [*a]",
    "a: &a\n  <<: *a",
    "\n".join(
        f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9)}]" if n else "k0: &k0 [x]" for n in range(12)
    ),
    "study: x\nworkload: {trials: 1000000000}\ndeployments: []",
    "\ufeffstudy: x",
    "a: \x07",
    "a:\tb",
    "...",
    "%YAML 9.9\n---\na: b",
]


@given(st.sampled_from(YAML_TEXTS) | st.text(alphabet="ab:[]{}&*!|>-?\"'\n ,#%"))
def test_a_yaml_file_is_a_study_or_refused(text: str) -> None:
    check_yaml(text.encode(errors="surrogatepass"))


@given(st.binary())
def test_bytes_are_no_study(data: bytes) -> None:
    check_yaml(data)


def check_yaml(data: bytes) -> None:
    file = Path(FOLDER) / "study.yaml"
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=r"study\.yaml"):
        load_study(file)
    try:
        load_kinds(file)
    except WorkflowError as error:
        assert "study.yaml" in str(error)


FOLDER = ""


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global FOLDER
    FOLDER = str(tmp_path_factory.mktemp("fuzz"))


# files of others


@given(st.data())
def test_a_damaged_archive_is_refused_or_its_damage_is_named(data: st.DataObject) -> None:
    good = zlib.decompress(ARCHIVE, 31)
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)) | st.just(len(raw)))
    archive = Path(FOLDER) / "b.tar.gz"
    packed = zlib.compressobj(1, zlib.DEFLATED, 31)
    archive.write_bytes(packed.compress(bytes(raw[:cut])) + packed.flush())
    target = Path(tempfile.mkdtemp(dir=FOLDER))
    try:
        unpacked = tarball.unpack_archive(archive, target)
    except BundleError:
        return
    assert all((target / name).is_file() for name in unpacked.sha256)


def make_archive() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "b.tar.gz"
        write_tar(path, ("r-1/README.md", b"x" * 600), (f"r-1/source/{'d' * 120}/a.py", b"y"))
        return path.read_bytes()


ARCHIVE = make_archive()
RESULTS = [
    json.loads((ROOT / "tests/data" / name).read_text())
    for name in ("vllm-bench-0.32.json", "guidellm-0.8.1.json")
]


@given(st.sampled_from(RESULTS).flatmap(replaced))
def test_a_file_of_another_client_is_imported_or_refused(result: Any) -> None:
    file = Path(FOLDER) / "result.json"
    file.write_text(json.dumps(result))
    try:
        results, _ = load_results(file)
    except ExchangeError as error:
        assert "result.json" in str(error)
    else:
        deployment = Deployment("", "", "", "", "", "", "gpu", 1, 0, 0)
        assert len(imported_cells(results, deployment, None)) == len(results)


@given(st.binary() | st.lists(JSON).map(lambda lines: "\n".join(map(json.dumps, lines)).encode()))
def test_a_journal_gives_its_events_and_nothing_else(data: bytes) -> None:
    file = Path(FOLDER) / "journal.jsonl"
    file.write_bytes(data)
    reader = JournalReader(file)
    assert all(isinstance(event.kind, str) for event in reader.read_new())
    assert reader.read_new() == []


@given(st.binary() | JSON.map(lambda task: json.dumps(task).encode()))
def test_a_damaged_task_fails(data: bytes) -> None:
    spool = Spool.create(Path(tempfile.mkdtemp(dir=FOLDER)) / "spool")
    (spool.root / "todo" / "000001.00000000000000000001-key").write_bytes(data)
    assert spool.take() is None
    (event,) = spool.journal().read_new()
    assert (event.kind, event.data["status"]) == (JOB_FINISHED, 1)
    assert spool.running() == {}
