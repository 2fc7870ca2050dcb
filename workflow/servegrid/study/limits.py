"""The limits of all numbers in a study, on the command line and in published data."""

MAX_INTEGER = 2**31 - 1
"""The largest integer that a column of lengths, users or requests can hold."""

MAX_NUMBER, MIN_NUMBER = 10**12, 1e-12
"""Limits of other numbers; the second is for numbers above 0."""
