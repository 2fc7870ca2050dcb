"""Estimates the tokens of each chunk if only their sum is known."""

from __future__ import annotations


def split_tokens(total: int, chunks: int) -> list[int]:
    """`total` tokens split over `chunks` chunks as evenly as possible, the larger parts first."""
    return [
        -(-(number + 1) * total // chunks) + (-number * total // chunks) for number in range(chunks)
    ]
