"""What the next request of a conversation carries, held against histories made by hand."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from servegrid.client import content
from servegrid.client.composer import Composer
from servegrid.client.content import Conversations, open_content
from servegrid.client.conversations import Answer, Composed, Dialogues, Script, UserTurn
from servegrid.client.inflight import PreparedRequest, Turn
from servegrid.client.parse import parse_answer
from servegrid.client.prompts import PromptForm
from servegrid.errors import LoadError
from servegrid.study.grid import Workload
from servegrid.study.source import FileFacts, Source
from servegrid.study.source_files import Message, file_sha256, read_conversations
from servegrid.study.tokenizer import open_tokenizer

ROWS = [
    {
        "messages": [
            {"role": "system", "content": "the river"},
            {"role": "user", "content": "the water"},
            {"role": "assistant", "content": "the the the the"},
            {"role": "user", "content": "of the"},
            {"role": "assistant", "content": "the"},
            {"role": "assistant", "content": "of"},
            {"role": "user", "content": "and the water"},
        ]
    },
    {"prompt": "the river of the", "output_tokens": 2},
]


def script(*turns: list[int], shared_len: int = 0) -> Script:
    made = (UserTurn(prompt, len(prompt), 2, 0.5 * at) for at, prompt in enumerate(turns))
    return Script(tuple(made), shared_len)


def answered(text: str = "", ids: Sequence[int] | None = None, prompt_tokens: int = 9) -> Answer:
    given = None if ids is None else list(ids)
    return Answer(text, given, prompt_tokens, 2 if given is None else len(given))


def carried(composed: Composed | None) -> tuple[object, ...]:
    """The prompt, and of the turn: conversation, number, prompt tokens, shared tokens."""
    assert composed is not None
    turn = composed.turn
    return composed.prompt, turn.conversation, turn.number, turn.input_len, turn.shared_len


def test_the_history_is_exactly_what_the_server_has_processed() -> None:
    dialogues = Dialogues(iter([script([1, 2, 3], [4, 5], [6]), script([8])]), "ids", None)
    assert carried(dialogues.begin(0, 0)) == ([1, 2, 3], 0, 1, 3, 0)
    second = dialogues.follow(0, answered(ids=[70, 71], prompt_tokens=3))
    # The KV of 71 was never computed: 3 + 2 - 1 tokens are in the server's cache.
    assert carried(second) == ([1, 2, 3, 70, 71, 4, 5], 0, 2, 7, 4)
    assert second is not None and second.think_s == 0.5
    third = dialogues.follow(0, answered(ids=[80], prompt_tokens=7))
    assert carried(third) == ([1, 2, 3, 70, 71, 4, 5, 80, 6], 0, 3, 9, 7)
    assert carried(dialogues.follow(0, answered(ids=[90]))) == ([8], 1, 1, 1, 0)
    assert dialogues.follow(0, answered(ids=[91])) is None
    assert dialogues.follow(0, answered(ids=[92])) is None


def test_after_a_failed_turn_the_next_conversation_begins() -> None:
    scripts = [script([1], [2]), script([3], [4], shared_len=1)]
    dialogues = Dialogues(iter(scripts), "ids", None)
    dialogues.begin(7, 3)
    assert carried(dialogues.follow(7, None)) == ([3], 1, 1, 1, 1)
    assert carried(dialogues.follow(7, answered(ids=[9], prompt_tokens=1)))[0] == [3, 9, 4]


def test_users_do_not_start_at_the_same_turn_and_take_conversations_as_they_come() -> None:
    turns = [[1], [2], [3]]
    dialogues = Dialogues((script(*turns) for _ in range(9)), "ids", None, staggered=True)
    for user in range(4):
        dialogues.begin(user, user)
    played = {user: [0] for user in range(4)}
    for _ in range(3):
        for user in range(4):
            composed = dialogues.follow(user, answered(ids=[5]))
            assert composed is not None
            played[user].append(composed.turn.conversation - user)
    # User 0 has one turn, user 1 two, user 2 three, user 3 one again.
    lengths = {user: numbers.count(0) for user, numbers in played.items()}
    assert lengths == {0: 1, 1: 2, 2: 3, 3: 1}


def test_a_share_has_its_own_conversations_of_all_and_skips_rows_that_cannot_be_sent() -> None:
    scripts = [script([1]), Script(()), script([3])]
    dialogues = Dialogues(iter(scripts), "ids", None, share=(1, 3))
    assert carried(dialogues.begin(0, 0)) == ([1], 1, 1, 1, 0)
    assert carried(dialogues.follow(0, None)) == ([3], 7, 1, 1, 0)
    assert dialogues.rows_left_out == 1


def test_a_conversation_ends_before_its_prompt_is_too_long() -> None:
    scripts = [script([1, 2, 3], [4, 5]), script([8])]
    for longest, expected in ((7, [1, 2, 3, 70, 71, 4, 5]), (6, [8])):
        dialogues = Dialogues(iter(scripts), "ids", None, longest)
        dialogues.begin(0, 0)
        assert carried(dialogues.follow(0, answered(ids=[70, 71])))[0] == expected
        assert dialogues.cut == (longest == 6)


def test_without_token_ids_the_text_of_the_answer_is_carried(word_tokenizer: Path) -> None:
    tokenizer = open_tokenizer(word_tokenizer)
    ids = tokenizer.encode("the river of").ids
    dialogues = Dialogues(iter([script(ids[:1], ids[2:])]), "ids", tokenizer)
    dialogues.begin(0, 0)
    found = dialogues.follow(0, answered("river", prompt_tokens=1))
    assert carried(found) == (ids, 0, 2, 3, 2)
    texts = (UserTurn("the", 1, 2, 0.0), UserTurn("of", 1, 2, 0.0))
    dialogues = Dialogues(iter([Script(texts)]), "text", tokenizer)
    dialogues.begin(0, 0)
    found = dialogues.follow(0, answered(" river", prompt_tokens=1))
    assert carried(found) == ("the river\n\nof", 0, 2, 3, 2)


def test_without_a_tokenizer_an_answer_has_as_many_tokens_as_the_server_counted() -> None:
    dialogues = Dialogues(iter([script([1], [2])]), "ids", None)
    dialogues.begin(0, 0)
    prompt, *_, input_len, _ = carried(dialogues.follow(0, Answer("a b c", None, 1, 5)))
    assert isinstance(prompt, list)
    assert (prompt[0], prompt[-1], len(prompt), input_len) == (1, 2, 7, 7)


def response(*choices: dict[str, object], usage: object = None, status: int = 200) -> bytes:
    events = [{"choices": [each]} for each in choices]
    if usage is not None:
        events.append({"choices": [], "usage": usage})  # type: ignore[dict-item]
    body = b"".join(f"data: {json.dumps(each)}\n\n".encode() for each in events)
    head = f"HTTP/1.1 {status} OK\r\ncontent-type: text/event-stream\r\n".encode()
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


USAGE = {"prompt_tokens": 6, "completion_tokens": 3}
LAST = {"text": "", "finish_reason": "length"}


def test_an_answer_is_read_from_the_bytes_of_a_response() -> None:
    first = {"text": " é", "token_ids": [5, 6], "prompt_token_ids": [1, 2]}
    last = {"text": " b", "token_ids": [7], "finish_reason": "length"}
    assert parse_answer(response(first, last, usage=USAGE), chat=False) == (" é b", [5, 6, 7], 6, 3)
    # One token is missing, so the ids are not the answer.
    one = {"text": " é", "token_ids": [5]}
    assert parse_answer(response(one, last, usage=USAGE), chat=False) == (" é b", None, 6, 3)


def test_a_chat_sends_back_the_answer_without_the_reasoning() -> None:
    thought = {"delta": {"reasoning_content": "hm"}}
    parts = [{"delta": {"content": each}} for each in ("<think>why", "</think> Blue", ".")]
    end = {"delta": {}, "finish_reason": "stop"}
    found = parse_answer(response(thought, *parts, end, usage=USAGE), chat=True)
    assert found == (" Blue.", None, 6, 3)


@pytest.mark.parametrize(
    "raw",
    [
        response(LAST, usage=USAGE, status=500),
        response({"text": " a"}, usage=USAGE),  # not finished
        response(LAST),  # no usage
        response(LAST, usage={"prompt_tokens": 6, "completion_tokens": 0}),
        b"not HTTP",
        b"",
    ],
)
def test_a_failure_is_no_answer(raw: bytes) -> None:
    assert parse_answer(raw, chat=False) is None


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS), encoding="utf-8")
    return path


def test_the_turns_of_a_row(file: Path) -> None:
    row, other = read_conversations(file, "refuse").rows
    turns = row.user_turns(None)
    assert [(each.messages, each.answer) for each in turns] == [
        ((Message("system", "the river"), Message("user", "the water")), "the the the the"),
        ((Message("user", "of the"),), "the"),
        ((Message("user", "and the water"),), None),
    ]
    assert row.user_turns(2) == turns[:2]
    assert [each.output_tokens for each in other.user_turns(None)] == [2]


def opened(file: Path, words: Path, **changes: object) -> Conversations:
    keys = {"turns": "all", "on_bad_rows": "skip", **changes}
    input_len = keys.pop("input_len", 100)
    facts = FileFacts(file_sha256(file), 2, turns=4)
    source = Source("file", file=facts, **keys)  # type: ignore[arg-type]
    workload = Workload("closed_loop", 1, input_len, 3, 4, source=source)  # type: ignore[arg-type]
    made = open_content(workload, words, "cell", file)
    assert isinstance(made, Conversations)
    return made


def longest_script(made: Conversations, form: PromptForm) -> Script:
    return max(made.scripts(form), key=lambda each: len(each.turns))


def test_a_file_gives_the_turns_of_its_users_and_the_lengths_of_its_answers(
    file: Path, word_tokenizer: Path
) -> None:
    made = opened(file, word_tokenizer.parent)
    encode = open_tokenizer(word_tokenizer).encode
    first, second, third = longest_script(made, "ids").turns
    assert first.prompt == encode("the river the water").ids
    assert (second.prompt, third.prompt) == (encode("of the").ids, encode("and the water").ids)
    # The recorded answers have 4 and 1 tokens; output_len 3 is the most, and the default.
    assert [each.output_len for each in (first, second, third)] == [3, 1, 3]
    messages = longest_script(made, "messages").turns[0].prompt
    assert messages == [
        {"role": "system", "content": "the river"},
        {"role": "user", "content": "the water"},
    ]
    assert longest_script(made, "text").turns[0].prompt == "the river\n\nthe water"
    assert sorted(len(each.turns) for each in made.scripts("ids")) == [1, 3]
    assert not made.staggered
    assert made.keys == {"return_token_ids": True, "cache_salt": "cell"}


def test_rows_with_the_same_system_prompt_share_their_start(
    tmp_path: Path, word_tokenizer: Path
) -> None:
    """A system prompt of 40 words, then a question: llama.cpp finds all 40 in its cache."""
    system = " ".join(["the water of the river"] * 8)
    rows = [
        {
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": question},
            ]
        }
        for question in ("and", "of")
    ]
    path = tmp_path / "same.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    made = opened(path, word_tokenizer.parent)
    assert [each.shared_len for each in made.scripts("ids")] == [0, 40]
    source = replace(made.source, turns=1)
    single = open_content(
        replace(made.workload, requests=2, source=source), word_tokenizer.parent, "cell", path
    )
    assert [each.shared_len for each in single.lengths("ids")] == [0, 40]


def test_histories_that_are_too_long_are_refused_or_cut(file: Path, word_tokenizer: Path) -> None:
    """The third turn has 4 + 3 + 2 + 1 + 3 = 13 tokens with its history."""
    words = word_tokenizer.parent
    fits, short = (opened(file, words, input_len=each, on_bad_rows="refuse") for each in (13, 12))
    assert len(longest_script(fits, "ids").turns) == 3
    message = "line 1: turn 3 has 13 prompt tokens with its history, and input_len allows 12"
    with pytest.raises(LoadError, match=message):
        list(short.scripts("ids"))
    content.check_lengths(file, fits.workload, words)
    with pytest.raises(LoadError, match=message):
        content.check_lengths(file, short.workload, words)
    skipping = opened(file, words, input_len=12)
    content.check_lengths(file, skipping.workload, words)
    assert skipping.longest == 12
    assert len(longest_script(skipping, "ids").turns) == 3  # it is cut while it is played
    too_short = opened(file, words, input_len=3)
    assert [each.turns for each in too_short.scripts("ids")] == [(), ()]
    with pytest.raises(LoadError, match=r"has 0 user turns, and .* needs 4"):
        content.check_lengths(file, too_short.workload, words)


@pytest.mark.parametrize("kind", ["text", "random"])
def test_drawn_conversations_have_the_lengths_and_the_prefix_of_the_study(
    kind: str, word_tokenizer: Path
) -> None:
    source = Source(kind, prefix_len=40, prefix_groups=2, turns=3)  # type: ignore[arg-type]
    workload = Workload("closed_loop", 2, 60, 10, 6, think_time_s=1.0, source=source)
    made = open_content(workload, word_tokenizer.parent, "cell", warm_up_requests=2)
    assert isinstance(made, Conversations) and made.staggered
    scripts = take(made.scripts("ids"), 5)
    for each in scripts:
        assert [len(turn.prompt) for turn in each.turns] == [60, 60, 60]
        assert [turn.input_len for turn in each.turns] == [60, 60, 60]
        assert all(turn.think_s > 0 for turn in each.turns)
        assert each.shared_len == 40  # the warm-up has sent both prefixes
    starts = [tuple(each.turns[0].prompt[:40]) for each in scripts]
    assert starts[0] == starts[2] == starts[4] != starts[1] == starts[3]
    everything = [tuple(turn.prompt[-20:]) for each in scripts for turn in each.turns]
    assert len(set(everything)) == 15
    assert take(made.scripts("ids"), 5) == scripts
    warm_up = next(made.warm_up().prompts("ids"))
    assert tuple(warm_up[:40]) == starts[0]


def take(scripts: Iterator[Script], number: int) -> list[Script]:
    return [next(scripts) for _ in range(number)]


def test_texts_of_a_chat_are_messages(word_tokenizer: Path) -> None:
    workload = Workload("closed_loop", 1, 20, 5, 6, source=Source("text", turns=2))
    made = open_content(workload, word_tokenizer.parent, "cell")
    assert isinstance(made, Conversations)
    (first, _), _ = next(made.scripts("messages"))
    ((role, text),) = [tuple(each.values()) for each in first.prompt]  # type: ignore[union-attr]
    assert role == "user"
    assert len(open_tokenizer(word_tokenizer).encode(text).ids) == 20


def prepare(composed: Composed) -> PreparedRequest:
    return PreparedRequest("POST", str(composed.prompt).encode(), None, 5, composed.turn)


def asked(composer: Composer, user: int, response: bytes) -> PreparedRequest | None:
    composer.ask(user, response)
    for _ in range(200):
        composer.flush()
        for number, request in composer.replies(timeout_s=0.05):
            assert number == user
            return request
    raise AssertionError("no reply")


def test_the_composers_process_builds_what_its_dialogues_say() -> None:
    """Also a response that is larger than a socket takes at once."""
    scripts = [script([1], [2]), Script(()), script([3])]
    dialogues = Dialogues(iter(scripts), "ids", None, longest=3)
    large = 10**5

    def read(response: bytes) -> Answer | None:
        return answered(ids=[len(response) // large], prompt_tokens=1)

    with Composer(dialogues, prepare, read, [0]) as composer:
        assert [each.data for each in composer.openings] == [b"[1]"]
        found = asked(composer, 0, b"x" * 9 * large)
        assert found == PreparedRequest("POST", b"[1, 9, 2]", None, 5, Turn(0, 2, 3, 2, 1))
        found = asked(composer, 0, b"x")
        assert found is not None and found.turn == Turn(2, 1, 1, 2, 0)
        assert asked(composer, 0, b"x") is None
        assert composer.rows_left_out == 1
    assert composer.fileno() == -1


def test_a_composer_that_is_killed_is_an_error() -> None:
    def read(response: bytes) -> Answer | None:
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    with (
        Composer(Dialogues(iter([script([1])]), "ids", None), prepare, read, [0]) as composer,
        pytest.raises(LoadError, match="was killed from outside"),
    ):
        asked(composer, 0, b"x")
