"""The network between two nodes is cut: neither gets an error, and both must end all the same."""

from __future__ import annotations

import time

import pytest

from helpers import namespaces
from helpers.node_pair import Pair

NOTICED_S = 20.0
"""The kernel's keepalive asks five times, each after 3 s."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.chaos,
    pytest.mark.crowded,
    pytest.mark.skipif(not namespaces.is_possible(), reason="only root makes network namespaces"),
]


def test_a_cut_network_ends_both_nodes(pair: Pair) -> None:
    with namespaces.cable() as cable:
        pair.prefixes = cable.prefixes
        pair.start(interface=namespaces.INTERFACE).wait_until_up()
        cable.cut()
        began = time.monotonic()
        pair.wait(lambda: pair.notes("down"), NOTICED_S)
        first = time.monotonic() - began
        pair.wait(lambda: pair.notes("left"), NOTICED_S)
        print(f"\ncut: ended after {first:.1f} s and {time.monotonic() - began:.1f} s")
        assert [process.wait(60) for process in pair.processes] == [1, 1]
        assert pair.helpers_left() == []
        (ended,) = pair.events("ended")
        assert (ended["reason"], "node 1 (node1) is gone" in ended["detail"]) == ("node_lost", True)
