"""Writes trials in the formats of other tools, and reads the results of other tools."""
