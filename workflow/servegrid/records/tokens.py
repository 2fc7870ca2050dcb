"""Tokens per chunk, where only their sum is known."""

from __future__ import annotations


def shared_out(total: int, carriers: int) -> list[int]:
    """`total` tokens over that many chunks, as evenly as goes, the first never without."""
    return [
        -(-(number + 1) * total // carriers) + (-number * total // carriers)
        for number in range(carriers)
    ]
