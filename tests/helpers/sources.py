"""Small workloads of every source, for tests with a real engine of 512 tokens of context."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from servegrid.study.config import parse_study
from servegrid.study.grid import Workload

CHATS: list[dict[str, Any]] = [
    {"prompt": "Why is the sky blue, même en hiver ?", "output_tokens": 5},
    {"messages": [{"role": "user", "content": "Count to three."}]},
    {
        "conversations": [
            {"from": "human", "value": "Name a river."},
            {"from": "gpt", "value": "The Loire."},
            {"from": "human", "value": "And another one 🙂"},
            {"from": "gpt", "value": "The Garonne, which flows through Bordeaux."},
        ]
    },
]
TRACE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,40,3\n"
    "2024-05-10 00:00:02.500000+00:00,120,7\n"
    "2024-05-10 00:00:04.000000+00:00,9,1\n"
)


def sourced_workloads(folder: Path) -> Iterator[tuple[Workload, Path | None]]:
    """Workloads of a few requests, as a study expands them, each with the file of its source."""
    chats, trace = folder / "chats.jsonl", folder / "trace.csv"
    chats.write_text("".join(f"{json.dumps(row)}\n" for row in CHATS), encoding="utf-8")
    trace.write_text(TRACE, encoding="utf-8")
    lens = {"distribution": "lognormal", "cv": 0.5, "max": 200}
    keys = {"protocol": "burst", "concurrency": 3, "input_len": 60, "output_len": 8}
    talk = {"protocol": "closed_loop", "input_len": 100, "output_len": 8}
    for own in (
        {**talk, "concurrency": 2, "requests_per_user": 3, "source": {"kind": "text", "turns": 3}},
        {
            **talk,
            "concurrency": 1,
            "requests_per_user": 4,
            "source": {"kind": "file", "path": str(chats), "turns": "all"},
        },
        {**keys, "source": {"kind": "text", "input_lens": lens}},
        {**keys, "source": {"kind": "random", "input_lens": lens, "output_lens": lens}},
        {**keys, "source": {"kind": "file", "path": str(chats)}},
        {"source": {"kind": "trace", "path": str(trace), "speedup": 20}},
    ):
        study = parse_study({"study": "s", "workload": own, "deployments": [DEPLOYMENT]})
        (trial,) = study.trials
        path = study.source_file(trial)
        yield trial.workload, Path(path) if path else None


DEPLOYMENT = {
    "model": "m",
    "checkpoint": "demo:m",
    "quantization": "bf16",
    "engine": "vllm",
    "gpu": "cpu",
    "max_model_len": 512,
}


def check_counted_tokens(requests: pa.Table) -> None:
    """The server's usage is what was sent and requested, for every request."""
    for row in requests.to_pylist():
        assert row["prompt_tokens"] == row["sent_tokens"] > 0
        assert row["completion_tokens"] == row["requested_tokens"] > 0
    lengths = {(row["sent_tokens"], row["requested_tokens"]) for row in requests.to_pylist()}
    assert len(lengths) > 1
