"""What the requests of a workload contain: their lengths, their prompts, and when they are due.

By default, prompts are texts of one length from the corpus. `workload.source` draws other lengths,
or takes texts from a file of the user, or lengths and times from a trace. Everything follows from
the workload's seed and the salt.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count, cycle, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

from servegrid.client import prompts, schedule
from servegrid.client.conversations import SEPARATOR, Script, UserTurn
from servegrid.client.prompts import Prompt, PromptForm
from servegrid.client.shared_starts import SharedStarts
from servegrid.errors import LoadError, ModelError
from servegrid.study.grid import Workload
from servegrid.study.source import BLOCK_TOKENS, Source
from servegrid.study.source_files import (
    Arrival,
    Conversation,
    Message,
    Rows,
    read_conversations,
    read_lengths,
    read_trace,
)
from servegrid.study.text import pluralize
from servegrid.study.tokenizer import TextTokenizer, open_tokenizer

_WARM_UP_LENGTHS = 1000


class RequestLengths(NamedTuple):
    """The tokens of one request's prompt and output.

    `shared_len` is the number of tokens at the start of the prompt that an earlier request had too:
    what an unlimited prefix cache can have.
    """

    input_len: int
    output_len: int
    shared_len: int = 0


class Content(ABC):
    """The requests of a workload, in order. `lengths` and `prompts` may have no end.

    Prompts are made one by one, also in another process. Lengths can be found again at any time.
    """

    def __init__(self, workload: Workload, tokenizer: Path | None, salt: str) -> None:
        self.workload, self.tokenizer, self.salt = workload, tokenizer, salt
        self.source = workload.source or Source()

    @abstractmethod
    def lengths(self, form: PromptForm) -> Iterator[RequestLengths]:
        """The lengths of each request."""

    @abstractmethod
    def prompts(self, form: PromptForm) -> Iterator[Prompt]:
        """The prompt of each request. Raises LoadError if there cannot be such a prompt."""

    def arrivals(self) -> list[float] | None:
        """When the requests are due, in s after the start; None if they wait for responses."""
        return schedule.arrival_times(self.workload, self.salt)

    def warm_up(self) -> Content:
        """What is sent before the measurement: texts of the corpus of the same lengths."""
        return ListedContent(self, tuple(islice(self.lengths("ids"), _WARM_UP_LENGTHS)))

    @property
    def rows_left_out(self) -> int:
        """The rows of a file that were too long, once its prompts have been made."""
        return 0


def open_content(
    workload: Workload,
    tokenizer: Path | None,
    salt: str,
    source_file: Path | None = None,
    warm_up_requests: int = 0,
) -> Content:
    """The content of a workload, before which `warm_up_requests` of its `warm_up` are sent.

    `source_file` is the file of its source, if it has one. Raises LoadError if the file is missing
    or is not that of the study, and ConfigError if it has a bad row.
    """
    source = workload.source or Source()
    if source.file is None and source.has_turns:
        return DrawnConversations(workload, tokenizer, salt, warm_up_requests)
    if source.file is None:
        return DrawnContent(workload, tokenizer, salt, warm_up_requests=warm_up_requests)
    if source_file is None:
        raise LoadError(
            f"the workload `{workload.cell}` needs a file of which only the SHA-256 is known "
            f"({source.file.sha256}). Name the file as `path` of `workload.source`."
        )
    rows = _read_rows(source, source_file)
    if rows.sha256 != source.file.sha256:
        raise LoadError(
            f"{source_file}: has changed since the study was started. Run the same command again: "
            "the new file has new cells."
        )
    if source.kind == "file":
        made = FileConversations if source.has_turns else FileContent
        return made(workload, tokenizer, salt, rows.rows, source_file)
    if source.kind == "trace":
        return TraceContent(workload, tokenizer, salt, rows.rows)
    return DrawnContent(workload, tokenizer, salt, rows.rows, warm_up_requests)


def _read_rows(source: Source, path: Path) -> Rows[Any]:
    assert source.file is not None
    context, on_bad_rows = source.file.context, source.on_bad_rows
    if source.kind == "file":
        return read_conversations(path, on_bad_rows)
    if source.kind == "trace":
        return read_trace(path, on_bad_rows, context, source.first_s)
    return read_lengths(path, on_bad_rows, context)


class DrawnContent(Content):
    """Prompts from the corpus, or random ids, of drawn lengths.

    `rows` are those that lengths are drawn from, if they come from a file.
    """

    def __init__(
        self,
        workload: Workload,
        tokenizer: Path | None,
        salt: str,
        rows: Sequence[Arrival] = (),
        warm_up_requests: int = 0,
        part: str = "",
    ) -> None:
        super().__init__(workload, tokenizer, salt)
        self._rows, self._warm_up_requests, self._part = rows, warm_up_requests, part

    def lengths(self, form: PromptForm) -> Iterator[RequestLengths]:
        source, workload = self.source, self.workload
        salt = f"{self.salt}/{self._part}"
        rng = random.Random(f"{workload.seed}/{salt}/source")
        outputs = schedule.output_lengths(workload, salt)
        for number in count():
            input_len, output_len = workload.input_len, next(outputs)
            if self._rows:
                _, input_len, output_len, _ = rng.choice(self._rows)
            if source.input_lens is not None:
                input_len = source.input_lens.draw(rng, input_len, source.prefix_len + 1)
            if source.output_lens is not None:
                output_len = source.output_lens.draw(rng, output_len)
            yield RequestLengths(input_len, output_len, self._shared(number))

    def _shared(self, number: int) -> int:
        if self.workload.prompts == "identical":
            return self.workload.input_len if number else 0
        is_known = number >= self.source.prefix_groups or number < self._warm_up_requests
        return self.source.prefix_len if is_known else 0

    def prompts(self, form: PromptForm) -> Iterator[Prompt]:
        source = self.source
        if form != "ids" and source.needs_ids:
            raise _needs_ids()
        tokenizer = None if source.kind == "random" else self.tokenizer
        salt = f"{self.salt}/{self._part}".removesuffix("/")
        own = (each.input_len - source.prefix_len for each in self.lengths(form))
        made = prompts.iterate_prompts(self.workload, form, tokenizer, salt, own)
        if not source.prefix_len:
            yield from made
            return
        shared = cycle(self._prefixes(tokenizer))
        for prompt in made:
            assert isinstance(prompt, list)
            yield next(shared) + prompt

    def _prefixes(self, tokenizer: Path | None) -> list[list[int]]:
        """The shared prefixes: the same in the warm-up as in the measurement."""
        lengths = [self.source.prefix_len] * self.source.prefix_groups
        salt = f"{self.salt}/prefixes"
        made = prompts.iterate_prompts(self.workload, "ids", tokenizer, salt, lengths)
        return [prompt for prompt in made if isinstance(prompt, list)]

    def warm_up(self) -> Content:
        return DrawnContent(self.workload, self.tokenizer, self.salt, self._rows, part="warmup/")


def _needs_ids() -> LoadError:
    return LoadError(
        "random ids, shared prefixes and the blocks of a trace are token ids, but the server takes "
        "only text. Use `kind: text` without `prefix_len`, or a trace without `hash_ids`."
    )


class ListedContent(Content):
    """Texts from the corpus with the lengths of a list, again and again: the warm-up of a file."""

    def __init__(self, of: Content, listed: Sequence[RequestLengths]) -> None:
        super().__init__(of.workload, of.tokenizer, of.salt)
        self._listed = listed

    def lengths(self, form: PromptForm) -> Iterator[RequestLengths]:
        return cycle(each._replace(shared_len=0) for each in self._listed)

    def prompts(self, form: PromptForm) -> Iterator[Prompt]:
        lengths = (each.input_len for each in self.lengths(form))
        salt = f"{self.salt}/warmup"
        yield from prompts.iterate_prompts(self.workload, form, self.tokenizer, salt, lengths)


class TraceContent(Content):
    """Requests of the lengths of a trace. Rows with equal blocks share the start of their prompt.

    Prompts are texts from the corpus, or random ids if the trace has blocks: each block has tokens
    of its own.
    """

    def __init__(
        self, workload: Workload, tokenizer: Path | None, salt: str, rows: Sequence[Arrival]
    ) -> None:
        super().__init__(workload, tokenizer, salt)
        self._rows = rows

    def lengths(self, form: PromptForm) -> Iterator[RequestLengths]:
        seen: set[int] = set()
        for row in self._rows:
            # An id names all tokens up to the end of its block, so one that was seen is enough.
            known = (at for at, block in enumerate(row.blocks) if block not in seen)
            shared_len = min(next(known, len(row.blocks)) * BLOCK_TOKENS, row.input_len)
            seen.update(row.blocks)
            yield RequestLengths(row.input_len, row.output_len, shared_len)

    def prompts(self, form: PromptForm) -> Iterator[Prompt]:
        if not any(row.blocks for row in self._rows):
            lengths = (row.input_len for row in self._rows)
            yield from prompts.iterate_prompts(
                self.workload, form, self.tokenizer, self.salt, lengths
            )
            return
        if form != "ids":
            raise _needs_ids()
        for number, row in enumerate(self._rows):
            if row.blocks:
                blocks = (self._ids(f"block {block}", BLOCK_TOKENS) for block in row.blocks)
                yield list(chain.from_iterable(blocks))[: row.input_len]
            else:
                yield self._ids(f"row {number}", row.input_len)

    def _ids(self, name: str, size: int) -> list[int]:
        rng = random.Random(f"{self.workload.seed}/{self.salt}/{name}")
        return rng.choices(prompts.ORDINARY_IDS, k=size)

    def arrivals(self) -> list[float] | None:
        return [row.time_s / self.source.speedup for row in self._rows]


class _Encoded(NamedTuple):
    """One row of a file as a request."""

    row: Conversation
    ids: list[int]
    lengths: RequestLengths


class _FileRows(Content):
    """The rows of a file, each sent at most once, in an order that the seed and the salt draw."""

    def __init__(
        self,
        workload: Workload,
        tokenizer: Path | None,
        salt: str,
        rows: Sequence[Conversation],
        path: Path,
    ) -> None:
        super().__init__(workload, tokenizer, salt)
        self._rows, self._path = rows, path

    def _draw_order(self) -> list[Conversation]:
        rng = random.Random(f"{self.workload.seed}/{self.salt}/rows")
        return rng.sample(self._rows, len(self._rows))


class FileContent(_FileRows):
    """The texts of a file as single requests.

    All messages of a conversation are one prompt, with an empty line in between; in a chat, the
    server's template joins them. A row's output length is its `output_tokens`, or that of its
    recorded answer but at most `workload.output_len`, or else that.
    """

    def __init__(
        self,
        workload: Workload,
        tokenizer: Path | None,
        salt: str,
        rows: Sequence[Conversation],
        path: Path,
    ) -> None:
        super().__init__(workload, tokenizer, salt, rows, path)
        self._drawn: dict[PromptForm, list[_Encoded]] = {}
        self._left_out = 0

    def lengths(self, form: PromptForm) -> Iterator[RequestLengths]:
        return (each.lengths for each in self._draw(form))

    def prompts(self, form: PromptForm) -> Iterator[Prompt]:
        return (_sent_as(each, form) for each in self._draw(form))

    def _draw(self, form: PromptForm) -> list[_Encoded]:
        """The drawn rows, encoded once: as many as the workload needs, or all usable ones."""
        if form not in self._drawn:
            tokenizer = _open_tokenizer(self.tokenizer)
            self._left_out, found, starts = 0, list[_Encoded](), SharedStarts()
            for row in self._draw_order():
                if len(found) == self.workload.requests:
                    break
                encoded = _encode(row, self.workload, tokenizer, form)
                if isinstance(encoded, _Encoded):
                    shared_len = starts.add(encoded.ids)
                    lengths = encoded.lengths._replace(shared_len=shared_len)
                    found.append(encoded._replace(lengths=lengths))
                elif self.source.on_bad_rows == "skip":
                    self._left_out += 1
                else:
                    raise LoadError(_refusal(self._path, row, encoded))
            if len(found) < (self.workload.requests or 1):
                raise LoadError(_shortage(self._path, len(found), self.workload))
            self._drawn[form] = found
        return self._drawn[form]

    def arrivals(self) -> list[float] | None:
        times = super().arrivals()
        return None if times is None else times[: len(self._rows)]

    @property
    def rows_left_out(self) -> int:
        return self._left_out


class Conversations(Content):
    """The conversations of a workload whose requests are turns. They may have no end.

    `lengths` and `prompts` are those of the first turns. Later ones carry answers of the server, so
    only the load knows them (see `Dialogues`).
    """

    @abstractmethod
    def scripts(self, form: PromptForm) -> Iterator[Script]:
        """Each conversation as it is known before. Raises LoadError if there cannot be such one."""

    @property
    def longest(self) -> int | None:
        """The largest prompt that is sent, in tokens; None if the lengths of turns limit it."""
        return None

    @property
    def staggered(self) -> bool:
        """Whether all conversations have equally many turns: users must then begin differently."""
        return False

    @property
    def keys(self) -> Mapping[str, Any]:
        """Keys of its requests that a server may refuse: vLLM then names the tokens of answers."""
        return {"return_token_ids": True}

    def _think_times(self, number: int) -> Iterator[float]:
        """The think times after the turns of one conversation, in s."""
        salt = f"{self.salt}/conversation {number}"
        return schedule.think_times(self.workload, salt) or repeat(0.0)


class DrawnConversations(Conversations):
    """Conversations of a fixed number of turns from the corpus, or of random ids.

    Each turn has a drawn length. The first one starts with a shared prefix, if there is one.
    """

    def __init__(
        self, workload: Workload, tokenizer: Path | None, salt: str, warm_up_requests: int = 0
    ) -> None:
        super().__init__(workload, tokenizer, salt)
        source = replace(self.source, prefix_len=0, prefix_groups=1)
        self._first = DrawnContent(workload, tokenizer, salt, warm_up_requests=warm_up_requests)
        self._later = DrawnContent(
            replace(workload, source=source), tokenizer, salt, part="later turns/"
        )

    @property
    def staggered(self) -> bool:
        return True

    def lengths(self, form: PromptForm) -> Iterator[RequestLengths]:
        return self._first.lengths(form)

    def prompts(self, form: PromptForm) -> Iterator[Prompt]:
        return self._first.prompts(form)

    def warm_up(self) -> Content:
        return self._first.warm_up()

    def scripts(self, form: PromptForm) -> Iterator[Script]:
        assert isinstance(self.source.turns, int)
        first, later = (
            zip(each.prompts(form), each.lengths(form), strict=False)
            for each in (self._first, self._later)
        )
        for number, opening in enumerate(first):
            drawn = [opening, *islice(later, self.source.turns - 1)]
            turns = tuple(
                UserTurn(_as_form(prompt, form), length.input_len, length.output_len, think_s)
                for (prompt, length), think_s in zip(drawn, self._think_times(number), strict=False)
            )
            yield Script(turns, opening[1].shared_len)


def _as_form(prompt: Prompt, form: PromptForm) -> Prompt:
    if form == "messages" and isinstance(prompt, str):
        return [Message("user", prompt).for_api()]
    return prompt


class FileConversations(Conversations, _FileRows):
    """The conversations of a file.

    The answers in the file only say how long those of the server are. `input_len` of the workload
    is the longest prompt with its history.
    """

    @property
    def longest(self) -> int | None:
        return self.workload.input_len

    @property
    def keys(self) -> Mapping[str, Any]:
        # Other trials play the same rows: vLLM must not find those in its prefix cache.
        return {**super().keys, "cache_salt": self.salt}

    def lengths(self, form: PromptForm) -> Iterator[RequestLengths]:
        played = (script.turns for script in self.scripts(form) if script.turns)
        return (RequestLengths(turns[0].input_len, turns[0].output_len) for turns in played)

    def prompts(self, form: PromptForm) -> Iterator[Prompt]:
        return (script.turns[0].prompt for script in self.scripts(form) if script.turns)

    def scripts(self, form: PromptForm) -> Iterator[Script]:
        tokenizer = _open_tokenizer(self.tokenizer)
        starts = SharedStarts()
        for number, row in enumerate(self._draw_order()):
            turns = _encode_turns(row, self.workload, tokenizer, form)
            if isinstance(turns, str):
                if self.source.on_bad_rows != "skip":
                    raise LoadError(_refusal(self._path, row, turns))
                yield Script(())
                continue
            thinks = self._think_times(number)
            yield Script(
                tuple(
                    UserTurn(
                        _sent_as(each, form),
                        each.lengths.input_len,
                        each.lengths.output_len,
                        next(thinks),
                    )
                    for each in turns
                ),
                starts.add(turns[0].ids),
            )


def _sent_as(turn: _Encoded, form: PromptForm) -> Prompt:
    if form == "ids":
        return turn.ids
    return turn.row.text if form == "text" else [each.for_api() for each in turn.row.messages]


def _encode_turns(
    row: Conversation, workload: Workload, tokenizer: TextTokenizer, form: PromptForm
) -> list[_Encoded] | str:
    """The turns of a row, each with its own tokens only, or why it cannot be sent.

    With `on_bad_rows: skip`, only its first turn must fit: later ones may be cut.
    """
    source = workload.source or Source()
    found: list[_Encoded] = []
    history = 0
    for number, turn in enumerate(row.user_turns(None if source.turns == "all" else source.turns)):
        encoded = _encode(turn, workload, tokenizer, form)
        if isinstance(encoded, str):
            return f"turn {number + 1} {encoded}" if number else encoded
        if number and form == "ids":
            ids = tokenizer.encode(f"{SEPARATOR}{turn.text}").ids
            lengths = encoded.lengths._replace(input_len=len(ids))
            encoded = encoded._replace(ids=ids, lengths=lengths)
        history += encoded.lengths.input_len
        if history > workload.input_len and source.on_bad_rows != "skip":
            return (
                f"turn {number + 1} has {history} prompt tokens with its history, and input_len "
                f"allows {workload.input_len}"
            )
        history += encoded.lengths.output_len
        found.append(encoded)
    return found


def check_lengths(path: Path, workload: Workload, tokenizer: Path) -> None:
    """Raise LoadError if a row of a file is too long, or too few are usable for the workload.

    Reads every text that can be too long, so that this is known before anything starts.
    """
    source, opened = workload.source or Source(), open_tokenizer(tokenizer)
    rows = read_conversations(path, source.on_bad_rows).rows
    if source.has_turns:
        _check_turns(path, rows, workload, opened)
        return
    left_out = 0
    for row in rows:
        # No token has less than a byte; some tokenizers add one.
        is_short = 0 < len(row.text.encode()) < workload.input_len
        if is_short and (row.output_tokens or 0) <= workload.output_len:
            continue
        encoded = _encode(row, workload, opened, "ids")
        if isinstance(encoded, str):
            if source.on_bad_rows != "skip":
                raise LoadError(_refusal(path, row, encoded))
            left_out += 1
    if len(rows) - left_out < (workload.requests or 1):
        raise LoadError(_shortage(path, len(rows) - left_out, workload))


def _check_turns(
    path: Path, rows: Sequence[Conversation], workload: Workload, tokenizer: TextTokenizer
) -> None:
    """As `check_lengths`, for rows that are conversations."""
    usable = 0
    for row in rows:
        turns = _encode_turns(row, workload, tokenizer, "ids")
        if isinstance(turns, str):
            if (workload.source or Source()).on_bad_rows != "skip":
                raise LoadError(_refusal(path, row, turns))
            continue
        usable += len(turns)
    if usable < (workload.requests or 1):
        raise LoadError(_shortage(path, usable, workload, "user turn"))


def _open_tokenizer(tokenizer: Path | None) -> TextTokenizer:
    if tokenizer is None:
        raise LoadError(
            "Counting the tokens of a file's texts needs a tokenizer. Name the folder of the "
            "model's tokenizer.json as `tokenizer`."
        )
    try:
        return open_tokenizer(tokenizer)
    except ModelError as error:
        raise LoadError(str(error)) from error


def _encode(
    row: Conversation, workload: Workload, tokenizer: TextTokenizer, form: PromptForm
) -> _Encoded | str:
    """The row as a request, or why it is none."""
    if form == "messages":
        ids = [each for message in row.messages for each in tokenizer.encode(message.text).ids]
    else:
        ids = tokenizer.encode(row.text).ids
    if not 1 <= len(ids) <= workload.input_len:
        return f"has {len(ids)} prompt tokens, and input_len allows 1 to {workload.input_len}"
    output_len = workload.output_len
    if row.output_tokens is not None:
        output_len = row.output_tokens
    elif row.answer is not None:
        output_len = min(max(1, len(tokenizer.encode(row.answer).ids)), output_len)
    if output_len > workload.output_len:
        return f"has {output_len} output_tokens, and output_len allows {workload.output_len}"
    return _Encoded(row, ids, RequestLengths(len(ids), output_len))


def _refusal(path: Path, row: Conversation, problem: str) -> str:
    return (
        f"{path}: {row.place}: {problem}. Raise that key, shorten the row, or leave such rows out "
        "with `on_bad_rows: skip` under `workload.source`."
    )


def _shortage(path: Path, usable: int, workload: Workload, what: str = "usable row") -> str:
    return (
        f"{path}: has {pluralize(usable, what)}, and `{workload.cell}` needs "
        f"{workload.requests or 1}: no row is sent twice. Lower `concurrency` or "
        "`requests_per_user`, or add rows."
    )
