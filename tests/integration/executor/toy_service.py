"""A service that records its start and end, with a helper process."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Toy:
    env: Mapping[str, str]
    healthy: Callable[[], bool]


def note(event: str, name: str, **more: Any) -> None:
    entry = {"event": event, "name": name, "pid": os.getpid(), "time": time.monotonic()}
    with Path("service.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry | more) + "\n")


@contextlib.contextmanager
def serve(name: str, params: Mapping[str, Any], resources: Mapping[str, Any]) -> Iterator[Toy]:
    helper = subprocess.Popen(["sleep", "600"])
    health = Path(f"health-{os.getpid()}").absolute()
    note("enter", name, params=params, resources=resources)
    try:
        refusal = Path(f"refuse-{params['group']}")
        if refusal.exists():
            raise RuntimeError(f"no such model: {refusal.read_text(encoding='utf-8')}")
        time.sleep(params.get("start_s", 0))
        health.touch()
        note("up", name)
        env = {"TOY_ALLOCATION": name, "TOY_PID": str(os.getpid()), "TOY_HEALTH": str(health)}
        yield Toy(env, health.exists)
    finally:
        helper.kill()
        helper.wait()
        note("down", name)
