"""How many tokens at its start each prompt has in common with an earlier one. Pure."""

from __future__ import annotations

from array import array
from bisect import bisect
from collections.abc import Sequence

_TOKEN_ID = "I"


class SharedStarts:
    """The prompts so far. To the token, because llama.cpp's prefix cache has no blocks.

    They are sorted, so the one with the longest common start is next to a new one.
    """

    def __init__(self) -> None:
        self._sorted: list[bytes] = []

    def add(self, ids: Sequence[int]) -> int:
        """Add a prompt. Returns the tokens at its start that an earlier one had too.

        >>> starts = SharedStarts()
        >>> starts.add([1, 2, 3]), starts.add([1, 2, 4, 5]), starts.add([1, 2, 4])
        (0, 2, 3)
        """
        packed = array(_TOKEN_ID, ids)
        prompt = packed.tobytes()
        at = bisect(self._sorted, prompt)
        neighbours = self._sorted[max(0, at - 1) : at + 1]
        self._sorted.insert(at, prompt)
        longest = max((_common_bytes(prompt, each) for each in neighbours), default=0)
        return longest // packed.itemsize


def _common_bytes(first: bytes, second: bytes) -> int:
    """The length of the common start, by bisection."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
