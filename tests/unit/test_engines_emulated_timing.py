"""The emulated engine's timing from a table: its cells, values between them, and gaps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from servegrid.engines.emulated import parse_settings
from servegrid.engines.emulated_timing import Timing, load_timing
from servegrid.errors import ConfigError
from servegrid.study.config import load_study
from servegrid.study.grid import Deployment

ROOT = Path(__file__).parents[2]
MISTRAL, *_, MIXTRAL_22B, LLAMA = load_study(ROOT / "config/rehearsal.yaml").deployments


def seconds_per_100_tokens(timing: Timing, concurrency: int, input_len: int) -> float:
    times = timing(concurrency, input_len)
    assert times is not None
    return times.e2el_s(100)


@pytest.mark.parametrize(
    ("deployment", "concurrency", "input_len", "published"),
    [
        (MISTRAL, 1, 31, 1.8),
        (MISTRAL, 128, 2193, 72.1),
        (MIXTRAL_22B, 1, 31, 6.0),
        (LLAMA, 1, 21, 3.6),
    ],
)
def test_a_cell_of_the_article_takes_the_published_time(
    deployment: Deployment, concurrency: int, input_len: int, published: float
) -> None:
    timing = load_timing(deployment, "inria-2024")
    assert seconds_per_100_tokens(timing, concurrency, input_len) == pytest.approx(published)


def table(folder: Path, rows: list[tuple[int, int, str]]) -> str:
    lines = ["model,quantization,gpu,gpu_count,concurrency,input_len,output_len,"]
    lines[0] += "seconds_per_100_tokens"
    lines += [
        f"mistral-7b,fp16,v100-16gb,2,{n},{length},100,{seconds}" for n, length, seconds in rows
    ]
    path = folder / "table.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_times_between_cells_are_interpolated_linearly(tmp_path: Path) -> None:
    rows = [(1, 10, "2"), (3, 10, "4"), (1, 20, "6"), (3, 20, "8")]
    timing = load_timing(MISTRAL, table(tmp_path, rows))
    assert seconds_per_100_tokens(timing, 2, 10) == pytest.approx(3)
    assert seconds_per_100_tokens(timing, 1, 15) == pytest.approx(4)
    assert seconds_per_100_tokens(timing, 2, 15) == pytest.approx(5)


def test_workloads_in_gaps_and_outside_the_table_are_not_served(tmp_path: Path) -> None:
    timing = load_timing(MISTRAL, table(tmp_path, [(1, 10, "2"), (2, 10, "3"), (4, 10, "")]))
    assert timing(2, 10) is not None
    assert timing(4, 10) is None
    assert timing(3, 10) is None  # next to the gap
    assert timing(5, 10) is None
    assert timing(1, 11) is None


def test_time_scale_and_slowdown_multiply_all_times() -> None:
    arguments = {"timing": "inria-2024", "time_scale": 0.5, "slowdown": 1.1}
    _, timing, _ = parse_settings(replace(MISTRAL, engine_args=arguments))
    assert seconds_per_100_tokens(timing, 1, 31) == pytest.approx(1.8 * 0.5 * 1.1)


def test_the_roofline_model_gives_a_timing() -> None:
    # 14.5 GB of weights at 2 × 900 GB/s, 100 times; the KV cache adds 0.2%.
    timing = load_timing(MISTRAL, "roofline")
    assert seconds_per_100_tokens(timing, 1, 31) == pytest.approx(0.806, rel=0.005)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"time_scal": 1}, "engine_args.time_scal: .* Did you mean `time_scale`"),
        ({"time_scale": 0}, "engine_args.time_scale: 0 is not a number above 0"),
        ({"slowdown": "a lot"}, "engine_args.slowdown: 'a lot' is not a number above 0"),
        ({"startup_s": -1}, "engine_args.startup_s: -1 is not"),
        ({"timing": "bionic"}, "`bionic` is not one of roofline, inria-2024"),
        ({"timing": "no/such.csv"}, "no/such.csv cannot be read"),
        ({"faults": {"kind": "die"}}, "engine_args.faults: .* is not a list"),
        ({"faults": ["die"]}, r"engine_args.faults\[0\]: 'die' is not a mapping"),
        ({"faults": [{"kind": "dye"}]}, r"faults\[0\].kind: 'dye' is not one of `refuse`"),
        ({"faults": [{"kind": "die", "concurency": 1}]}, "Did you mean `concurrency`"),
        ({"faults": [{"kind": "die", "concurrency": "8"}]}, "'8' is not a number"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        parse_settings(replace(MISTRAL, engine_args=arguments))
    assert str(refused.value).startswith(f"deployment `{MISTRAL.name}`: ")


def test_a_table_without_the_deployment_is_refused() -> None:
    other = replace(MISTRAL, gpu_count=4, engine_args={"timing": "inria-2024"})
    with pytest.raises(ConfigError, match="`inria-2024` has no rows for model mistral-7b"):
        parse_settings(other)
