"""What a cell says about the reasoning of its model, as the client counts it. Pure.

A server may stream the text of a reasoning, or keep it to itself and only count its tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from servegrid.records.parquet import column_or_null

REQUEST_COLUMNS = ("first_token_ns", "first_output_token_ns", "reasoning_tokens")
"""The columns of `columns.REQUESTS` that this module needs. Older records lack the last two."""


def hidden_tokens(requests: pa.Table) -> npt.NDArray[np.int64]:
    """The reasoning tokens of each request that never arrived, because the server keeps them.

    If the answer starts with the first token that arrived, no reasoning arrived before it.
    """
    first, output, tokens = (column_or_null(requests, name) for name in REQUEST_COLUMNS)
    is_hidden = pc.fill_null(pc.equal(first, output), False)
    hidden = pc.if_else(is_hidden, pc.fill_null(tokens, 0), 0)
    return np.asarray(hidden.to_numpy(), dtype=np.int64)


def reasoning_columns(requests: pa.Table) -> dict[str, float | int | None]:
    """The columns of `columns.CELLS` about reasoning tokens. `requests` are the served ones."""
    tokens = column_or_null(requests, "reasoning_tokens")
    output = column_or_null(requests, "first_output_token_ns")
    without = pc.and_(pc.greater(tokens, 0), pc.is_null(output))
    return {
        "reasoning_tokens_mean": pc.mean(tokens).as_py(),
        "responses_without_answer": pc.sum(without).as_py(),
    }
