from __future__ import annotations

import random

from servegrid.client.shared_starts import SharedStarts


def test_each_prompt_shares_the_longest_start_with_any_earlier_one() -> None:
    """Against a comparison with every earlier prompt, token by token.

    The ids differ in each of their bytes, and most prompts start like several others.
    """
    rng = random.Random(0)
    starts, earlier = SharedStarts(), list[list[int]]()
    for _ in range(500):
        prompt = rng.choices([1, 256, 257, 65_536, 16_777_216], k=rng.randrange(12))
        shared = [
            next(
                (at for at, pair in enumerate(zip(prompt, each, strict=False)) if len({*pair}) > 1),
                None,
            )
            for each in earlier
        ]
        lengths = [
            min(len(prompt), len(each)) if at is None else at
            for at, each in zip(shared, earlier, strict=True)
        ]
        assert starts.add(prompt) == max(lengths, default=0)
        earlier.append(prompt)


def test_a_system_prompt_that_is_shorter_than_a_block_of_vllm_counts() -> None:
    """llama.cpp reuses it to the token; in vLLM, the expected hits are rounded down to blocks."""
    starts = SharedStarts()
    assert starts.add([7] * 9 + [1, 2, 3]) == 0
    assert starts.add([7] * 9 + [4, 5]) == 9
