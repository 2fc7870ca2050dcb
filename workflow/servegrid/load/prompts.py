"""Prompts of exactly so many tokens: running text as token ids, reproducible and distinct.

The text is the corpus beside this module, English and French prose written for servegrid. Ids
are sent instead of text because a text that was cut to N tokens need not have N tokens when
it is tokenized again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from tokenizers import Tokenizer

from servegrid.errors import LoadError
from servegrid.grid import Load

DISTINCT_WITHIN = 16
"""No two distinct prompts of a load begin with the same so many tokens: the smallest block that
vLLM's prefix cache keeps."""

ORDINARY_IDS = range(1_000, 30_000)
"""Ids that are ordinary text in every customary vocabulary: control and byte tokens lie below
(up to 1000 of them), and the smallest vocabularies in use end at 32,000."""

_OPENING = 4
_DRAWS_PER_PROMPT = 20


def make(load: Load, count: int, tokenizer: Path | None, salt: str) -> list[list[int]]:
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
    rng = random.Random(f"{load.seed}/{salt}")
    if tokenizer is None:
        endless = _random_ids(rng, load.input_len)
    else:
        endless = _running_text(rng, load.input_len, *_tokenized_corpus(tokenizer))
    if load.prompts == "identical":
        return [next(endless)] * count
    prompts: dict[tuple[int, ...], list[int]] = {}
    for drawn, prompt in enumerate(endless):
        if len(prompts) == count:
            break
        if drawn == _DRAWS_PER_PROMPT * count:
            raise LoadError(
                f"input_len {load.input_len}: there are not {count} distinct prompts that short. "
                "Ask for longer prompts, fewer requests, or identical prompts."
            )
        prompts.setdefault(tuple(prompt[:DISTINCT_WITHIN]), prompt)
    return list(prompts.values())


def _random_ids(rng: random.Random, length: int) -> Iterator[list[int]]:
    while True:
        for first in rng.sample(ORDINARY_IDS, len(ORDINARY_IDS)):
            yield [first, *rng.choices(ORDINARY_IDS, k=length - 1)]


def _running_text(
    rng: random.Random, length: int, ids: list[int], word_starts: list[int]
) -> Iterator[list[int]]:
    places = {ids[start]: start for start in rng.sample(word_starts, len(word_starts))}
    enough = ids * (2 + length // len(ids))
    while True:
        for opening in rng.sample(list(places.values()), len(places)):
            text = rng.choice(word_starts)
            prompt = enough[opening : opening + _OPENING] + enough[text : text + length]
            yield prompt[:length]


def _tokenized_corpus(tokenizer: Path) -> tuple[list[int], list[int]]:
    """The corpus as ids, and the places among them at which a word starts."""
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
    starts = [
        place for place, (start, end) in enumerate(encoded.offsets) if _is_word(text, start, end)
    ]
    if not starts:
        raise LoadError(f"{file}: this tokenizer makes no words of plain English and French.")
    return encoded.ids, starts


def _is_word(text: str, start: int, end: int) -> bool:
    """Whether the token of that place begins a word; its own leading space may belong to it."""
    token = text[start:end].lstrip()
    begin = end - len(token)
    return token[:1].isalpha() and (begin == 0 or text[begin - 1].isspace())


def corpus() -> str:
    """The whole corpus, English before French."""
    folder = resources.files("servegrid.load") / "corpus"
    return "\n\n".join(
        (folder / name).read_text(encoding="utf-8").strip() for name in ("en.txt", "fr.txt")
    )
