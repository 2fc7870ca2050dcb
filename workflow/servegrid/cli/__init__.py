"""The command `servegrid`."""
