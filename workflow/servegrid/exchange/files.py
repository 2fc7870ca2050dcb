"""Reads files of other load clients, and recognises which client wrote them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from servegrid.errors import ExchangeError
from servegrid.exchange import guidellm, vllm_bench
from servegrid.exchange.imported import ImportedResult

_PARSERS: Mapping[tuple[str, ...], Callable[[Any, str], list[ImportedResult]]] = {
    vllm_bench.KEYS: lambda result, source: [vllm_bench.parse_result(result, source)],
    guidellm.KEYS: guidellm.parse_report,
}


def load_results(file: Path) -> list[ImportedResult]:
    """The results in a file of `vllm bench serve` or guidellm. Raises ExchangeError."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExchangeError(
            f"{file}: cannot be read ({error.strerror}). Correct the path."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ExchangeError(
            f"{file}: is not JSON ({error}). If `vllm bench` appended several results to one file, "
            "put each result into its own file."
        ) from error
    for keys, parse in _PARSERS.items():
        if isinstance(data, dict) and all(key in data for key in keys):
            try:
                return parse(data, file.name)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                raise ExchangeError(
                    f"{file}: has an unexpected structure ({type(error).__name__}: {error}). "
                    "servegrid reads vllm bench serve 0.32, guidellm 0.8 and versions with the "
                    "same keys."
                ) from error
    expected = " or ".join(", ".join(f"`{key}`" for key in keys) for keys in _PARSERS)
    raise ExchangeError(
        f"{file}: was not written by vllm bench serve or guidellm. It needs the keys {expected}."
    )
