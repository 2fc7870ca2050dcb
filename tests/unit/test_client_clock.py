"""Conversion of the kernel's timestamps to CLOCK_MONOTONIC."""

from __future__ import annotations

import time

from servegrid.client.clock import ClockOffset, OffsetLog, read_offset

EPOCH = 1_790_000_000_000_000_001


def test_timestamps_are_shifted_by_the_offset_exactly() -> None:
    log = OffsetLog([ClockOffset(EPOCH, EPOCH - 1_000), ClockOffset(EPOCH + 2_000, EPOCH - 1_000)])
    stamps = [EPOCH, EPOCH + 1, EPOCH + 1_999, EPOCH + 5_000]
    assert log.to_monotonic(stamps) == [1_000, 1_001, 2_999, 6_000]


def test_offsets_are_interpolated_while_the_clock_slews() -> None:
    # The real-time clock gains 100 ns in the first second and 300 ns in the second.
    second = 1_000_000_000
    log = OffsetLog(
        [
            ClockOffset(EPOCH, EPOCH),
            ClockOffset(EPOCH + second, EPOCH + 100),
            ClockOffset(EPOCH + 2 * second, EPOCH + 400),
        ]
    )
    stamps = [EPOCH + second // 2, EPOCH + second, EPOCH + second * 3 // 2]
    expected = [second // 2 - 50, second - 100, second * 3 // 2 - 250]
    assert log.to_monotonic(stamps) == expected


def test_an_empty_list_stays_empty() -> None:
    assert OffsetLog().to_monotonic([]) == []


def test_the_offset_agrees_with_the_two_clocks() -> None:
    lowest = time.time_ns() - time.monotonic_ns()
    offset = read_offset().offset_ns
    # A second of leeway: a test machine may slew or pause, but 0 or a sign error is far off.
    assert abs(offset - lowest) < 1_000_000_000
    assert offset > 1_000_000_000_000_000_000
