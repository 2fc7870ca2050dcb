"""Conversations on real engines: the counted tokens and the hits of the prefix cache."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.demo_model import DemoModel
from helpers.deployments import DEMO_ENTRY
from helpers.sources import check_counted_tokens
from servegrid.analysis.server_metrics import prefix_columns
from servegrid.analysis.tables import load_table
from servegrid.client import measure
from servegrid.client.prompts import load_corpus
from servegrid.engines import Site, start_engine
from servegrid.study.grid import Deployment, Workload
from servegrid.study.source import Source
from servegrid.telemetry.server import counter_reader

ROOT = Path(__file__).parents[2]
CACHING = {"cache_prompt": True, "slot_prompt_similarity": 0.1}


@pytest.mark.crowded
@pytest.mark.timeout(300)
def test_llamacpp_finds_the_history_in_its_cache(
    demo_model: DemoModel, llamacpp_deployment: Deployment
) -> None:
    # A slot for each of the conversations: with fewer, a new one takes that of a user whose next
    # turn is late, and the cache loses the history.
    deployment = replace(llamacpp_deployment, max_num_seqs=6, engine_args=CACHING)
    source = Source("text", turns=3)
    workload = Workload("closed_loop", 2, 60, 6, 10, warmup_waves=0, source=source)
    with start_engine(deployment, Site(models=demo_model.models, startup_s=120)) as engine:
        counters = counter_reader(engine.endpoint)
        measured = measure(engine.endpoint, workload, demo_model.folder, "talk", counters)
        facts = engine.facts
    assert measured.errors == [None] * 10
    check_counted_tokens(measured.requests)
    rows = {(row["conversation"], row["turn"]): row for row in measured.requests.to_pylist()}
    for (conversation, turn), row in rows.items():
        if turn > 1:
            before = rows[conversation, turn - 1]
            # All of the last prompt, and of the answer what has the same tokens again.
            assert before["prompt_tokens"] <= row["cached_tokens"] <= row["shared_tokens"]
            assert row["shared_tokens"] == before["prompt_tokens"] + 6 - 1
    assert max(turn for _, turn in rows) == 3
    assert len({conversation for conversation, _ in rows}) <= 6
    record = {
        "engine": facts,
        "metrics_before": measured.counters_before,
        "metrics_after": measured.counters_after,
    }
    rates = prefix_columns(record, measured.requests)
    assert rates["expected_prefix_hit_rate"] is not None
    assert rates["prefix_hit_rate"] == pytest.approx(rates["expected_prefix_hit_rate"], rel=0.1)


def write_chats(file: Path, number: int) -> None:
    """Conversations of three turns of 100 words from the corpus, and answers of seven words."""
    words = load_corpus().split()
    rows = []
    for row in range(number):
        messages = []
        for turn in range(3):
            start = 100 * (3 * row + turn)
            text = " ".join(words[(start + each) % len(words)] for each in range(100))
            messages += [
                {"role": "user", "content": f"{row} {text}"},
                {"role": "assistant", "content": "one two three four five six seven"},
            ]
        rows.append({"messages": messages})
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_vllms_hit_rate_is_the_expected_one_and_the_page_shows_off_and_on(tmp_path: Path) -> None:
    """Two trials of one file: neither may find the other's conversations in the cache."""
    write_chats(tmp_path / "chats.jsonl", 16)
    study: dict[str, Any] = {
        "study": "talk",
        "workload": {
            "protocol": "closed_loop",
            "concurrency": 2,
            "requests_per_user": 15,
            "think_time_s": 0.2,
            "input_len": 900,
            "output_len": 10,
            "trials": 2,
            "source": {"kind": "file", "path": str(tmp_path / "chats.jsonl"), "turns": "all"},
        },
        "deployments": [
            DEMO_ENTRY
            | {"max_model_len": 1024, "max_num_seqs": 8, "prefix_caching": [False, True]},
        ],
    }
    config = tmp_path / "study.json"
    config.write_text(json.dumps(study), encoding="utf-8")
    command = [
        *(sys.executable, "-m", "snakemake", "results/report/index.html"),
        *("--snakefile", str(ROOT / "Snakefile"), "--profile", str(ROOT / "profiles/local")),
        *("--directory", str(tmp_path), "--configfile", str(config)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    cells = load_table(tmp_path / "results/tables/cells.parquet").set_index(["deployment", "trial"])
    print(
        cells[["prefix_hit_rate", "expected_prefix_hit_rate", "ttft_s_p50", "output_tokens_per_s"]]
    )
    assert len(cells) == 4 and set(cells["verdict"]) == {"ok"}
    assert set(cells.loc["d", "prefix_hit_tokens"]) == {0}
    for trial in (1, 2):
        row = cells.loc[("d-prefix_caching", trial)]
        assert row["expected_prefix_hit_rate"] > 0.2  # blocks of 128 tokens on a CPU: below 0.5
        assert row["prefix_hit_rate"] == pytest.approx(row["expected_prefix_hit_rate"], rel=0.02)
        assert "prefix_cache" not in list(row["invalid_rules"])
    page = (tmp_path / "results/report/index.html").read_text(encoding="utf-8")
    assert "Prefix caching off and on" in page
    assert "output tokens/s: off" in page and "output tokens/s: on" in page
