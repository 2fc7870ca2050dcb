"""The kernel's stamps on the monotonic clock."""

from __future__ import annotations

import time

from servegrid.client.clock import Offset, OffsetLog, read_offset

EPOCH = 1_790_000_000_000_000_001


def test_stamps_are_moved_by_the_offset_to_the_nanosecond() -> None:
    log = OffsetLog([Offset(EPOCH, EPOCH - 1_000), Offset(EPOCH + 2_000, EPOCH - 1_000)])
    stamps = [EPOCH, EPOCH + 1, EPOCH + 1_999, EPOCH + 5_000]
    assert log.to_monotonic(stamps) == [1_000, 1_001, 2_999, 6_000]


def test_a_slewing_clock_is_followed_between_the_offsets_taken() -> None:
    # The real-time clock gains 100 ns in the first second and 300 ns in the second.
    second = 1_000_000_000
    log = OffsetLog(
        [
            Offset(EPOCH, EPOCH),
            Offset(EPOCH + second, EPOCH + 100),
            Offset(EPOCH + 2 * second, EPOCH + 400),
        ]
    )
    stamps = [EPOCH + second // 2, EPOCH + second, EPOCH + second * 3 // 2]
    expected = [second // 2 - 50, second - 100, second * 3 // 2 - 250]
    assert log.to_monotonic(stamps) == expected


def test_no_stamps_are_no_stamps() -> None:
    assert OffsetLog().to_monotonic([]) == []


def test_the_offset_is_taken_between_two_readings_of_the_clocks() -> None:
    lowest = time.time_ns() - time.monotonic_ns()
    taken = read_offset().offset_ns
    # A second of leeway: a test machine may slew or pause, but 0 or a sign error is far off.
    assert abs(taken - lowest) < 1_000_000_000
    assert taken > 1_000_000_000_000_000_000
