"""A study's configuration: checked against the schema, then expanded. Nothing is started here.

Every refusal is one ConfigError that names the file, the key and the remedy.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import best_match

from servegrid.errors import ConfigError
from servegrid.study.grid import Study, expand

SCHEMA = Path(__file__).parent / "schemas" / "study.yaml"


_TYPES = Draft202012Validator.TYPE_CHECKER


def _is_finite_number(_: Any, value: Any) -> bool:
    """Whether it can be computed with; YAML has `.inf` and `.nan`, too."""
    is_finite = not isinstance(value, float) or math.isfinite(value)
    return is_finite and _TYPES.is_type(value, "number")


_Validator = validators.extend(  # type: ignore[no-untyped-call]
    Draft202012Validator, type_checker=_TYPES.redefine("number", _is_finite_number)
)


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a study's configuration."""
    loaded: dict[str, Any] = yaml.safe_load(SCHEMA.read_text())
    return loaded


def study_of(config: Mapping[str, Any], files: Sequence[Path | str] = ()) -> Study:
    """The study that `config` describes; `files` is where it came from, for messages.

    Raises ConfigError where a key is unknown, a value is out of its range, two deployments
    have the same name, a prompt does not fit, or no cell is left.
    """
    source = ", ".join(str(file) for file in files) or "configuration"
    refuse_unfitting(config, schema(), source)
    try:
        return expand(config)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def study_from(config: Mapping[str, Any], files: Sequence[str]) -> Study:
    """The study that Snakemake has read as `config` from `files`; raises ConfigError as `study_of`.

    Snakemake's reader keeps the last of two equal keys and says nothing; here they are refused.
    """
    for file in files:
        _refuse_repeated_keys(Path(file), Path(file).read_text())
    return study_of(config, files)


def read_study(file: Path) -> Study:
    """The study in a YAML file. Raises ConfigError as `study_of`, or where it is not YAML."""
    return study_of(read_mapping(file), [file])


def read_mapping(file: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises ConfigError where it has none."""
    try:
        text = file.read_text()
        config = yaml.safe_load(text)
        _refuse_repeated_keys(file, text)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}).") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: is not a mapping of keys; see config/README.md.")
    return config


def _refuse_repeated_keys(file: Path, text: str) -> None:
    waiting, seen = [yaml.compose(text, yaml.SafeLoader)], set[int]()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                waiting.append(value)
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.value in keys:
                    line = key.start_mark.line + 1
                    raise ConfigError(
                        f"{file}: line {line} gives `{key.value}` a second time, and only one of "
                        "the two would count. Remove one, or make one of them."
                    )
                keys.add(key.value)


def refuse_unfitting(config: Mapping[str, Any], rules: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError, naming `source`, the key and the remedy, where `rules` are broken.

    `rules` are a JSON Schema whose keys have descriptions.
    """
    problems = list(_Validator(rules).iter_errors(config))
    if problems:
        raise ConfigError(f"{source}: {_told(best_match(problems), rules)}")


def place(path: Iterable[str | int]) -> str:
    """`deployments[0].load.concurrency` from the steps of a JSON path."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".") or "the top level"


def _told(error: Any, rules: Mapping[str, Any]) -> str:
    where = place(error.absolute_path)
    if error.validator == "additionalProperties":
        return _unknown_keys(where, error)
    if error.validator == "required":
        missing = next(key for key in error.validator_value if key not in error.instance)
        path = [*[*error.absolute_schema_path][:-1], "properties", missing]
        return f"{where}: `{missing}` is missing. {_description(rules, path)}"
    if error.validator == "oneOf":  # one value or a list of them: speak of what was meant
        is_list = isinstance(error.instance, list)
        return _told(next(e for e in error.context if (e.schema_path[0] == 1) == is_list), rules)
    return (
        f"{where}: {_complaint(error)} {_description(rules, error.absolute_schema_path)}".rstrip()
    )


def _description(rules: Mapping[str, Any], schema_path: Iterable[str | int]) -> str:
    """The description nearest to the rule that was broken."""
    node: Any = rules
    nearest = ""
    for step in schema_path:
        if "$ref" in node and step not in node:
            node = rules["$defs"][node["$ref"].rpartition("/")[2]]
        node = node[step]
        if isinstance(node, dict):
            nearest = node.get("description", nearest)
    return nearest


def _complaint(error: Any) -> str:
    shown = repr(error.instance)
    shown = shown if len(shown) <= 60 else shown[:57] + "…"
    match error.validator:
        case "minimum":
            return f"{shown} is less than {error.validator_value}."
        case "maximum":
            return f"{shown} is more than {error.validator_value}."
        case "exclusiveMinimum":
            return f"{shown} must be greater than {error.validator_value}."
        case "exclusiveMaximum":
            return f"{shown} must be less than {error.validator_value}."
        case "type":
            return f"{shown} is not of type {error.validator_value}."
        case "enum":
            valid = ", ".join(f"`{each}`" for each in error.validator_value)
            return f"{shown} is not one of {valid}."
        case "pattern":
            kind = "URL" if error.absolute_path[-1] == "url" else "name"
            return f"{shown} is not a {kind}: it must match {error.validator_value}."
        case "minItems":
            return "the list is empty."
        case "uniqueItems":
            return f"{shown} names something twice."
    return f"{error.message}."


def _unknown_keys(where: str, error: Any) -> str:
    valid = sorted(error.schema["properties"])
    unknown = sorted(str(key) for key in error.instance if key not in valid)
    near = difflib.get_close_matches(unknown[0], valid, n=1)
    meant = f" Did you mean `{near[0]}`?" if near else ""
    return f"{where}: unknown key `{unknown[0]}`.{meant} Valid keys: {', '.join(valid)}."
