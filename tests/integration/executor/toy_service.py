"""A service that records its start and end, with a helper process on each of its nodes."""

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
def serve(
    name: str, params: Mapping[str, Any], resources: Mapping[str, Any], nodes: Any = None
) -> Iterator[Toy]:
    helper = subprocess.Popen(["sleep", "600"])
    health = Path(f"health-{os.getpid()}").absolute()
    note("enter", name, params=params, resources=resources)
    try:
        refusal = Path(f"refuse-{params['group']}")
        if refusal.exists():
            raise RuntimeError(f"no such model: {refusal.read_text(encoding='utf-8')}")
        time.sleep(params.get("start_s", 0))
        health.touch()
        more = {} if nodes is None else greet(nodes)
        note("up", name, helper=helper.pid, **more)
        env = {"TOY_ALLOCATION": name, "TOY_PID": str(os.getpid()), "TOY_HEALTH": str(health)}
        yield Toy(env, health.exists)
    finally:
        helper.kill()
        helper.wait()
        note("down", name)


def greet(nodes: Any) -> dict[str, Any]:
    """Send each other node a word, and collect their answers."""
    nodes.send({"word": "hello"})
    answers: list[Any] = []
    while len(answers) < len(nodes.hosts) - 1:
        if nodes.failure:
            raise RuntimeError(nodes.failure)
        if received := nodes.receive(0.1):
            answers.append(received)
    clocks = [nodes.clock_offset_ns(rank) for rank, _ in answers]
    return {"hosts": nodes.hosts, "answers": answers, "clocks": clocks}


@contextlib.contextmanager
def follow(
    name: str, params: Mapping[str, Any], resources: Mapping[str, Any], nodes: Any
) -> Iterator[Toy]:
    helper = subprocess.Popen(["sleep", "600"])
    try:
        if Path(f"refuse-node-{nodes.rank}").exists():
            raise RuntimeError("no disk here")
        rank, message = nodes.receive(120)
        nodes.send([rank, message["word"], nodes.hosts[nodes.rank]], rank=0)
        note("joined", name, rank=nodes.rank, helper=helper.pid)
        yield Toy({}, lambda: helper.poll() is None)
    finally:
        helper.kill()
        helper.wait()
        note("left", name, rank=nodes.rank)
