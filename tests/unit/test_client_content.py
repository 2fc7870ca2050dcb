"""Requests have the lengths that their source says, to the token, and the same for equal seeds."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from servegrid.client import content, prompts
from servegrid.client.content import open_content
from servegrid.errors import LoadError
from servegrid.study.grid import Workload
from servegrid.study.source import Distribution, FileFacts, Source
from servegrid.study.source_files import read_conversations, read_trace

PLAIN = Workload("closed_loop", 4, 100, 50, 8)


@pytest.fixture(scope="session")
def words(word_tokenizer: Path) -> Path:
    """The folder of a tokenizer with one id per word of the corpus."""
    return word_tokenizer.parent


def with_source(source: Source, **changes: object) -> Workload:
    return replace(PLAIN, source=source, **changes)  # type: ignore[arg-type]


def test_the_default_content_is_what_it_was_before(words: Path) -> None:
    made = open_content(PLAIN, words, "cell")
    assert list(islice(made.prompts("ids"), 5)) == prompts.make_token_prompts(
        PLAIN, 5, words, "cell"
    )
    assert list(islice(made.warm_up().prompts("ids"), 5)) == prompts.make_token_prompts(
        PLAIN, 5, words, "cell/warmup"
    )
    assert set(islice(made.lengths("ids"), 20)) == {(100, 50, 0)}


@pytest.mark.parametrize("shape", ["uniform", "normal", "lognormal"])
@pytest.mark.parametrize("kind", ["text", "random"])
def test_drawn_lengths_have_mean_and_deviation_and_prompts_have_these_lengths(
    words: Path, shape: str, kind: str
) -> None:
    drawn = Distribution(shape, 0.25, 10_000)  # type: ignore[arg-type]
    source = Source(kind, input_lens=drawn, output_lens=drawn)  # type: ignore[arg-type]
    workload = with_source(source, input_len=200, output_len=80)
    made = open_content(workload, words, "cell")
    lengths = list(islice(made.lengths("ids"), 4000))
    for at, mean in ((0, 200), (1, 80)):
        values = [each[at] for each in lengths]
        # Four standard errors: 4 · 0.25 / √4000 = 1.6% of the mean, and 5% of the deviation.
        assert statistics.mean(values) == pytest.approx(mean, rel=0.016)
        assert statistics.stdev(values) == pytest.approx(0.25 * mean, rel=0.06)
    sent = list(islice(made.prompts("ids"), 50))
    assert [len(prompt) for prompt in sent] == [each.input_len for each in lengths[:50]]
    assert list(islice(open_content(workload, words, "cell").prompts("ids"), 50)) == sent
    assert list(islice(open_content(workload, words, "other").lengths("ids"), 50)) != lengths[:50]


def test_texts_of_drawn_lengths_have_exactly_these_tokens(words: Path) -> None:
    source = Source("text", input_lens=Distribution("lognormal", 0.5, 400))
    made = open_content(with_source(source), words, "cell")
    tokenizer = Tokenizer.from_file(str(words / "tokenizer.json"))
    for text, lengths in islice(zip(made.prompts("text"), made.lengths("text"), strict=True), 40):
        assert isinstance(text, str)
        assert len(tokenizer.encode(text).ids) == lengths.input_len <= 400


def test_lengths_of_a_file_are_drawn_together(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text(
        "Timestamp,Request tokens,Response tokens\n9,10,1\n3,20,2\n5,30,3\n", encoding="utf-8"
    )
    source = Source("random", file=FileFacts(_sha(path), 3, context=1000))
    made = open_content(with_source(source), None, "cell", path)
    pairs = Counter((each.input_len, each.output_len) for each in islice(made.lengths("ids"), 300))
    assert set(pairs) == {(10, 1), (20, 2), (30, 3)}
    # 100 each: the standard deviation of a binomial number is √(300 · 1/3 · 2/3) = 8.2.
    assert all(67 < number < 133 for number in pairs.values())
    with pytest.raises(LoadError, match="has changed since the study was started"):
        path.write_text("Timestamp,Request tokens,Response tokens\n9,10,1\n", encoding="utf-8")
        open_content(with_source(source), None, "cell", path)


def _sha(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_groups_of_prompts_share_a_prefix_that_the_warm_up_has_sent(words: Path) -> None:
    source = Source("text", prefix_len=40, prefix_groups=3)
    workload = with_source(source)
    made = open_content(workload, words, "cell", warm_up_requests=2)
    sent = list(islice(made.prompts("ids"), 9))
    assert {len(prompt) for prompt in sent} == {100}
    starts = [tuple(prompt[:40]) for prompt in sent]
    assert starts[:3] == starts[3:6] == starts[6:9] and len(set(starts)) == 3
    assert len({tuple(prompt[40:56]) for prompt in sent}) == 9
    # The warm-up has sent two of the three prefixes; the third one is new once.
    assert [each.shared_len for each in islice(made.lengths("ids"), 5)] == [40, 40, 0, 40, 40]
    warm_up = list(islice(made.warm_up().prompts("ids"), 2))
    assert [tuple(prompt[:40]) for prompt in warm_up] == starts[:2]
    assert not {tuple(prompt) for prompt in warm_up} & {tuple(prompt) for prompt in sent}
    with pytest.raises(LoadError, match="the server takes only text"):
        next(made.prompts("text"))


TRACE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 3, "hash_ids": [7, 8, 9]},
    {"timestamp": 1000, "input_length": 1030, "output_length": 4, "hash_ids": [7, 8, 10]},
    {"timestamp": 4000, "input_length": 600, "output_length": 5, "hash_ids": [11, 12]},
    {"timestamp": 6000, "input_length": 1030, "output_length": 6, "hash_ids": [7, 8, 10]},
]


def trace_content(tmp_path: Path, rows: list[dict[str, object]], speedup: float) -> content.Content:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    source = Source("trace", file=FileFacts(_sha(path), len(rows), context=5000), speedup=speedup)
    workload = Workload("trace", None, 900, 4, len(rows), request_rate=1.0, source=source)
    return open_content(workload, None, "cell", path)


def test_rows_with_equal_blocks_share_the_start_of_their_prompts(tmp_path: Path) -> None:
    made = trace_content(tmp_path, TRACE, 10)
    first, second, third, fourth = made.prompts("ids")
    assert [len(each) for each in (first, second, third, fourth)] == [1100, 1030, 600, 1030]
    assert first[:1024] == second[:1024] and first[1024:1030] != second[1024:]
    assert second == fourth
    assert third[:512] != first[:512] and third[512:] != first[512:600]
    # Two blocks of 512; the fourth prompt is all known, and shorter than its three blocks.
    assert list(made.lengths("ids")) == [
        (1100, 3, 0),
        (1030, 4, 1024),
        (600, 5, 0),
        (1030, 6, 1030),
    ]
    assert made.arrivals() == pytest.approx([0.0, 0.1, 0.4, 0.6])


def test_a_trace_without_blocks_sends_distinct_texts(tmp_path: Path) -> None:
    plain = [{k: v for k, v in row.items() if k != "hash_ids"} for row in TRACE]
    made = trace_content(tmp_path, plain, 1)
    sent = list(made.prompts("ids"))
    assert [len(prompt) for prompt in sent] == [1100, 1030, 600, 1030]
    assert len({tuple(prompt[:16]) for prompt in sent}) == 4
    assert {each.shared_len for each in made.lengths("ids")} == {0}
    assert len(list(islice(made.warm_up().prompts("ids"), 9))) == 9


def file_content(
    tmp_path: Path, words: Path, rows: list[dict[str, object]], **changes: object
) -> content.Content:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    skip = changes.pop("on_bad_rows", "refuse")
    source = Source("file", file=FileFacts(_sha(path), len(rows)), on_bad_rows=skip)  # type: ignore[arg-type]
    return open_content(with_source(source, **changes), words, "cell", path)


def test_rows_of_a_file_are_drawn_once_each_and_counted_to_the_token(
    tmp_path: Path, words: Path
) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "one " * (number + 1), "output_tokens": number + 1} for number in range(20)
    ]
    made = file_content(tmp_path, words, rows, requests=12)
    sent, lengths = list(made.prompts("ids")), list(made.lengths("ids"))
    assert [len(prompt) for prompt in sent] == [each.input_len for each in lengths]
    assert [each.input_len for each in lengths] == [each.output_len for each in lengths]
    assert len(set(lengths)) == 12
    assert list(file_content(tmp_path, words, rows, requests=12).prompts("ids")) == sent
    assert list(file_content(tmp_path, words, rows, requests=12, seed=1).prompts("ids")) != sent
    everything = list(file_content(tmp_path, words, rows, requests=20).lengths("ids"))
    assert sorted(each[:2] for each in everything) == [(number, number) for number in range(1, 21)]
    # All rows repeat one word: the shorter of two is the start of the longer one.
    longest = 0
    for each in everything:
        assert each.shared_len == min(each.input_len, longest)
        longest = max(longest, each.input_len)


def test_the_answer_of_a_conversation_sets_its_output_length(tmp_path: Path, words: Path) -> None:
    def chat(answer: str) -> dict[str, object]:
        turns = [("system", "be kind"), ("user", "why ?"), ("assistant", answer)]
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    made = file_content(tmp_path, words, [chat("it is so"), chat("no " * 90)], requests=2)
    # be, kind, why, ?: four words; the answers have 3 and 90 words, of which 50 are allowed.
    lengths = list(made.lengths("ids"))
    assert sorted(each[:2] for each in lengths) == [(4, 3), (4, 50)]
    assert [each.shared_len for each in lengths] == [0, 4]  # both rows have the same prompt
    assert set(made.prompts("text")) == {"be kind\n\nwhy ?"}
    assert next(made.prompts("messages")) == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "why ?"},
    ]


def test_too_long_rows_are_refused_or_left_out_and_counted(tmp_path: Path, words: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "one " * 101},
        {"prompt": "one " * 100},
        {"prompt": "a", "output_tokens": 51},
    ]
    with pytest.raises(LoadError, match=r"rows\.jsonl: line \d: has (101 prompt|51 output_)"):
        list(file_content(tmp_path, words, rows, requests=3).prompts("ids"))
    path = tmp_path / "rows.jsonl"
    source = Source("file", file=FileFacts(_sha(path), 3))
    with pytest.raises(LoadError, match="line 1: has 101 prompt tokens, and input_len allows 1 to"):
        content.check_lengths(path, with_source(source, requests=1), words)
    skipping = with_source(replace(source, on_bad_rows="skip"), requests=1)
    content.check_lengths(path, skipping, words)
    with pytest.raises(LoadError, match=r"has 1 usable row, and `.*` needs 2"):
        content.check_lengths(path, replace(skipping, requests=2), words)
    made = open_content(replace(skipping, requests=None, duration_s=1.0), words, "cell", path)
    assert list(made.lengths("ids")) == [(100, 50, 0)]
    assert made.rows_left_out == 2


def test_a_cell_of_a_bundle_cannot_be_sent_without_its_file() -> None:
    source = Source("file", file=FileFacts("0" * 64, 3))
    with pytest.raises(LoadError, match="needs a file of which only the SHA-256 is known"):
        open_content(with_source(source), None, "cell")


def test_the_readers_rows_are_those_of_the_study(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x"}\n', encoding="utf-8")
    assert read_conversations(path, "refuse").sha256 == _sha(path)
    path.write_text('{"timestamp": 5, "input_length": 1, "output_length": 1}\n', encoding="utf-8")
    assert read_trace(path, "refuse", 9).sha256 == _sha(path)
