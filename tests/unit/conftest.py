"""What holds for the unit tests."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from servegrid.client.prompts import load_corpus
from servegrid.report import figure_style, plots


@pytest.fixture(scope="session", autouse=True)
def figures_of_bundles_are_drawn_once() -> Iterator[None]:
    """Each bundle that is made or verified draws its figures: most of the time of these tests.

    The same figure of the same cells is drawn once, and its files are written again.
    """
    drawn: dict[str, list[bytes]] = {}
    save, figures = figure_style.save_figure, (plots.overview_figure, plots.deployment_figure)

    def postponed(draw: Callable[..., Any]) -> Callable[..., Any]:
        def figure(*arguments: Any) -> tuple[str, Callable[[], Any]]:
            key = hashlib.sha256(pickle.dumps((draw.__name__, arguments))).hexdigest()
            return key, lambda: draw(*arguments)

        return figure

    def save_once(figure: tuple[str, Callable[[], Any]], *paths: Path) -> None:
        key, draw = figure
        if key not in drawn:
            save(draw(), *paths)
            drawn[key] = [path.read_bytes() for path in paths]
        for path, content in zip(paths, drawn[key], strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure_style, "save_figure", save_once)
        for draw in figures:
            patch.setattr(plots, draw.__name__, postponed(draw))
        yield


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a tokenizer with one token per word of the corpus."""
    words = dict.fromkeys(re.findall(r"\w+|[^\w\s]+", load_corpus()))
    model = WordLevel({word: number for number, word in enumerate(["?", *words])}, unk_token="?")
    made = Tokenizer(model)
    made.pre_tokenizer = Whitespace()
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(file))
    return file
