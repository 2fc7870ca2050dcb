"""Prompts have an exact length, are reproducible, and differ in their first tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from servegrid.client import prompts
from servegrid.errors import LoadError
from servegrid.study.grid import Workload


def workload(**changes: object) -> Workload:
    given = {"protocol": "burst", "concurrency": 1, "input_len": 31, "output_len": 5, "requests": 1}
    return Workload(**(given | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with one id per word and punctuation mark of the corpus."""
    split = pre_tokenizers.Whitespace()
    words = sorted({word for word, _ in split.pre_tokenize_str(prompts.load_corpus())})
    vocabulary = {word: number for number, word in enumerate(["<unk>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = split
    made.enable_truncation(8)
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_every_prompt_has_the_requested_number_of_tokens(tokenizer: Path) -> None:
    for length in (1, 3, 4, 5, 296, 20_000):
        for kind in (tokenizer, tokenizer / "tokenizer.json", None):
            made = prompts.make_token_prompts(workload(input_len=length), 3, kind, "cell")
            assert [len(prompt) for prompt in made] == [length] * 3


def test_prompts_are_text_from_the_corpus(tokenizer: Path) -> None:
    (prompt,) = prompts.make_token_prompts(workload(input_len=200), 1, tokenizer, "cell")
    vocabulary = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    words = [vocabulary.id_to_token(number) for number in prompt[4:]]
    split = pre_tokenizers.Whitespace().pre_tokenize_str(prompts.load_corpus())
    corpus = [word for word, _ in split] * 2
    begins = [place for place, word in enumerate(corpus) if word == words[0]]
    assert any(corpus[place : place + len(words)] == words for place in begins)


def test_the_same_workload_and_salt_give_the_same_first_prompts_for_any_count(
    tokenizer: Path,
) -> None:
    for kind in (tokenizer, None):
        few = prompts.make_token_prompts(workload(), 5, kind, "cell")
        assert prompts.make_token_prompts(workload(), 50, kind, "cell")[:5] == few


def test_another_salt_or_seed_gives_other_prompts(tokenizer: Path) -> None:
    for kind in (tokenizer, None):
        made = [
            *prompts.make_token_prompts(workload(), 20, kind, "cell"),
            *prompts.make_token_prompts(workload(), 20, kind, "other"),
            *prompts.make_token_prompts(workload(seed=1), 20, kind, "cell"),
        ]
        assert len({tuple(prompt) for prompt in made}) == 60


def test_distinct_prompts_differ_in_their_first_tokens(tokenizer: Path) -> None:
    for kind in (tokenizer, None):
        made = prompts.make_token_prompts(workload(), 6_000, kind, "cell")
        assert len({tuple(prompt[:16]) for prompt in made}) == 6_000
        assert len({prompt[0] for prompt in made[:1_000]}) == 1_000


def test_prompts_can_be_identical(tokenizer: Path) -> None:
    first, *others = prompts.make_token_prompts(workload(prompts="identical"), 5, tokenizer, "cell")
    assert others == [first] * 4
    assert [first] == prompts.make_token_prompts(workload(), 1, tokenizer, "cell")


def test_random_ids_are_ordinary_tokens_of_small_vocabularies() -> None:
    made = prompts.make_token_prompts(workload(input_len=2_000), 10, None, "cell")
    ids = {number for prompt in made for number in prompt}
    assert min(ids) >= 1_000 and max(ids) < 30_000
    assert len(ids) > 10_000


def test_prompts_too_short_to_be_distinct_are_refused(tokenizer: Path) -> None:
    with pytest.raises(
        LoadError, match=r"input_len 1: more than \d+ distinct prompts of this length do not exist"
    ):
        prompts.make_token_prompts(workload(input_len=1), 6_000, tokenizer, "cell")


def test_a_missing_or_damaged_tokenizer_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"tokenizer\.json: this file does not exist"):
        prompts.make_token_prompts(workload(), 1, tmp_path, "cell")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(LoadError, match=r"tokenizer\.json: not a tokenizer"):
        prompts.make_token_prompts(workload(), 1, tmp_path, "cell")


def test_a_tokenizer_without_words_of_the_corpus_is_refused(tmp_path: Path) -> None:
    made = Tokenizer(models.BPE(vocab={"猫": 0}, merges=[]))
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(LoadError, match="no tokens for English and French words"):
        prompts.make_token_prompts(workload(), 1, tmp_path, "cell")


def test_the_corpus_has_enough_text_in_two_languages() -> None:
    assert len(prompts.load_corpus().split()) > 5_000
    assert "Every watt" in prompts.load_corpus() and "Chaque watt" in prompts.load_corpus()


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with few ids. Most words have several tokens, and a cut can change them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([prompts.load_corpus()], trainer)
    folder = tmp_path_factory.mktemp("pieces")
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_every_text_has_the_requested_number_of_tokens(tokenizer: Path, pieces: Path) -> None:
    for folder in (tokenizer, pieces):
        made = Tokenizer.from_file(str(folder / "tokenizer.json"))
        made.no_truncation()
        # Among 2000 texts are some that a careless cut would end in white space or retokenize.
        for length, count in ((1, 5), (3, 5), (31, 2000), (296, 5), (20_000, 5)):
            texts = prompts.make_text_prompts(workload(input_len=length), count, folder, "cell")
            assert {len(made.encode(text).ids) for text in texts} == {length}
            assert [text.strip() for text in texts] == texts


def test_texts_are_reproducible_and_distinct(pieces: Path) -> None:
    few = prompts.make_text_prompts(workload(), 5, pieces, "cell")
    many = prompts.make_text_prompts(workload(), 500, pieces, "cell")
    assert many[:5] == few and len(set(many)) == 500
    assert not set(many) & set(prompts.make_text_prompts(workload(), 500, pieces, "other"))
    same = prompts.make_text_prompts(workload(prompts="identical"), 3, pieces, "cell")
    assert same == few[:1] * 3
    with pytest.raises(
        LoadError, match=r"input_len 1: more than \d+ distinct prompts of this length do not exist"
    ):
        prompts.make_text_prompts(workload(input_len=1), 6_000, pieces, "cell")


def test_texts_come_from_the_corpus(tokenizer: Path) -> None:
    (text,) = prompts.make_text_prompts(workload(input_len=200), 1, tokenizer, "cell")
    _, begin, rest = text.partition(" ".join(text.split()[5:8]))
    assert begin + rest in prompts.load_corpus()


def test_text_prompts_need_a_tokenizer() -> None:
    with pytest.raises(LoadError, match=r"Name the model's tokenizer\.json"):
        prompts.make_text_prompts(workload(), 1, None, "cell")
