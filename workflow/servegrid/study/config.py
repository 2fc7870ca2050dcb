"""Loads a study's configuration, validates it against the schema and expands it.

Nothing is started here; only the files of workloads are read. Each error is one ConfigError that
names the file, the key and the remedy.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import ValidationError, best_match

from servegrid.errors import ConfigError
from servegrid.study.directory import inside
from servegrid.study.expand import expand
from servegrid.study.grid import Study
from servegrid.study.limits import MAX_INTEGER, MAX_NUMBER, MIN_NUMBER
from servegrid.study.source_files import resolve_sources
from servegrid.study.text import printable

SCHEMA = Path(__file__).parent / "schemas" / "study.yaml"
_MAX_PLAIN = 2**63
"""An integer that the schema does not know, such as an argument of an engine, is smaller."""

_TYPES = Draft202012Validator.TYPE_CHECKER


def _is_finite_number(_: Any, value: Any) -> bool:
    """Whether `value` is a number, but not `.inf` or `.nan`, which YAML also allows."""
    is_finite = not isinstance(value, float) or math.isfinite(value)
    return is_finite and _TYPES.is_type(value, "number")


def _is_whole_number(_: Any, value: Any) -> bool:
    """Whether `value` is an integer. JSON Schema also takes 8.0 for one, but engines do not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _check_type(
    validator: Any, types: str | list[str], value: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    """As JSON Schema's `type`, with limits on numbers if `schema` has none of its own.

    Larger ones fit into no table, and what is computed from tiny ones becomes infinite.
    """
    yield from Draft202012Validator.VALIDATORS["type"](validator, types, value, schema)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    limit = MAX_INTEGER if types == "integer" else MAX_NUMBER
    if value > limit and not {"maximum", "exclusiveMaximum"} & schema.keys():
        yield ValidationError("", validator="maximum", validator_value=limit)
    if 0 < value < MIN_NUMBER:
        yield ValidationError("", validator="minimum", validator_value=MIN_NUMBER)


def _check_pattern(_: Any, pattern: str, value: Any, __: Any) -> Iterator[ValidationError]:
    """As JSON Schema's `pattern`, but `$` does not match before a line feed at the end."""
    if isinstance(value, str) and not re.search(pattern.replace("$", r"\Z"), value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


_Validator = validators.extend(  # type: ignore[no-untyped-call]
    Draft202012Validator,
    validators={"pattern": _check_pattern, "type": _check_type},
    type_checker=_TYPES.redefine_many({"number": _is_finite_number, "integer": _is_whole_number}),
)
_TYPE_NAMES = {
    "object": "a mapping",
    "array": "a list",
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "empty",
}
"""What users of YAML call the types of JSON Schema."""
MAX_DESCRIPTION = 240
"""An error quotes at most about so many characters of a key's description."""
MAX_VALUES, MAX_DEPTH = 100_000, 20
"""Allowed values in a configuration, and allowed levels of nesting."""


@cache
def load_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a study's configuration."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # six times as fast, if there
    loaded: dict[str, Any] = yaml.load(SCHEMA.read_text(encoding="utf-8"), loader)
    return loaded


def parse_study(config: Mapping[str, Any], files: Sequence[Path | str] = ()) -> Study:
    """The study that `config` describes. Errors name `files` as its source.

    Files of `workload.source` are read, unless it has no path. Raises ConfigError if a key is
    unknown, a value is out of range, two deployments have the same name, a prompt is too long, the
    filters leave no cell, or a file of `workload.source` cannot be used.
    """
    source = ", ".join(str(file) for file in files) or "configuration"
    _check_plain(config, source)
    validate(config, load_schema(), source)
    _check_finite(config, source)
    try:
        resolved, paths = resolve_sources(config)
        return replace(expand(resolved), source_files=paths)
    except ConfigError as error:
        raise ConfigError(f"{source}: {printable(str(error))}") from None


def from_snakemake(config: Mapping[str, Any], files: Sequence[str]) -> Study:
    """The study that Snakemake has read from `files` as `config`. Raises ConfigError.

    Unlike Snakemake, which silently keeps the last one, this refuses duplicate keys.
    """
    for file in files:
        load_mapping(Path(file))
    return parse_study(config, files)


def load_study(file: Path, directory: Path = Path()) -> Study:
    """The study in a YAML file, whose own paths are relative to `directory`.

    Raises ConfigError if the file cannot be read or is not valid.
    """
    return load_both(file, directory)[0]


def load_both(file: Path, directory: Path = Path()) -> tuple[Study, dict[str, Any]]:
    """The study in a YAML file, and all its keys. Reads the file once, so it may be a pipe.

    Raises ConfigError like `load_study`.
    """
    mapping = load_mapping(file)
    with inside(directory):
        return parse_study(mapping, [file]), mapping


def load_settings(file: Path | None, directory: Path = Path()) -> dict[str, Any]:
    """The keys of a study, such as `slo`; none without a file. Raises ConfigError, as above."""
    return {} if file is None else load_both(file, directory)[1]


def load_mapping(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError if the file does not contain one."""
    try:
        text = file.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
        _check_duplicate_keys(file, text)
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror}). Correct the path or the permissions."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 ({error}). Save it as UTF-8.") from error
    except RecursionError as error:
        raise ConfigError(f"{file}: is nested too deeply. Write it flatter.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: is not valid YAML: {error}") from error
    except ValueError as error:  # such as a date with the month 13
        raise ConfigError(f"{file}: has an invalid value: {error}. Put it in quotes.") from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"{file}: is not a mapping of keys. Write `key: value` lines; see config/README.md."
        )
    return config


def _check_plain(config: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError if `config` has values that JSON has not, or too many of them.

    YAML also knows dates, sets, binary data, and keys that are no texts. Its aliases can make a few
    lines billions of values.
    """
    for path, value in _walk(config, source):
        where = f"{source}: {_format_key_path(path)}"
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise ConfigError(f"{where}: the key {key!r} is not a text. Put it in quotes.")
        elif not isinstance(value, str | int | float | list | tuple | None):
            kind = type(value).__name__
            raise ConfigError(f"{where}: {value!r} is a {kind}, not a text. Put it in quotes.")
        elif isinstance(value, str) and not _is_unicode(value):
            raise ConfigError(f"{where}: {value!r} is not valid Unicode. Correct it.")


def _check_finite(config: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError at `.inf`, `.nan` or a huge integer where the schema allows any value."""
    for path, value in _walk(config, source):
        if isinstance(value, float) and not math.isfinite(value):
            where = f"{source}: {_format_key_path(path)}"
            raise ConfigError(f"{where}: {value} is not a number. Correct it, or remove the key.")
        if isinstance(value, int) and abs(value) >= _MAX_PLAIN:
            where = f"{source}: {_format_key_path(path)}"
            raise ConfigError(f"{where}: {_shorten(repr(value))} is too large. Correct it.")


def _walk(config: Mapping[str, Any], source: str) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """All values with their paths. Raises ConfigError if there are too many."""
    pending: list[tuple[tuple[str | int, ...], Any]] = [((), config)]
    for count in itertools.count(1):
        if not pending:
            return
        path, value = pending.pop()
        if count > MAX_VALUES or len(path) > MAX_DEPTH:
            raise ConfigError(
                f"{source}: {_format_key_path(path[:3])}: the configuration has more than "
                f"{MAX_VALUES:,} values, or more than {MAX_DEPTH} levels. Shorten it."
            )
        yield path, value
        if isinstance(value, Mapping):
            pending += [((*path, key), each) for key, each in value.items()]
        elif isinstance(value, list | tuple):
            pending += [((*path, index), each) for index, each in enumerate(value)]


def _is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogates, which no file can store."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_duplicate_keys(file: Path, text: str) -> None:
    pending, seen = [yaml.compose(text, yaml.SafeLoader)], set[int]()
    while pending:
        node = pending.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += node.value
        elif isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                pending.append(value)
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.value in keys:
                    line = key.start_mark.line + 1
                    raise ConfigError(
                        f"{file}: line {line}: the key `{printable(key.value)}` is a duplicate. "
                        "Remove one of the two, or merge them."
                    )
                keys.add(key.value)


def validate(config: Mapping[str, Any], rules: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError if `config` does not match `rules`, a JSON Schema with descriptions.

    The error names `source`, the key and the remedy.
    """
    problems = list(_Validator(rules).iter_errors(config))
    if problems:
        problem = printable(_describe_error(best_match(problems), rules))
        raise ConfigError(f"{source}: {problem}")


def _format_key_path(path: Iterable[str | int]) -> str:
    """`deployments[0].workload.concurrency` from the steps of a JSON path."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return printable(text.removeprefix(".")) or "the top level"


def _describe_error(error: Any, rules: Mapping[str, Any]) -> str:
    where = _format_key_path(error.absolute_path)
    if error.validator == "additionalProperties":
        return _describe_unknown_key(where, error)
    if error.validator == "required":
        missing = next(key for key in error.validator_value if key not in error.instance)
        path = [*[*error.absolute_schema_path][:-1], "properties", missing]
        return f"{where}: `{missing}` is missing. {_description(rules, path)}"
    if error.validator == "oneOf":  # One value or a list: describe the form that the user wrote.
        is_list = isinstance(error.instance, list)
        branch = next(each for each in error.context if (each.schema_path[0] == 1) == is_list)
        return _describe_error(branch, rules)
    description = _description(rules, error.absolute_schema_path)
    return f"{where}: {_describe_value_error(error)} {description}".rstrip()


def _description(rules: Mapping[str, Any], schema_path: Iterable[str | int]) -> str:
    """The start of the description of the innermost key on `schema_path`."""
    node: Any = rules
    nearest = ""
    for step in schema_path:
        if "$ref" in node and step not in node:
            node = rules["$defs"][node["$ref"].rpartition("/")[2]]
        node = node[step]
        if isinstance(node, dict):
            nearest = node.get("description", nearest)
    return _first_sentences(nearest)


def _first_sentences(text: str) -> str:
    """As many sentences as an error has room for; config/README.md has all of them.

    >>> _first_sentences("One. Two: a, b.")
    'One. Two: a, b.'
    """
    sentences = re.split(r"(?<=[.!])\s+", text)
    lengths = itertools.accumulate(len(each) + 1 for each in sentences)
    count = sum(length <= MAX_DESCRIPTION for length in lengths)
    return " ".join(sentences[: max(1, count)])


def _describe_value_error(error: Any) -> str:
    shown = _shorten(repr(error.instance))
    match error.validator:
        case "minimum":
            return f"{shown} is less than {error.validator_value}."
        case "maximum":
            return f"{shown} is more than {error.validator_value:,}."
        case "exclusiveMinimum":
            return f"{shown} must be greater than {error.validator_value}."
        case "exclusiveMaximum":
            return f"{shown} must be less than {error.validator_value}."
        case "type":
            types = error.validator_value
            names = [_TYPE_NAMES[each] for each in ([types] if isinstance(types, str) else types)]
            return f"{shown} is not {' or '.join(names)}."
        case "enum":
            valid = ", ".join(f"`{each}`" for each in error.validator_value)
            return f"{shown} is not one of {valid}."
        case "pattern":
            kind = "URL" if error.absolute_path[-1] == "url" else "name"
            return f"{shown} is not a {kind}: it must match {error.validator_value}."
        case "maxLength":
            return f"{shown} has more than {error.validator_value} characters."
        case "minItems":
            return "the list is empty."
        case "uniqueItems":
            return f"{shown} contains a duplicate."
    return f"{error.message}."


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"


def _describe_unknown_key(where: str, error: Any) -> str:
    valid = sorted(error.schema["properties"])
    unknown = sorted(str(key) for key in error.instance if key not in valid)
    near = difflib.get_close_matches(unknown[0], valid, n=1)
    meant = f" Did you mean `{near[0]}`?" if near else ""
    return f"{where}: unknown key `{unknown[0]}`.{meant} Valid keys: {', '.join(valid)}."
