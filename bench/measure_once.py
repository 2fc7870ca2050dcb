"""One measurement by servegrid's client as a command, for the comparison with other clients.

python bench/measure_once.py URL CONCURRENCY REQUESTS TOKENS FILE writes the rows as Parquet.
"""

from __future__ import annotations

import sys

import pyarrow.parquet as pq

from servegrid.client import measure
from servegrid.mock_server.responses import MODEL
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Workload

PROMPT_TOKENS = 8


def main(url: str, concurrency: str, requests: str, tokens: str, file: str) -> None:
    workload = Workload(
        protocol="closed_loop",
        concurrency=int(concurrency),
        input_len=PROMPT_TOKENS,
        output_len=int(tokens),
        requests=int(requests),
        warmup_waves=0,
    )
    measurement = measure(Endpoint(url, MODEL), workload, tokenizer=None, salt="bench")
    pq.write_table(measurement.requests, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
