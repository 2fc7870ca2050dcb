"""Types of command-line arguments, which raise ArgumentTypeError, and an argument that recurs."""

from __future__ import annotations

import json
import math
import re
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from servegrid.study.limits import MAX_INTEGER, MAX_NUMBER, MIN_NUMBER


def add_directory(parser: ArgumentParser) -> None:
    """Add `--directory`, the folder with the results of a study."""
    parser.add_argument(
        "--directory",
        type=folder,
        default=Path(),
        metavar="DIR",
        help="working directory of the study, as for snakemake: it contains results/, and paths in "
        "the study are relative to it; default: this folder",
    )


def folder(text: str) -> Path:
    """The path of a folder, which need not exist."""
    path = Path(text)
    try:
        is_other = path.exists() and not path.is_dir()
    except OSError as error:
        raise ArgumentTypeError(f"{text!r} cannot be used: {error.strerror}") from None
    if is_other:
        raise ArgumentTypeError(f"{text!r} is not a folder")
    return path


def positive_int(text: str) -> int:
    # Digits first: Python converts no longer text.
    if not text.isdecimal() or len(text) > 100 or not 1 <= int(text) <= MAX_INTEGER:
        raise ArgumentTypeError(f"{text!r} is not an integer above 0, at most {MAX_INTEGER:,}")
    return int(text)


def non_negative_int(text: str) -> int:
    return 0 if text == "0" else positive_int(text)


def positive_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number > 0:
        raise ArgumentTypeError(f"{text!r} is not a number above 0")
    if not MIN_NUMBER <= number <= MAX_NUMBER:
        raise ArgumentTypeError(f"{text!r} is not between {MIN_NUMBER:g} and {MAX_NUMBER:g}")
    return number


def non_negative_float(text: str) -> float:
    return 0.0 if text == "0" else positive_float(text)


def fraction(text: str) -> float:
    """A number above 0, at most 1."""
    number = positive_float(text)
    if number > 1:
        raise ArgumentTypeError(f"{text!r} is above 1; give a number above 0, at most 1")
    return number


def fraction_below_one(text: str) -> float:
    """A probability that a queueing model can reach: above 0, below 1."""
    number = fraction(text)
    if number == 1:
        raise ArgumentTypeError(f"{text!r} cannot be guaranteed; give a number below 1")
    return number


def prompt_mix(text: str) -> dict[int, float]:
    """
    >>> prompt_mix("31:3,119:1")
    {31: 3.0, 119: 1.0}
    """
    parts = [part.partition(":") for part in text.split(",")]
    if not all(share for _, _, share in parts):
        raise ArgumentTypeError(f"{text!r} must be LENGTH:SHARE,…, such as 31:3,119:1")
    mix = {positive_int(length): positive_float(share) for length, _, share in parts}
    if len(mix) < len(parts):
        raise ArgumentTypeError(f"{text!r} has a length twice; give each length one share")
    return mix


def server_url(text: str) -> str:
    """A URL that can be recorded. An error about a secret does not show it."""
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        raise ArgumentTypeError("this is not a URL: http://…, https://… or unix:///path") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ArgumentTypeError(
            "the URL has a user, a password or a query. URLs are recorded: give the key with "
            "--api-key-env, and the URL without it"
        )
    target = parts.path if parts.scheme == "unix" else parts.hostname
    if parts.scheme not in ("http", "https", "unix") or not target:
        raise ArgumentTypeError(f"{text!r} is not a URL: http://…, https://… or unix:///path")
    return text


def json_object(text: str) -> dict[str, Any]:
    """
    >>> json_object('{"top_k": 1}')
    {'top_k': 1}
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ArgumentTypeError(f'{text!r} is not a JSON object such as {{"top_k": 1}}')
    return value


def header(text: str) -> tuple[str, str]:
    """
    >>> header("X-Tenant: lab")
    ('X-Tenant', 'lab')
    """
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise ArgumentTypeError(f"{text!r} does not have the form 'Name: value'")
    return name.strip(), value.strip()


def salt(text: str) -> str:
    if not re.fullmatch(r"[\w./-]{1,64}", text, re.ASCII):
        raise ArgumentTypeError(f"{text!r} must be 1 to 64 letters, digits or . / - _")
    return text


def slowdown(text: str) -> float:
    """
    >>> slowdown("slower:5%")
    0.05
    """
    match = re.fullmatch(r"slower:(\d+(?:\.\d+)?)%", text)
    if match is None or not 0 <= float(match[1]) < 100:
        raise ArgumentTypeError(f"{text!r} does not have the form slower:P%, such as slower:5%")
    return float(match[1]) / 100
