"""The process that runs llama.cpp's server: `python -m servegrid.engines.llamacpp_server`.

It reads its settings as one JSON object from standard input, and writes its address or an error as
one JSON object to standard output. llama.cpp logs to standard error. It serves until it is killed.
"""

from __future__ import annotations

import difflib
import enum
import json
import signal
import sys
from collections.abc import Mapping
from typing import Any


def apply_settings(settings: Mapping[str, Any], params: Any) -> None:
    """Set each attribute of `params` that `settings` names; the key `a.b` is attribute b of a.

    The value of an enumeration is the member's name, also within a list; the value of a set is a
    list. Raises ValueError with the key if there is no such attribute or if it does not accept the
    value.
    """
    for key, value in settings.items():
        *path, name = key.split(".")
        owner = params
        for parent in path:
            owner = getattr(owner, parent, None)
        if not hasattr(owner, name):
            close = difflib.get_close_matches(key, dir(params))
            hint = (
                f"Did you mean {' or '.join(f'`{match}`' for match in close)}?"
                if close
                else "Remove it."
            )
            raise ValueError(f"engine_args.{key}: llama.cpp has no such setting. {hint}")
        try:
            setattr(owner, name, _convert(value, getattr(owner, name)))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"engine_args.{key}: llama.cpp does not accept {value!r} ({error}). "
                "Correct the value."
            ) from error


def _convert(value: Any, current: Any) -> Any:
    if isinstance(current, enum.Enum):
        return type(current)[value]
    if isinstance(current, list) and any(isinstance(each, enum.Enum) for each in current):
        return [type(current[0])[each] for each in value]
    return set(value) if isinstance(current, set) else value


def main() -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    try:
        apply_settings(json.load(sys.stdin), params)
    except ValueError as error:
        sys.exit(report(refused=str(error)))
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        sys.exit("llama.cpp did not start.")
    gpu = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_GPU
    report(
        address=server.listening_address,
        system=" ".join(xllamacpp.get_system_info().split()),
        gpus=[
            device["description"] for device in xllamacpp.get_device_info() if device["type"] == gpu
        ],
    )
    while True:
        signal.pause()


def report(**facts: Any) -> int:
    print(json.dumps(facts), flush=True)
    return 1


if __name__ == "__main__":
    main()
