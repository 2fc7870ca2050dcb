"""Prompts of exactly so many tokens: running text, reproducible and distinct.

The text is the corpus beside this module, English and French prose written for servegrid. It is
sent as token ids where the server takes them, because a text that was cut to N tokens need not
have N tokens when it is tokenized again; else as texts that do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from tokenizers import Tokenizer

from servegrid.errors import LoadError
from servegrid.study.grid import Workload

DISTINCT_WITHIN = 16
"""No two distinct prompts of a load begin with the same so many tokens: the smallest block that
vLLM's prefix cache keeps."""

ORDINARY_IDS = range(1_000, 30_000)
"""Ids that are ordinary text in every customary vocabulary: control and byte tokens lie below
(up to 1000 of them), and the smallest vocabularies in use end at 32,000."""

Form = Literal["ids", "text", "messages"]
"""How a prompt is sent: as token ids, as text, or as what a user says in a chat."""
Prompt = list[int] | str
"""Token ids, or text."""

_OPENING = 4
_DRAWS_PER_PROMPT = 20
_MORE_CHARACTERS = 2
"""Times the corpus' mean characters per token: a text that is long enough to be cut."""

_Made = TypeVar("_Made", list[int], str)


def make(workload: Workload, count: int, tokenizer: Path | None, salt: str) -> list[list[int]]:
    """`count` prompts of `load.input_len` token ids each.

    The same load.seed, salt, length and tokenizer give the same prompts on every machine, and
    the first of them do not depend on `count`. `tokenizer` is a folder with a tokenizer.json,
    or that file; without one the ids are drawn at random from ORDINARY_IDS.

    Distinct prompts must have no beginning in common that a server could keep: they open with
    a few tokens of running text from one place and go on with text from another. Their first
    tokens are all different for as long as the corpus has words for it (some 2,000), and the
    rest of the opening still differs, also between loads with different salts.

    Raises LoadError where the tokenizer cannot be used, or where the prompts are too short to
    be distinct.
    """
    rng = random.Random(f"{workload.seed}/{salt}")
    if tokenizer is None:
        endless = _random_ids(rng, workload.input_len)
    else:
        endless = _running_text(rng, workload.input_len, _tokenized_corpus(tokenizer))
    return _chosen(((prompt, prompt) for prompt in endless), workload, count)


def make_texts(workload: Workload, count: int, tokenizer: Path | None, salt: str) -> list[str]:
    """`count` prompts as text that has `load.input_len` tokens each, tokenized by itself.

    As `make` says of token ids. None begins or ends with white space, which templates strip.
    Raises LoadError also where there is no tokenizer to count with.
    """
    if tokenizer is None:
        raise LoadError(
            "Prompts are sent as text here, and only a tokenizer tells how many tokens a text "
            "has. Name the model's tokenizer.json."
        )
    rng = random.Random(f"{workload.seed}/{salt}")
    corpus = _tokenized_corpus(tokenizer)
    drawn = _running_characters(rng, workload.input_len, corpus)
    return _chosen(
        (_cut(corpus.tokenizer, text, workload.input_len) for text in drawn), workload, count
    )


def _chosen(
    drawn: Iterable[tuple[list[int], _Made] | None], workload: Workload, count: int
) -> list[_Made]:
    """Of prompts with their ids as many as are wanted; None is a draw that gave no prompt."""
    wanted = 1 if workload.prompts == "identical" else count
    chosen: dict[tuple[int, ...], _Made] = {}
    for number, made in enumerate(drawn):
        if len(chosen) == wanted:
            break
        if number == _DRAWS_PER_PROMPT * wanted:
            raise LoadError(
                f"input_len {workload.input_len}: there are not {count} distinct prompts that short. "
                "Ask for longer prompts, fewer requests, or identical prompts."
            )
        if made is not None:
            ids, prompt = made
            chosen.setdefault(tuple(ids[:DISTINCT_WITHIN]), prompt)
    prompts = list(chosen.values())
    return prompts * count if workload.prompts == "identical" else prompts


def _random_ids(rng: random.Random, length: int) -> Iterator[list[int]]:
    while True:
        for first in rng.sample(ORDINARY_IDS, len(ORDINARY_IDS)):
            yield [first, *rng.choices(ORDINARY_IDS, k=length - 1)]


class _Corpus(NamedTuple):
    """The corpus, its tokens' ids and places in the text, and which of them begin words."""

    tokenizer: Tokenizer
    text: str
    ids: list[int]
    places: list[tuple[int, int]]
    word_starts: list[int]


def _drawn(rng: random.Random, corpus: _Corpus) -> Iterator[tuple[int, int]]:
    """For each prompt where its opening and where its text begins, as numbers of tokens."""
    starts = corpus.word_starts
    openings = {corpus.ids[start]: start for start in rng.sample(starts, len(starts))}
    while True:
        for opening in rng.sample(list(openings.values()), len(openings)):
            yield opening, rng.choice(starts)


def _running_text(rng: random.Random, length: int, corpus: _Corpus) -> Iterator[list[int]]:
    enough = corpus.ids * (2 + length // len(corpus.ids))
    for opening, text in _drawn(rng, corpus):
        prompt = enough[opening : opening + _OPENING] + enough[text : text + length]
        yield prompt[:length]


def _running_characters(rng: random.Random, length: int, corpus: _Corpus) -> Iterator[str]:
    """Texts of more than `length` tokens, most of them."""
    characters = _MORE_CHARACTERS * math.ceil(length * len(corpus.text) / len(corpus.ids))
    enough = f"{corpus.text}\n\n" * (2 + characters // len(corpus.text))
    for opening, text in _drawn(rng, corpus):
        last = min(opening + _OPENING, len(corpus.places)) - 1
        begin, end = corpus.places[opening][0], corpus.places[last][1]
        start = corpus.places[text][0]
        following = enough[start : start + characters].lstrip()
        yield f"{enough[begin:end].strip()} {following}"


def _cut(tokenizer: Tokenizer, text: str, length: int) -> tuple[list[int], str] | None:
    """The beginning of `text` that has `length` tokens, with their ids; None where none has.

    A beginning that was cut at the end of a token need not have the same tokens by itself.
    """
    places = tokenizer.encode(text, add_special_tokens=False).offsets
    if len(places) < length:
        return None
    beginning = text[: places[length - 1][1]]
    ids = tokenizer.encode(beginning, add_special_tokens=False).ids
    return (ids, beginning) if len(ids) == length and beginning == beginning.strip() else None


def _tokenized_corpus(tokenizer: Path) -> _Corpus:
    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if not file.is_file():
        raise LoadError(
            f"{file}: there is no such file. Name a folder with a tokenizer.json, "
            "or leave the tokenizer out: random token ids are then sent."
        )
    try:
        loaded = Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises nothing more specific.
        raise LoadError(f"{file}: not a tokenizer ({error}). Fetch it anew.") from error
    loaded.no_truncation()
    loaded.no_padding()
    text = corpus()
    encoded = loaded.encode(text, add_special_tokens=False)
    places = encoded.offsets
    starts = [number for number, (start, end) in enumerate(places) if _is_word(text, start, end)]
    if not starts:
        raise LoadError(f"{file}: this tokenizer makes no words of plain English and French.")
    return _Corpus(loaded, text, encoded.ids, places, starts)


def _is_word(text: str, start: int, end: int) -> bool:
    """Whether the token of that place begins a word; its own leading space may belong to it."""
    token = text[start:end].lstrip()
    begin = end - len(token)
    return token[:1].isalpha() and (begin == 0 or text[begin - 1].isspace())


def corpus() -> str:
    """The whole corpus, English before French."""
    folder = resources.files("servegrid.client") / "corpus"
    return "\n\n".join(
        (folder / name).read_text(encoding="utf-8").strip() for name in ("en.txt", "fr.txt")
    )
