"""Opens the tokenizer of a deployment, in every form that vLLM reads without the model's own code.

`tokenizer.json` is read by `tokenizers`, `tekken.json` by mistral-common, and everything else, such
as a SentencePiece or tiktoken model or a vocab.json with merges, by transformers. The last two are
imported only if a tokenizer needs them.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from servegrid.errors import ModelError

TOKENIZER_JSON, TEKKEN_JSON = "tokenizer.json", "tekken.json"
FOR_TRANSFORMERS = ("tokenizer.model", "*.tiktoken", "tiktoken.model", "vocab.json", "vocab.txt")
"""Files of a tokenizer that transformers reads, or converts."""
SAMPLE = "The quick brown fox costs 4.50 €. Le cœur a ses raisons."

_NAME_ANOTHER = f"name a folder with the model's {TOKENIZER_JSON} as `tokenizer`."
_GGUF = b"GGUF"
_LFS_POINTER = b"version https://git-lfs"
_MAX_PENDING = 16
"""No character and no byte sequence that a tokenizer keeps together has more tokens."""


class TokenizerError(ModelError):
    """A tokenizer cannot be used: the problem, and the remedy."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}. {remedy}")
        self.problem, self.remedy = problem, remedy


class MissingPackageError(TokenizerError):
    """The package that reads this tokenizer is not installed in this Python."""


class Encoded(NamedTuple):
    """Token ids, and where in the text each token starts and ends, in characters.

    If several tokens make one character, only the last one has a length.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


class TextTokenizer(Protocol):
    """A tokenizer that adds no special tokens and truncates nothing."""

    def encode(self, text: str) -> Encoded:
        """The tokens of `text`."""
        ...


def open_tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer in a folder or a file. Its remote code, if it has any, is not run.

    Raises MissingPackageError if a package is missing here, and TokenizerError, with the remedy, if
    there is no tokenizer or it cannot be read.
    """
    file = _find_file(path)
    _check_content(file)
    try:
        if file.name == TEKKEN_JSON:
            return _open_tekken(file)
        if any(file.match(pattern) for pattern in FOR_TRANSFORMERS):
            return _open_with_transformers(file.parent)
        return _open_json(file)
    except TokenizerError:
        raise
    except Exception as error:  # The libraries raise nothing more specific.
        raise TokenizerError(
            f"{file}: not a tokenizer ({_first_line(error)})",
            f"Download it again, or {_NAME_ANOTHER}",
        ) from error


def check_tokenizer(path: Path) -> None:
    """Open a tokenizer and encode a text. Raises as `open_tokenizer`."""
    try:
        encoded = open_tokenizer(path).encode(SAMPLE)
    except TokenizerError:
        raise
    except Exception as error:
        raise TokenizerError(
            f"{path}: this tokenizer cannot encode text ({_first_line(error)})",
            _NAME_ANOTHER[0].upper() + _NAME_ANOTHER[1:],
        ) from error
    if not encoded.ids:
        raise TokenizerError(
            f"{path}: this tokenizer has no tokens for a sentence",
            "Name the model's own tokenizer.",
        )


def _find_file(path: Path) -> Path:
    """The file that decides how the tokenizer is read. Raises TokenizerError."""
    if not path.is_dir():
        return path
    names = (TOKENIZER_JSON, TEKKEN_JSON, *FOR_TRANSFORMERS)
    try:
        files = sorted(path.iterdir())
    except OSError as error:
        raise TokenizerError(
            f"{path}: cannot be read ({error.strerror})", "Correct the permissions."
        ) from error
    # Path.glob leaves out links that lead nowhere.
    for name in names:
        for file in files:
            if fnmatch.fnmatch(file.name, name):
                return file
    for file in files:
        if file.suffix == ".gguf":
            raise _is_gguf(file)
    raise TokenizerError(
        f"{path / TOKENIZER_JSON}: this file does not exist, and the folder has no other tokenizer "
        f"({TEKKEN_JSON}, {', '.join(FOR_TRANSFORMERS)})",
        "Name a folder with the model's tokenizer as `tokenizer`.",
    )


def _check_content(file: Path) -> None:
    """Raise TokenizerError if the file cannot be read, or is something else than a tokenizer."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
    except FileNotFoundError as error:
        if file.is_symlink():  # as in an incomplete Hugging Face cache
            target = file.readlink()
            raise TokenizerError(
                f"{file}: this link leads to {target}, which does not exist", "Download it again."
            ) from error
        raise TokenizerError(f"{file}: this file does not exist", "Correct the path.") from error
    except OSError as error:
        raise TokenizerError(
            f"{file}: cannot be read ({error.strerror})",
            "Correct the permissions, or download it again.",
        ) from error
    if start.startswith(_GGUF):
        raise _is_gguf(file)
    if start.startswith(_LFS_POINTER):
        raise TokenizerError(
            f"{file}: is a pointer of Git LFS, not the tokenizer",
            "Run `git lfs pull` in its folder.",
        )


def _is_gguf(file: Path) -> TokenizerError:
    return TokenizerError(
        f"{file}: servegrid does not read the tokenizer inside a GGUF file",
        f"Add `tokenizer` to the deployment: a folder with {TOKENIZER_JSON}, or the Hugging Face "
        "name (`org/name`) of the model that this file was made from.",
    )


class _FromTokenizers:
    """A tokenizer of the package `tokenizers`."""

    def __init__(self, tokenizer: Any) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    def encode(self, text: str) -> Encoded:
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return Encoded(encoded.ids, encoded.offsets)


class _FromFunctions:
    """A tokenizer that knows no offsets: each is found by decoding the tokens again."""

    def __init__(
        self, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str]
    ) -> None:
        self._encode, self._decode = encode, decode

    def encode(self, text: str) -> Encoded:
        ids = self._encode(text)
        return Encoded(ids, find_offsets(text, ids, self._decode))


def find_offsets(
    text: str, ids: Sequence[int], decode: Callable[[list[int]], str]
) -> list[tuple[int, int]]:
    """The offsets in `text` of its tokens. Raises TokenizerError if they do not spell the text."""
    offsets: list[tuple[int, int]] = []
    start, pending = 0, list[int]()
    for number in ids:
        pending.append(number)
        piece = decode(pending)
        if piece and text.startswith(piece, start):
            end = start + len(piece)
            offsets += [(start, start)] * (len(pending) - 1) + [(start, end)]
            start, pending = end, []
        elif len(pending) == _MAX_PENDING:
            break
    if start < len(text) or pending:
        raise TokenizerError(
            f"This tokenizer changes text: from character {start} on, its tokens do not give the "
            "text back",
            _NAME_ANOTHER[0].upper() + _NAME_ANOTHER[1:],
        )
    return offsets


def _open_json(file: Path) -> TextTokenizer:
    from tokenizers import Tokenizer

    return _FromTokenizers(Tokenizer.from_file(str(file)))


def _open_tekken(file: Path) -> TextTokenizer:
    try:
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    except ImportError as error:
        raise _missing(file, "mistral-common") from error
    tekken = Tekkenizer.from_file(file)
    return _FromFunctions(functools.partial(tekken.encode, bos=False, eos=False), tekken.decode)


def _open_with_transformers(folder: Path) -> TextTokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise _missing(folder, "transformers") from error
    try:
        loaded = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except ImportError as error:  # such as sentencepiece or tiktoken
        raise _missing(folder, _first_line(error)) from error
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise TokenizerError(
                f"{folder}: this tokenizer is Python code of the model, which servegrid does not "
                "run",
                f"Name a folder with a {TOKENIZER_JSON} of the same vocabulary as `tokenizer`.",
            ) from error
        raise
    if loaded.is_fast:
        return _FromTokenizers(loaded.backend_tokenizer)
    return _FromFunctions(functools.partial(loaded.encode, add_special_tokens=False), loaded.decode)


def _missing(path: Path, package: str) -> MissingPackageError:
    return MissingPackageError(
        f"{path}: this tokenizer needs a package that is not installed here: {package}",
        f"Install it, or {_NAME_ANOTHER}",
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
