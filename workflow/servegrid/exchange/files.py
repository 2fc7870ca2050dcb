"""Reads files of other load clients, and recognises which client wrote them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from servegrid.errors import ExchangeError
from servegrid.exchange import guidellm, vllm_bench
from servegrid.exchange.imported import ImportedResult, check_result

_Parse = Callable[[], ImportedResult]


def load_results(file: Path) -> tuple[list[ImportedResult], list[str]]:
    """The results in a file of `vllm bench` or guidellm, and why others in it were left out.

    The file is a result of `vllm bench serve`, a list of them as `vllm bench sweep` writes it,
    several of them one per line (`--append-result`), or a report of guidellm. Raises ExchangeError
    if the file cannot be read, or if neither client wrote it.
    """
    results, left_out = [], []
    for where, parse in _find_benchmarks(_read_json(file), file):
        try:
            result = parse()
            check_result(result)
            results.append(result)
        except ExchangeError as error:
            left_out.append(str(error))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            left_out.append(
                f"{where}: has an unexpected structure ({type(error).__name__}: {error}). "
                "servegrid reads vllm bench serve 0.32, guidellm 0.8 and versions with the "
                "same keys."
            )
    return results, left_out


def _read_json(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ExchangeError(
            f"{file}: cannot be read ({error.strerror}). Correct the path."
        ) from error
    except ValueError as error:
        raise ExchangeError(f"{file}: is not JSON ({error}). Correct the path.") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        # `vllm bench serve --append-result` adds each result in a line of its own.
        lines = [line for line in text.splitlines() if line.strip()]
        try:
            if len(lines) > 1:
                return [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            pass
        raise ExchangeError(
            f"{file}: is not JSON ({error}). Check that the client finished writing the file."
        ) from error


def _find_benchmarks(data: Any, file: Path) -> Iterator[tuple[str, _Parse]]:
    """Each benchmark in a file: its place, and what parses it. Raises ExchangeError."""
    name = file.name
    if isinstance(data, list) and data:
        for position, item in enumerate(data):
            where = f"{name}[{position}]"
            is_result = _has_keys(item, vllm_bench.KEYS)
            yield where, partial(vllm_bench.parse_result if is_result else _refuse, item, where)
    elif _has_keys(data, vllm_bench.KEYS):
        yield name, partial(vllm_bench.parse_result, data, name)
    elif _has_keys(data, vllm_bench.FAILURE_KEYS):
        yield name, partial(vllm_bench.refuse_failure, data, name)
    elif _has_keys(data, guidellm.KEYS):
        yield from guidellm.find_benchmarks(data, name)
    else:
        raise _unknown_client(str(file))


def _has_keys(data: Any, keys: tuple[str, ...]) -> bool:
    return isinstance(data, dict) and all(key in data for key in keys)


def _refuse(item: Any, where: str) -> ImportedResult:
    raise _unknown_client(where)


def _unknown_client(where: str) -> ExchangeError:
    expected = " or ".join(
        ", ".join(f"`{key}`" for key in keys) for keys in (vllm_bench.KEYS, guidellm.KEYS)
    )
    return ExchangeError(
        f"{where}: was not written by vllm bench serve or guidellm. It needs the keys {expected}."
    )
