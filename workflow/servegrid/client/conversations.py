"""Builds the requests of conversations: each carries the history with the server's own answers.

The turns of the user, the lengths of the answers and the think times are known before the
measurement. Only what the server answers is not, so a prompt follows from the answer to the last
one. If the server names the token ids of its answers, the history is exactly what it has processed.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from servegrid.client.inflight import Turn
from servegrid.client.prompts import ORDINARY_IDS, Prompt, PromptForm
from servegrid.study.tokenizer import TextTokenizer

SEPARATOR = "\n\n"
"""Between an answer and the next turn of the user, if they are text."""


class Answer(NamedTuple):
    """What a server has answered: its text, and its counts of tokens.

    `ids` are the tokens of the answer, None if the server does not say all of them.
    """

    text: str
    ids: list[int] | None
    prompt_tokens: int
    completion_tokens: int


class UserTurn(NamedTuple):
    """What the user adds to the history, in `input_len` tokens, and the length of the answer.

    After the answer the user thinks for `think_s` seconds.
    """

    prompt: Prompt
    input_len: int
    output_len: int
    think_s: float


class Script(NamedTuple):
    """One conversation as it is known before: all turns of the user.

    Earlier requests had the first `shared_len` tokens of its first turn too. It has no turns if its
    row of a file cannot be sent.
    """

    turns: tuple[UserTurn, ...]
    shared_len: int = 0


class Composed(NamedTuple):
    """The next request of a user, and how long the user thinks after the response."""

    prompt: Prompt
    think_s: float
    turn: Turn


@dataclass
class _Dialogue:
    """A conversation that is going on: its last prompt, in `input_len` tokens."""

    number: int
    turns: tuple[UserTurn, ...]
    turn: int
    prompt: Prompt
    input_len: int


class Dialogues:
    """The conversations that users play one after another.

    `scripts` are those of one process: every `count`-th of all, from number `index` on. `tokenizer`
    counts texts; without one, an answer whose token ids are unknown becomes random ids. A
    conversation ends before a prompt with its history would have more than `longest` tokens: `cut`
    counts these. `rows_left_out` counts the scripts without turns. With `staggered`, the first
    conversation of the users has 1, 2, … turns for one user after another: without this, all would
    be at the same turn at the same time.
    """

    def __init__(
        self,
        scripts: Iterator[Script],
        form: PromptForm,
        tokenizer: TextTokenizer | None,
        longest: int | None = None,
        share: tuple[int, int] = (0, 1),
        staggered: bool = False,
    ) -> None:
        self.cut = self.rows_left_out = 0
        self._scripts, self._form, self._tokenizer = scripts, form, tokenizer
        self._longest, self._staggered = longest, staggered
        self._next_number, self._step = share
        self._stock: deque[tuple[int, Script]] = deque()
        self._current: dict[int, _Dialogue] = {}

    @property
    def stocked(self) -> int:
        """How many conversations are ready to begin."""
        return len(self._stock)

    def stock(self) -> bool:
        """Make one more conversation ready. False if there is none.

        Raises LoadError if the next one cannot be made.
        """
        for script in self._scripts:
            number = self._next_number
            self._next_number += self._step
            if script.turns:
                self._stock.append((number, script))
                return True
            self.rows_left_out += 1
        return False

    def begin(self, user: int, position: int) -> Composed | None:
        """The first request of the user at `position` among all users.

        None if there is no conversation. Raises LoadError as `stock`.
        """
        if not self._stock and not self.stock():
            return None
        turns = len(self._stock[0][1].turns)
        return self._open(user, 1 + position % turns if self._staggered else turns)

    def _open(self, user: int, most: int | None = None) -> Composed | None:
        """The first turn of the user's next conversation, of which `most` turns are played."""
        self._current.pop(user, None)
        if not self._stock and not self.stock():
            return None
        number, script = self._stock.popleft()
        turns = script.turns[:most]
        first = turns[0]
        found = _Dialogue(number, turns, 0, first.prompt, self._count(first.prompt, first))
        self._current[user] = found
        return self._compose(found, script.shared_len)

    def follow(self, user: int, answer: Answer | None) -> Composed | None:
        """The user's next request, after the `answer` to the last one.

        After the last turn, after a failed one (None), and if the prompt would be too long, it is
        the first turn of the next conversation. None if there is no further one.
        """
        dialogue = self._current.get(user)
        if dialogue is None or answer is None or dialogue.turn + 1 == len(dialogue.turns):
            return self._open(user)
        turn = dialogue.turns[dialogue.turn + 1]
        prompt, input_len = self._extend(dialogue, answer, turn)
        if self._longest is not None and input_len > self._longest:
            self.cut += 1
            return self._open(user)
        dialogue.turn += 1
        dialogue.prompt, dialogue.input_len = prompt, input_len
        # The server never computes the KV of the last token of an answer: it samples it only.
        return self._compose(dialogue, answer.prompt_tokens + answer.completion_tokens - 1)

    @staticmethod
    def _compose(dialogue: _Dialogue, shared_len: int) -> Composed:
        turn = dialogue.turns[dialogue.turn]
        facts = Turn(
            conversation=dialogue.number,
            number=dialogue.turn + 1,
            input_len=dialogue.input_len,
            output_len=turn.output_len,
            shared_len=shared_len,
        )
        return Composed(dialogue.prompt, turn.think_s, facts)

    def _count(self, prompt: Prompt, turn: UserTurn) -> int:
        return self._length(prompt) if isinstance(prompt, str) else turn.input_len

    def _length(self, text: str) -> int:
        assert self._tokenizer is not None
        return len(self._tokenizer.encode(text).ids)

    def _extend(self, dialogue: _Dialogue, answer: Answer, turn: UserTurn) -> tuple[Prompt, int]:
        """The prompt with the answer and the next turn, and its number of tokens."""
        before, added = dialogue.prompt, turn.prompt
        if isinstance(before, str):
            assert isinstance(added, str)
            text = f"{before}{answer.text}{SEPARATOR}{added}"
            return text, self._length(text)
        if self._form == "ids":
            ids = self._answer_ids(dialogue, answer)
            return [*before, *ids, *added], dialogue.input_len + len(ids) + turn.input_len
        reply: Mapping[str, str] = {"role": "assistant", "content": answer.text}
        length = dialogue.input_len + self._length(answer.text) + turn.input_len
        return [*before, reply, *added], length

    def _answer_ids(self, dialogue: _Dialogue, answer: Answer) -> list[int]:
        if answer.ids is not None:
            return answer.ids
        if self._tokenizer is not None:
            return self._tokenizer.encode(answer.text).ids
        rng = random.Random(f"{dialogue.number}/{dialogue.turn}")
        return rng.choices(ORDINARY_IDS, k=answer.completion_tokens)
