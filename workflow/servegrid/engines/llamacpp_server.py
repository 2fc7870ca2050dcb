"""The process in which llama.cpp serves: `python -m servegrid.engines.llamacpp_server`.

Settings come as one JSON object on standard input; what became of them goes as one to standard
output. llama.cpp logs to standard error. It serves until it is ended.
"""

from __future__ import annotations

import difflib
import enum
import json
import signal
import sys
from collections.abc import Mapping
from typing import Any


def apply(settings: Mapping[str, Any], params: Any) -> None:
    """Set each attribute of `params` that `settings` names; `a.b` is attribute b of a.

    An enumeration is set by its member's name, a set by a list. Raises ValueError, naming the
    key, where there is no such attribute or the value does not compatibility.
    """
    for key, value in settings.items():
        *path, name = key.split(".")
        owner = params
        for each in path:
            owner = getattr(owner, each, None)
        if not hasattr(owner, name):
            close = difflib.get_close_matches(key, dir(params))
            meant = f"Did you mean {' or '.join(f'`{each}`' for each in close)}?" if close else ""
            raise ValueError(f"engine_args.{key}: llama.cpp has no such setting. {meant}".rstrip())
        try:
            setattr(owner, name, _fitting(value, getattr(owner, name)))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"engine_args.{key}: {value!r} does not fit ({error})") from error


def _fitting(value: Any, current: Any) -> Any:
    if isinstance(current, enum.Enum):
        return type(current)[value]
    return set(value) if isinstance(current, set) else value


def main() -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    try:
        apply(json.load(sys.stdin), params)
    except ValueError as error:
        sys.exit(tell(refused=str(error)))
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        sys.exit("llama.cpp did not start.")
    gpu = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_GPU
    tell(
        address=server.listening_address,
        system=" ".join(xllamacpp.get_system_info().split()),
        gpus=[each["description"] for each in xllamacpp.get_device_info() if each["type"] == gpu],
    )
    while True:
        signal.pause()


def tell(**facts: Any) -> int:
    print(json.dumps(facts), flush=True)
    return 1


if __name__ == "__main__":
    main()
