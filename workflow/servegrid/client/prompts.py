"""Prompts with an exact number of tokens: natural text, reproducible and distinct.

The text is the corpus in this package, English and French prose written for servegrid. Prompts are
sent as token ids if the server accepts them, because a text cut after N tokens need not have N
tokens when it is tokenized again. Otherwise they are texts that do have N tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from itertools import islice, repeat
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from servegrid.errors import LoadError, ModelError
from servegrid.study.grid import Workload
from servegrid.study.tokenizer import TextTokenizer, open_tokenizer

DISTINCT_TOKENS = 16
"""Two distinct prompts differ within this many tokens: the smallest block of vLLM's prefix
cache."""

ORDINARY_IDS = range(1_000, 30_000)
"""Ids that are ordinary text in every usual vocabulary. Control and byte tokens have smaller ids
(up to 1000 of them), and the smallest vocabularies in use have 32,000 ids."""

PromptForm = Literal["ids", "text", "messages"]
"""How a prompt is sent: as token ids, as text, or as the user's message in a chat."""
Prompt = list[int] | str | list[Mapping[str, str]]
"""Token ids, text, or OpenAI's messages."""

_OPENING_TOKENS = 4
_DRAWS_PER_PROMPT, _FIRST_PROMPTS = 20, 50
_EXTRA_CHARACTERS = 2
"""Factor on the corpus' mean characters per token, so that a text is long enough to be cut."""

_PromptType = TypeVar("_PromptType", list[int], str)
_Sliced = TypeVar("_Sliced", list[int], str)


def make_token_prompts(
    workload: Workload, count: int, tokenizer: Path | None, salt: str
) -> list[list[int]]:
    """`count` prompts of `workload.input_len` token ids each.

    The same seed, salt, length and tokenizer give the same prompts on every machine, and the
    first prompts do not depend on `count`. `tokenizer` is a folder or a file that
    `study.tokenizer` reads. Without a tokenizer, random ids from ORDINARY_IDS are used.

    Distinct prompts must share no prefix that a server could cache. Each starts with a few tokens
    of text from one position of the corpus and continues with text from another. The first tokens
    all differ as long as the corpus has enough words (about 2,000). After that the rest of the
    opening still differs, also between measurements with different salts.

    Raises LoadError if the tokenizer cannot be used, or if the prompts are too short to be
    distinct.
    """
    lengths = repeat(workload.input_len)
    return list(islice(_token_prompts(workload, tokenizer, salt, lengths), count))


def iterate_prompts(
    workload: Workload,
    form: PromptForm,
    tokenizer: Path | None,
    salt: str,
    lengths: Iterable[int] | None = None,
) -> Iterator[list[int] | str]:
    """The prompts of `make_token_prompts` or `make_text_prompts`, one for each of `lengths`.

    Without `lengths`, all have `workload.input_len` tokens, and there is no end. Raises LoadError
    as they do; for prompts that are too short, when no further one is found.
    """
    wanted = repeat(workload.input_len) if lengths is None else lengths
    make = _token_prompts if form == "ids" else _text_prompts
    return make(workload, tokenizer, salt, wanted)


def _token_prompts(
    workload: Workload, tokenizer: Path | None, salt: str, lengths: Iterable[int]
) -> Iterator[list[int]]:
    rng = random.Random(f"{workload.seed}/{salt}")
    if tokenizer is None:
        return _select_distinct(_random_ids(rng), lengths, workload)
    return _select_distinct(_corpus_ids(rng, _tokenize_corpus(tokenizer)), lengths, workload)


def make_text_prompts(
    workload: Workload, count: int, tokenizer: Path | None, salt: str
) -> list[str]:
    """`count` prompts as text that has `workload.input_len` tokens, tokenized on its own.

    Otherwise as `make_token_prompts`. No text starts or ends with white space, which chat
    templates strip. Also raises LoadError without a tokenizer.
    """
    return list(islice(_text_prompts(workload, tokenizer, salt, repeat(workload.input_len)), count))


def _text_prompts(
    workload: Workload, tokenizer: Path | None, salt: str, lengths: Iterable[int]
) -> Iterator[str]:
    if tokenizer is None:
        raise LoadError(
            "Prompts are sent as text, so counting their tokens needs a tokenizer. Name the "
            "model's tokenizer.json with --tokenizer, or in a study as `tokenizer`."
        )
    rng = random.Random(f"{workload.seed}/{salt}")
    corpus = _tokenize_corpus(tokenizer)
    return _select_distinct(_corpus_texts(rng, corpus), lengths, workload)


_Draw = Callable[[int], tuple[list[int], _PromptType] | None]
"""Draws a prompt of so many tokens, with its ids. None: this draw made no prompt."""


def _select_distinct(
    draw: _Draw[_PromptType], lengths: Iterable[int], workload: Workload
) -> Iterator[_PromptType]:
    """A distinct prompt for each of `lengths`."""
    # Hashes need little memory. Two prompts with one hash only make the second one be left out.
    selected: set[int] = set()
    draws = 0
    for length in lengths:
        while True:
            if draws > _DRAWS_PER_PROMPT * (len(selected) + _FIRST_PROMPTS):
                raise _too_short(length, len(selected))
            draws += 1
            drawn = draw(length)
            if drawn is None or (start := hash(tuple(drawn[0][:DISTINCT_TOKENS]))) in selected:
                continue
            selected.add(start)
            break
        if workload.prompts == "identical":
            yield from repeat(drawn[1])
        yield drawn[1]


def _too_short(length: int, selected: int) -> LoadError:
    return LoadError(
        f"input_len {length}: more than {selected} distinct prompts of this "
        "length do not exist. Use longer prompts, fewer requests, or identical prompts."
    )


def _random_ids(rng: random.Random) -> _Draw[list[int]]:
    firsts = _endless_samples(rng, ORDINARY_IDS)

    def draw(length: int) -> tuple[list[int], list[int]]:
        prompt = [next(firsts), *rng.choices(ORDINARY_IDS, k=length - 1)]
        return prompt, prompt

    return draw


_Item = TypeVar("_Item")


def _endless_samples(rng: random.Random, items: Sequence[_Item]) -> Iterator[_Item]:
    """All items in a random order, again and again."""
    while True:
        yield from rng.sample(items, len(items))


class _Corpus(NamedTuple):
    """The corpus with its token ids, the tokens' offsets in the text, and where words start."""

    tokenizer: TextTokenizer
    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    word_starts: list[int]


def _draw_positions(rng: random.Random, corpus: _Corpus) -> Iterator[tuple[int, int]]:
    """For each prompt, the token numbers where its opening and where its text starts."""
    starts = corpus.word_starts
    openings = {corpus.ids[start]: start for start in rng.sample(starts, len(starts))}
    while True:
        for opening in rng.sample(list(openings.values()), len(openings)):
            yield opening, rng.choice(starts)


def _cycle(whole: _Sliced, start: int, length: int) -> _Sliced:
    """`length` items of `whole` from `start` on; after its end it starts again."""
    found = whole[start : start + length]
    while len(found) < length:
        found += whole[: length - len(found)]
    return found


def _corpus_ids(rng: random.Random, corpus: _Corpus) -> _Draw[list[int]]:
    positions = _draw_positions(rng, corpus)

    def draw(length: int) -> tuple[list[int], list[int]]:
        opening, text = next(positions)
        prompt = _cycle(corpus.ids, opening, _OPENING_TOKENS) + _cycle(corpus.ids, text, length)
        return prompt[:length], prompt[:length]

    return draw


def _corpus_texts(rng: random.Random, corpus: _Corpus) -> _Draw[str]:
    positions = _draw_positions(rng, corpus)
    endless = f"{corpus.text}\n\n"

    def draw(length: int) -> tuple[list[int], str] | None:
        opening, text = next(positions)
        # Most texts of so many characters have more than `length` tokens.
        characters = _EXTRA_CHARACTERS * math.ceil(length * len(corpus.text) / len(corpus.ids))
        last = min(opening + _OPENING_TOKENS, len(corpus.offsets)) - 1
        begin, end = corpus.offsets[opening][0], corpus.offsets[last][1]
        following = _cycle(endless, corpus.offsets[text][0], characters).lstrip()
        return _truncate(corpus.tokenizer, f"{endless[begin:end].strip()} {following}", length)

    return draw


def _truncate(tokenizer: TextTokenizer, text: str, length: int) -> tuple[list[int], str] | None:
    """The first `length` tokens of `text`, as ids and as text. None if that does not work.

    A text that was cut at the end of a token need not have the same tokens on its own.
    """
    offsets = tokenizer.encode(text).offsets
    if len(offsets) < length:
        return None
    prefix = text[: offsets[length - 1][1]]
    ids = tokenizer.encode(prefix).ids
    return (ids, prefix) if len(ids) == length and prefix == prefix.strip() else None


def check_tokenizer(tokenizer: Path) -> None:
    """Raise ModelError if prompts cannot be made with this tokenizer."""
    try:
        _tokenize_corpus(tokenizer)
    except LoadError as error:
        if isinstance(error.__cause__, ModelError):
            raise error.__cause__ from None
        raise ModelError(str(error)) from None


def _tokenize_corpus(tokenizer: Path) -> _Corpus:
    text = load_corpus()
    try:
        loaded = open_tokenizer(tokenizer)
        encoded = loaded.encode(text)
    except ModelError as error:
        raise LoadError(str(error)) from error
    starts = [
        number
        for number, (start, end) in enumerate(encoded.offsets)
        if _starts_word(text, start, end)
    ]
    if not starts:
        raise LoadError(
            f"{tokenizer}: this tokenizer has no tokens for English and French words. Use the "
            "model's own tokenizer."
        )
    return _Corpus(loaded, text, encoded.ids, encoded.offsets, starts)


def _starts_word(text: str, start: int, end: int) -> bool:
    """Whether the token at these offsets starts a word. It may include the space before it."""
    token = text[start:end].lstrip()
    begin = end - len(token)
    return token[:1].isalpha() and (begin == 0 or text[begin - 1].isspace())


def load_corpus() -> str:
    """The whole corpus, English before French."""
    folder = resources.files("servegrid.client") / "corpus"
    return "\n\n".join(
        (folder / name).read_text(encoding="utf-8").strip() for name in ("en.txt", "fr.txt")
    )
