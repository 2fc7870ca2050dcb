"""servegrid's client as one command, as the comparison with other clients runs it.

python bench/one_load.py URL STREAMS REQUESTS TOKENS FILE: the requests' rows, as Parquet.
"""

from __future__ import annotations

import sys

import pyarrow.parquet as pq

from servegrid.client import measure
from servegrid.mock_server.responses import MODEL
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Workload

PROMPT_TOKENS = 8


def main(url: str, streams: str, requests: str, tokens: str, file: str) -> None:
    workload = Workload(
        protocol="closed_loop",
        concurrency=int(streams),
        input_len=PROMPT_TOKENS,
        output_len=int(tokens),
        requests=int(requests),
        warmup_waves=0,
    )
    measured = measure(Endpoint(url, MODEL), workload, tokenizer=None, salt="bench")
    pq.write_table(measured.requests, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
